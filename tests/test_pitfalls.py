"""Pitfalls of the released reference code that are about cost and side effects.

The others are tested where they belong: a batch of one (1), constant positions (2), inputs (5) and
means (6) in ``test_scores.py``; quotas (3) in ``test_selection.py``; the bias (4) and keys without
rotation (7) in ``test_freezing.py``.
"""

import gc
import weakref

import numpy as np
import pytest
import torch
import transformers as tf
from tiny_models import EQUAL, VOCAB, word_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

import eigenlens as el
from eigenlens import pipeline
from eigenlens.metrics import answer_loss
from eigenlens.passes import FiniteCheck, forward_backward
from eigenlens.provenance import model_fingerprint
from eigenlens.tasks import make_batches


class CountOperations(TorchDispatchMode):
    """Counts the tensor operations that run."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def model_of_width(folder, width):
    torch.manual_seed(0)
    config = tf.GPT2Config(vocab_size=VOCAB, n_embd=width, n_layer=2, n_head=2, n_positions=16)
    tf.GPT2LMHeadModel(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return el.load_model(folder, device="cpu")


def test_no_loop_over_singular_values(tmp_path):
    """Pitfall 8: four times as many singular values take just as many operations."""
    counts = {}
    for width in (8, 32):
        model = model_of_width(tmp_path / str(width), width)
        spectra = el.decompose(model, progress=False)
        for criterion in ("mean", "max"):
            with CountOperations() as operations:
                el.score(model, spectra, EQUAL, criterion=criterion, progress=False)
            counts[width, criterion] = operations.count
    for criterion in ("mean", "max"):
        assert counts[8, criterion] == counts[32, criterion] > 100


def test_no_activation_outlives_its_batch(tiny):
    """Pitfall 8: the activations of the whole data set were kept."""
    model = tiny("llama")
    spectra = el.decompose(model, progress=False)
    (batch,) = make_batches(EQUAL, model, 6)
    alive = []

    def handle(site, h, g, values):
        alive.append((weakref.ref(h), weakref.ref(g)))

    sites = [s.site for s in spectra.values()]
    forward_backward(model, sites, batch, answer_loss, handle, FiniteCheck())
    gc.collect()
    assert len(alive) == len(spectra)
    assert all(x() is None and g() is None for x, g in alive)


@pytest.mark.slow
def test_what_is_kept_does_not_grow_with_the_data(tiny):
    """Pitfall 8: from the second batch to the last, no tensor is added to those that are alive."""
    model = tiny("gpt2")
    spectra = el.decompose(model, matrices=["W_in", "W_V"], progress=False)
    alive: list[int] = []

    def count(*_):
        gc.collect()
        stores = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in gc.get_objects()
            if type(t) is torch.Tensor
        }
        alive.append(sum(stores.values()))

    hook = model.original_model.register_forward_pre_hook(count)
    try:
        scores = el.score(model, spectra, EQUAL, batch_size=1, progress=False)
    finally:
        hook.remove()
    assert len(alive) % len(EQUAL) == 0
    for start in range(0, len(alive), len(EQUAL)):  # every pass over the data
        one_pass = alive[start + 1 : start + len(EQUAL)]
        assert max(one_pass) - one_pass[0] < 4 * model.cfg.d_model  # bytes of one token
    assert np.isfinite(scores.delta_loss).all()


def test_nothing_is_trained_before_or_while_pruning(tiny_folder):
    """Pitfall 9: a fine-tuning epoch ran before pruning, and its effect was taken for pruning's."""
    model = el.load_model(tiny_folder("llama"), device="cpu")
    before = model_fingerprint(model)
    task = el.load_task("int_add", model.tokenizer, low=1, high=12, n_train=20, n_test=9)
    pipeline.eigenprune(
        model, task, el.EigenpruneConfig(criterion="max", search_args={"steps": 2}), progress=False
    )
    assert model_fingerprint(model) == before
    nothing = el.EigenpruneConfig(search="one_shot", search_args={"fractions": [0.0]})
    result = pipeline.eigenprune(model, task, nothing, progress=False)
    assert result.after.examples.equals(result.before.examples)
