"""What does not fit into memory is halved, with a word about it, and gives the same result."""

import weakref
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import MIXED

import eigenlens as el
from eigenlens import memory
from eigenlens.exact import exact_effects
from eigenlens.gates import Gates
from eigenlens.memory import fitting, is_out_of_memory
from eigenlens.scoring.single_effects import single_effects
from eigenlens.search import Protection
from eigenlens.tasks import make_batches

ERRORS = {
    "processor": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "device": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "Python": MemoryError,
}


@pytest.fixture
def model(tiny):
    """What fitted in another test is forgotten."""
    memory._fits.clear()
    yield tiny("llama")
    memory._fits.clear()


@contextmanager
def room_for(model, rows, error):
    """Deep in the model, more rows than this do not fit; passes begin before that is known."""
    sizes = []

    def full(value, hook):
        sizes.append(len(value))
        if len(value) > rows:
            raise error()

    with model.hooks(fwd_hooks=[("blocks.1.hook_out", full)]):
        yield sizes


def each(model):
    """What is done in batches, by name, as tables of numbers."""
    spectra = el.decompose(model, progress=False)
    scores = el.score(model, spectra, MIXED, progress=False)
    (batch,) = make_batches(MIXED, model, len(MIXED))
    options = {"batch_size": 5, "progress": False}

    def gates():
        with Gates(model, scores) as gated:
            gated.z = torch.linspace(0, 1, len(scores), dtype=torch.float64)
            return torch.cat(gated.gradient(batch)).numpy()

    def protected():
        kept = Protection(model, {"text": MIXED}, batch_size=5)
        with el.freeze(model, el.select(scores, 0.3)):
            return np.array(list(kept.measure().values()))

    def harm():
        return Protection(model, {"text": MIXED}, batch_size=5).harm(scores, progress=False).square

    return {
        "harm": harm,
        "score": lambda: el.score(model, spectra, MIXED, **options).delta_loss,
        "worst": lambda: el.score(model, spectra, MIXED, criterion="max", **options).delta_loss,
        "evaluate": lambda: el.evaluate(model, MIXED, **options).examples["loss"].to_numpy(),
        "exact": lambda: exact_effects(model, scores, np.arange(0, 40), MIXED, **options),
        "single": lambda: single_effects(model, scores, MIXED, **options).effects.numpy(),
        "gates": gates,
        "protected": protected,
    }


NAMES = ("score", "worst", "evaluate", "exact", "single", "gates", "protected", "harm")
CASES = [
    ("score", "device"),
    ("gates", "Python"),
    *(pytest.param(name, "processor", marks=pytest.mark.slow) for name in NAMES),
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_half_a_batch_gives_the_same(model, name, kind):
    run = each(model)[name]
    whole = run()
    with room_for(model, 2, ERRORS[kind]) as sizes:
        with pytest.warns(UserWarning, match=r"at once do not fit into memory, going on with \d+"):
            found = run()
        np.testing.assert_allclose(found, whole, rtol=1e-9, atol=1e-12)
        sizes.clear()
        np.testing.assert_allclose(run(), found, rtol=1e-14)
        assert max(sizes) <= 2  # remembered: nothing is tried in vain a second time


def test_what_does_not_fit_at_all_and_other_errors_are_raised(model):
    spectra = el.decompose(model, progress=False)
    with (
        room_for(model, 0, ERRORS["device"]),
        pytest.warns(UserWarning, match="going on with 2"),
        pytest.warns(UserWarning, match="going on with 1"),
        pytest.raises(torch.OutOfMemoryError),
    ):
        el.evaluate(model, MIXED, progress=False)
    with (
        room_for(model, 1, MemoryError),
        pytest.warns(UserWarning, match="going on with 2"),
        pytest.raises(MemoryError),  # partners are drawn within a batch
    ):
        el.score(model, spectra, MIXED, reference="resample", progress=False)
    another = room_for(model, 0, lambda: RuntimeError("another error"))
    with another as sizes, pytest.raises(RuntimeError, match="another error"):
        el.evaluate(model, MIXED, batch_size=1, progress=False)
    assert len(sizes) == 1


def test_the_allocator_of_the_processor_is_understood():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    with pytest.raises(MemoryError) as caught:
        np.zeros(2**58)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_what_failed_is_let_go_before_the_next_try(model):
    class Large:
        pass

    alive = weakref.WeakSet()

    def run(size):
        assert not alive
        held = Large()
        alive.add(held)
        if size > 1:
            raise MemoryError(str(held))
        return size

    with pytest.warns(UserWarning, match="going on"):
        assert fitting(model, "trial", 8, run) == 1


def test_a_search_with_little_room_finds_the_same(model):
    scores = el.score(model, el.decompose(model, progress=False), MIXED, progress=False)
    config = el.LearnedConfig(steps=4, every=2, batch_size=5, lr=1.0)
    whole = el.learned(model, scores, MIXED, MIXED, config, progress=False)
    with (
        room_for(model, 3, MemoryError),
        pytest.warns(UserWarning, match="gates: 5 at once"),
        pytest.warns(UserWarning, match="evaluate: 5 at once"),
    ):
        found = el.learned(model, scores, MIXED, MIXED, config, progress=False)
    pd.testing.assert_frame_equal(found.frozen.to_pandas(), whole.frozen.to_pandas())
    pd.testing.assert_frame_equal(found.trace, whole.trace)
