"""The same configuration gives the same bits, and the same frozen set with other threads."""

import pandas as pd
import pytest
import torch

import eigenlens as el


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def one_shot(model, task, threads, layers=None):
    """Scores and the frozen set of a share, with nothing taken from a cache."""
    torch.set_num_threads(threads)
    spectra = el.decompose(model, layers=layers, cache=False, progress=False)
    scores = el.score(model, spectra, task.train, criterion="margin", progress=False)
    return scores, el.select(scores, 0.01)


def equal_bits(one, other):
    pd.testing.assert_frame_equal(one[0].to_pandas(), other[0].to_pandas(), check_exact=True)
    pd.testing.assert_frame_equal(one[1].to_pandas(), other[1].to_pandas(), check_exact=True)


def equal_sets(one, other):
    columns = ["layer", "matrix", "head", "index"]
    pd.testing.assert_frame_equal(one[1].components[columns], other[1].components[columns])


def test_the_same_bits_with_the_same_threads_and_the_same_set_with_others():
    model = el.load_model("arith-tiny", device="cpu")
    task = el.load_task("ambiguous", model.tokenizer, reading="product", n_train=60)
    one, two = one_shot(model, task, 1), one_shot(model, task, 2)
    equal_bits(one, one_shot(model, task, 1))
    equal_bits(two, one_shot(model, task, 2))
    equal_sets(one, two)


@pytest.mark.real
def test_smollm2_freezes_the_same_set_with_one_thread_and_two():
    model = el.load_model("smollm2-135m", device="cpu")
    sizes = {"low": 10, "high": 30, "n_train": 20, "n_validation": 10, "n_test": 10}
    task = el.load_task("int_add", model.tokenizer, **sizes)
    one, two = (one_shot(model, task, threads, [0, 14, 29]) for threads in (1, 2))
    assert len(one[1]) == 98
    equal_sets(one, two)
