"""Clean and corrupt pairs: what tasks provide, and what the reference `pair` patches in."""

import json
import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_models import EQUAL, MIXED, in_families

import eigenlens as el
from eigenlens.exact import exact_effects
from eigenlens.metrics import answer_logits, answer_loss
from eigenlens.tasks import make_batches

PAIRED = EQUAL.add_column("corrupt", [EQUAL[(i + 1) % 6]["prompt"] for i in range(6)])
# Different lengths, so that pairs are padded.
LONG = MIXED.add_column(
    "corrupt",
    ["5 x 2 =", "8 + 3 x 9 =", "1 + 2 + 7 + 30 =", "8 + 2 =", "+ 9 x 1 + 4 ="],
)


def quiet(model, spectra, data, **options):
    return el.score(model, spectra, data, progress=False, **options)


@pytest.mark.parametrize("name", ["int_add", "int_mult", "ambiguous"])
def test_arithmetic_counterparts_have_as_many_digits_and_another_answer(name):
    task = el.load_task(name, high=30, seed=3)
    compute = {"int_add": int.__add__}.get(name, int.__mul__)
    for split in (task.train, task.validation, task.test):
        prompts = set(split["prompt"])
        for row in split:
            assert row["corrupt"] in prompts  # no prompt of another split is seen
            (a, b), (c, d) = (
                map(int, re.findall(r"\d+", row[side])) for side in ("prompt", "corrupt")
            )
            assert re.sub(r"\d", "0", row["prompt"]) == re.sub(r"\d", "0", row["corrupt"])
            assert row["answer"] == f" {compute(a, b)}" != f" {compute(c, d)}"


def test_a_prompt_without_like_has_no_counterpart():
    task = el.load_task("int_add", low=9, high=13, n_train=9, n_validation=3, n_test=4)
    rows = [*task.train, *task.validation, *task.test]
    (nine,) = [row for row in rows if row["prompt"] == "9 + 9 ="]
    assert nine["corrupt"] is None


def test_ioi_counterparts_have_a_third_name(tiny):
    for row in el.load_task("ioi", seed=2).train:
        clean, corrupt = (re.findall(r"\w+", row[side]) for side in ("prompt", "corrupt"))
        assert len(clean) == len(corrupt)
        ((at, was, now),) = [
            (i, a, b) for i, (a, b) in enumerate(zip(clean, corrupt, strict=True)) if a != b
        ]
        names = [c.strip() for c in row["candidates"]]
        assert was in names
        assert was != row["answer"].strip()
        assert now not in names
        assert was in clean[:at]  # its second mention


def test_arithmetic_pairs_are_token_aligned_on_the_shipped_model():
    model = el.load_model("arith-tiny", device="cpu")
    task = el.load_task("int_add", model.tokenizer, high=20, n_train=20)
    spectra = el.decompose(model, matrices=["W_V"], layers=[1], progress=False)
    scores = quiet(model, spectra, task.train, reference="pair")
    assert np.isfinite(scores.delta_loss).all()
    assert scores.delta_loss.any()


def test_jsonl_keeps_counterparts(tmp_path):
    rows = [
        {"prompt": f"p {i}", "answer": " a", "corrupt": f"q {i}"}
        if i % 2
        else {"prompt": f"p {i}", "answer": " a"}
        for i in range(10)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = el.load_task("jsonl", path=tmp_path / "rows.jsonl")
    assert {
        r["prompt"]: r["corrupt"] for s in (task.train, task.validation, task.test) for r in s
    } == {f"p {i}": f"q {i}" if i % 2 else None for i in range(10)}


@in_families(["gpt2", "llama"])
@pytest.mark.parametrize("data", [PAIRED, LONG], ids=["equal", "padded"])
def test_first_order_scores_are_the_slope_towards_the_counterpart(tiny, family, data):
    """Finite differences: activations moved a little towards those of the corrupt run, by hand."""
    model = tiny(family)
    spectra = el.decompose(model, progress=False)
    scores = quiet(model, spectra, data, reference="pair", batch_size=2)
    errors = quiet(model, spectra, data, reference="pair", batch_size=4, stderr=True)
    np.testing.assert_allclose(scores.delta_loss, errors.delta_loss, rtol=1e-8, atol=1e-11)
    step = 1e-5
    for row in np.argsort(-np.abs(scores.delta_loss))[::97]:
        moved = _moved(model, spectra, scores, row, data, step)
        assert moved / step == pytest.approx(scores.delta_loss[row], rel=1e-3, abs=1e-6)


def _moved(model, spectra, scores, row, data, strength):
    """Mean rise of the loss with one component's coordinate moved towards its counterpart's."""
    c = scores.components.iloc[row]
    s = spectra[f"blocks.{c['layer']}.{c['matrix']}"]
    direction = s.read[c["head"], :, c["index"]]
    changes = []
    for example in data:
        (own,), (other,) = (
            make_batches(
                Dataset.from_dict({"prompt": [example[side]], "answer": [example["answer"]]}),
                model,
                1,
            )
            for side in ("prompt", "corrupt")
        )
        seen = []

        def keep(value, hook, seen=seen):
            seen.append(value)

        def move(value, hook, seen=seen):
            h, goal = (
                v.reshape(*v.shape[:2], s.site.n_heads, s.site.width).clone()
                for v in (value, seen[0])
            )
            away = (goal - h)[:, :, c["head"]] @ direction
            h[:, :, c["head"]] += strength * away[..., None] * direction
            return h.reshape(value.shape)

        with torch.no_grad():
            before = answer_loss(answer_logits(model, own), own)
            with model.hooks(fwd_hooks=[(s.site.hook, keep)]):
                answer_logits(model, other)
            with model.hooks(fwd_hooks=[(s.site.hook, move)]):
                after = answer_loss(answer_logits(model, own), own)
        changes.append(float(after - before))
    return np.mean(changes)


def test_exact_effects_patch_the_counterpart_in(tiny):
    model = tiny("llama")
    spectra = el.decompose(model, progress=False)
    scores = quiet(model, spectra, LONG, reference="pair", batch_size=2)
    rows = np.argsort(-np.abs(scores.delta_loss))[::150]
    exact = exact_effects(model, scores, rows, LONG, batch_size=3, progress=False).mean(1)
    by_hand = [_moved(model, spectra, scores, row, LONG, 1.0) for row in rows]
    np.testing.assert_allclose(exact, by_hand, rtol=1e-7, atol=1e-10)


def test_means_are_those_of_the_counterparts(tiny):
    model = tiny("llama")
    spectra = el.decompose(model, progress=False)
    corrupt = Dataset.from_dict({"prompt": PAIRED["corrupt"], "answer": PAIRED["answer"]})
    scores = quiet(model, spectra, PAIRED, reference="pair")
    expected = quiet(model, spectra, corrupt).means
    np.testing.assert_allclose(scores.means.values, expected.values, atol=1e-12)


def test_what_is_no_pair_is_refused(tiny):
    model = tiny("llama")
    spectra = el.decompose(model, matrices=["W_V"], progress=False)
    for data, message in (
        (EQUAL, "add a column 'corrupt'"),
        (EQUAL.add_column("corrupt", [None] * 6), "Example 0, '1 [+] 2 =', has no counterpart"),
        (EQUAL.add_column("corrupt", EQUAL["prompt"][:]), "Example 0.* has no counterpart"),
        (
            EQUAL.add_column("corrupt", ["7 + 7 ="] + ["1 + 2 + 3 ="] * 5),
            "Example 1.* has 4 tokens and its counterpart '1 [+] 2 [+] 3 =' 6",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            quiet(model, spectra, data, reference="pair")
