"""Keeping what suffices: against all subsets by brute force; refusals; faithfulness of sets."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as tf
from tiny_models import MIXED, VOCAB, dataset, enlarge, word_tokenizer

import eigenlens as el
from eigenlens.faithfulness import faithfulness_curve, faithfulness_of
from eigenlens.frozen_set import FrozenSet
from eigenlens.metrics import kl_to_unedited
from eigenlens.paper.studies import known_circuit, sufficiency
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("price", "n_kept"),
    [(0.01, 5), (0.03, 4), (0.1, 0)],
)
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


@pytest.fixture(scope="module")
def arith():
    model = el.load_model("arith-tiny", device="cpu")
    task = el.load_task("int_add", model.tokenizer, high=20, n_train=100, n_test=40)
    return model, task


def test_nothing_but_a_known_circuit_does_anything(arith):
    """Also the heads that are cut off, whose queries, keys and values are as large as ever."""
    model, task = arith
    spectra = el.decompose(model, progress=False)
    idle = known_circuit.idle_components(spectra.components)
    assert idle.sum() == 2 * 4 * 32  # of two layers, the four matrices of one head of 32
    cut = idle & (spectra.components["matrix"] == "W_O").to_numpy()
    part = np.random.default_rng(0).random(len(idle)) < 0.5
    with known_circuit.only(spectra, np.where(idle, ~cut, part)).applied(model):
        inside = el.decompose(model, progress=False)
        options = {"reference": "zero", "progress": False}
        scores = el.score(model, inside, task.train, criterion="mean", **options)
        circuit = known_circuit.circuit_of(scores.components)
        assert circuit.sum() == (part & ~idle).sum()
        sigma = scores.components["sigma"].to_numpy()
        assert np.median(sigma[idle & ~cut]) > np.median(sigma[circuit]) / 4
        before = el.evaluate(model, task.test, progress=False)
        with el.freeze(model, FrozenSet.from_scores(scores, np.flatnonzero(~circuit))):
            after = el.evaluate(model, task.test, progress=False)
        with el.freeze(model, FrozenSet.from_scores(scores, np.flatnonzero(circuit)[:20])):
            other = el.evaluate(model, task.test, progress=False)
    np.testing.assert_allclose(after.examples["loss"], before.examples["loss"], atol=1e-3)
    assert not np.allclose(other.examples["loss"], before.examples["loss"], atol=1e-2)


@pytest.mark.slow
def test_a_known_circuit_is_found(arith):
    model, task = arith
    rankings = sufficiency.rankings_of
    found = known_circuit.find_known_circuit(model, task, 50, rankings)
    rows = pd.DataFrame(found).set_index("ranking")
    assert rows.loc[sufficiency.LEARNED, "precision"] > 0.95
    assert rows.loc[sufficiency.LEARNED, "recall"] > 0.9
    assert rows.loc["random", "precision"] < 0.4


def test_the_page_of_a_table_by_hand():
    rows = [("margin", 0.1, 0.2), ("margin", 0.5, 0.95), ("margin", 0.8, 0.85)]
    table = pd.DataFrame(
        [
            *({"ranking": n, "kept": k, "faithfulness": f} for n, k, f in rows),
            {"ranking": sufficiency.LEARNED, "kept": 0.2, "faithfulness": 0.9, "price": 3.0},
            {"ranking": sufficiency.LEARNED, "kept": 0.1, "faithfulness": 0.5, "price": 9.0},
            {"ranking": sufficiency.LEARNED, "precision": 0.75, "recall": 0.5},
        ]
    ).assign(model="m", label="t", seed=0)
    page = sufficiency.summary(table).set_index("kept by")
    by_hand = 0.05 * 0.5 + 0.1 * 0.7 + 0.8 * 0.95
    assert page.loc[sufficiency.LEARNED, "CPR"] == pytest.approx(by_hand, abs=1e-3)
    assert page["kept for 0.9"].to_dict() == {"margin": "100.0%", sufficiency.LEARNED: "20.0%"}
    assert page["precision"].to_dict() == {"margin": "", sufficiency.LEARNED: "75.0%"}
    assert "20.0% for t, where the best ranking (margin) takes 100%" in sufficiency.text(table)
    lines = {line.name: line for line in sufficiency.figure(table).data}
    assert list(lines[sufficiency.LEARNED].x) == [0.1, 0.2, 1.0]
    assert list(lines[sufficiency.LEARNED].y) == [0.5, 0.9, 1.0]
