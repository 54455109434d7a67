"""Keeping what suffices: against all subsets by brute force; refusals; faithfulness of sets."""

from itertools import product

import numpy as np
import pytest
import torch
import transformers as tf
from tiny_models import MIXED, VOCAB, dataset, enlarge, word_tokenizer

import eigenlens as el
from eigenlens.faithfulness import faithfulness_curve, faithfulness_of
from eigenlens.frozen_set import FrozenSet
from eigenlens.metrics import kl_to_unedited
from eigenlens.search import LearnedConfig, Protection, learned

PAIRS = [(1, 2), (9, 4), (7, 7), (3, 30), (5, 11), (8, 2)]
SUMS = dataset([(f"{a} + {b} =", f" {a + b}") for a, b in PAIRS])


def log_probabilities(model):
    """Of the answers to SUMS, one token each, without the package's batches."""
    bos = [model.tokenizer.bos_token_id] if model.cfg.default_prepend_bos else []
    rows = [bos + row for row in model.tokenizer(SUMS["prompt"][:])["input_ids"]]
    with torch.no_grad():
        return model(torch.tensor(rows))[:, -1].log_softmax(-1)


@pytest.fixture(scope="module")
def handful(tmp_path_factory):
    """A model whose eight components of W_O allow all 256 subsets, and the divergence of each."""
    torch.manual_seed(3)
    config = tf.GPT2Config(vocab_size=VOCAB, n_embd=8, n_layer=1, n_head=2, n_positions=32)
    plain = tf.AutoModelForCausalLM.from_config(config).eval()
    enlarge(plain)
    plain.transformer.h[0].attn.c_proj.weight.data *= 3
    path = tmp_path_factory.mktemp("handful")
    plain.save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    model = el.load_model(path, dtype=torch.float64, device="cpu")
    spectra = el.decompose(model, ["W_O"], progress=False)
    scores = el.score(model, spectra, SUMS, progress=False)
    before, divergence = log_probabilities(model), {}
    for kept in product([False, True], repeat=len(scores)):
        rows = np.flatnonzero(~np.array(kept))
        with el.freeze(model, FrozenSet.from_scores(scores, rows)):
            after = log_probabilities(model)
        divergence[kept] = float((before.exp() * (before - after)).sum(-1).mean())
    return model, scores, divergence


@pytest.mark.parametrize(("price", "n_kept"), [(0.01, 5), (0.03, 4), (0.1, 0)])
def test_what_is_kept_is_the_best_of_all_subsets(handful, price, n_kept):
    model, scores, divergence = handful
    assert len(divergence) == 256
    config = LearnedConfig(sparsity=price, steps=150)
    found = learned(model, scores, SUMS, SUMS, config, keep=True, progress=False)
    kept = found.frozen.kept(scores)
    names = set(zip(kept["head"], kept["index"], strict=True))
    every = zip(scores.components["head"], scores.components["index"], strict=True)
    rows = tuple(name in names for name in every)
    assert len(kept) == sum(rows) == n_kept
    assert len(kept) + len(found.frozen) == len(scores)
    assert (found.frozen.components["strength"] == 1).all()
    cost = {rows: kl + price * sum(rows) / 8 for rows, kl in divergence.items()}
    assert cost[rows] == min(cost.values())
    chosen = found.trace[found.trace["chosen"]].iloc[0]
    assert chosen["kl"] == pytest.approx(divergence[rows], abs=1e-9)
    assert chosen["objective"] == pytest.approx(cost[rows], abs=1e-9)
    assert chosen["components"] == len(found.frozen)
    assert found.method == "learned (kept)"
    assert found.trace["objective"][0] == pytest.approx(price)  # all is kept, nothing diverges


def test_keep_is_refused_with_what_contradicts_it(handful):
    model, scores, _ = handful
    data = (model, scores, SUMS, SUMS)
    with pytest.raises(ValueError, match="attenuate=True"):
        learned(*data, LearnedConfig(attenuate=True), keep=True, progress=False)
    with pytest.raises(ValueError, match="protect="):
        learned(*data, keep=True, protect=Protection(model, {"sums": SUMS}), progress=False)


def test_faithfulness_of_sets_is_one_with_all_and_zero_at_the_means(handful):
    model, scores, divergence = handful
    rows = [np.array([0, 5]), np.array([1, 2, 3, 4, 6])]
    sets = [FrozenSet.from_scores(scores, part) for part in rows]
    found = faithfulness_of(model, scores, sets, SUMS, metric=kl_to_unedited(model, SUMS))
    assert found["kept"].tolist() == [0.0, 3 / 8, 6 / 8, 1.0]
    none = divergence[(False,) * 8]
    masks = [tuple(i not in part for i in range(8)) for part in reversed(rows)]
    expected = [0.0, *(1 - divergence[mask] / none for mask in masks), 1.0]
    np.testing.assert_allclose(found["faithfulness"], expected, atol=1e-9)


def test_a_curve_is_the_faithfulness_of_the_sets_that_it_freezes(tiny):
    model = tiny("gpt2")
    scores = el.score(model, el.decompose(model, progress=False), MIXED, progress=False)
    curve = faithfulness_curve(model, scores, MIXED, kept=(0.25,))
    lowest = el.select(scores, count=len(scores) - round(0.25 * len(scores)))
    found = faithfulness_of(model, scores, [lowest], MIXED)
    assert found["faithfulness"].tolist() == pytest.approx(curve["faithfulness"].tolist())
    assert found["kept"].tolist() == pytest.approx([0, 0.25, 1], abs=1 / len(scores))
