"""Costs: passes counted by hand, memory that was really taken."""

import time

import pytest
import torch
from tiny_models import EQUAL

import eigenlens as el
from eigenlens.costs import measured, peak_memory


def test_passes_are_those_that_ran(tiny):
    model = tiny("llama")
    spectra = el.decompose(model, progress=False)
    with measured(model) as nothing:
        pass
    with measured(model) as evaluated:
        el.evaluate(model, EQUAL, batch_size=4)
    with measured(model) as scored:
        el.score(model, spectra, EQUAL, criterion="margin", batch_size=2, progress=False)
    assert (nothing.forward_passes, nothing.backward_passes) == (0, 0)
    assert (evaluated.forward_passes, evaluated.forward_examples) == (2, 6)
    assert (evaluated.backward_passes, evaluated.backward_examples) == (0, 0)
    # three batches for the means, three for the effects, which alone go backward
    assert (scored.forward_passes, scored.forward_examples) == (6, 12)
    assert (scored.backward_passes, scored.backward_examples) == (3, 6)
    assert scored.seconds > nothing.seconds > 0


def test_counting_ends_with_the_block_also_after_an_error(tiny):
    model = tiny("gpt2")
    with pytest.raises(KeyError), measured(model) as cost:
        raise KeyError
    el.evaluate(model, EQUAL)
    assert cost.forward_passes == 0
    assert not model.unembed._forward_hooks


def test_peak_memory_sees_what_is_freed_again():
    with peak_memory() as small:
        pass
    with peak_memory() as large:
        block = torch.ones(100 * 2**18)  # 100 MB
        time.sleep(0.2)  # a sample is taken every 5 ms, later on a busy machine
        del block
    assert small.mb < 50
    assert 95 < large.mb < 150
