"""Indirect object identification: what a prompt says, and the metric that goes with it."""

import re
from collections import Counter

import pytest
import torch
from tiny_models import dataset

import eigenlens as el
from eigenlens.metrics import logit_diff, wrong_candidates


def names(example):
    """The names of a prompt in order: every capitalised word that is a candidate."""
    words = re.findall(r"\w+", example["prompt"])
    return [word for word in words if f" {word}" in example["candidates"]]


def test_the_name_that_comes_once_is_right():
    task = el.load_task("ioi", seed=5)
    assert (len(task.train), len(task.validation), len(task.test)) == (200, 100, 100)
    for split in (task.train, task.validation, task.test):
        orders = Counter()
        for example in split:
            first, second, again = names(example)
            assert first != second
            assert again in (first, second)
            assert example["answer"] == f" {second if again == first else first}"
            assert sorted(example["candidates"]) == sorted([f" {first}", f" {second}"])
            orders["ABBA" if again == second else "BABA"] += 1
        assert orders["ABBA"] == orders["BABA"]
        # Neither the place in the prompt nor that in the list of candidates tells the answer.
        at_first = sum(e["candidates"][0] == e["answer"] for e in split)
        assert 0.3 < at_first / len(split) < 0.7


@pytest.mark.parametrize("order", ["ABBA", "BABA"])
def test_one_order(order):
    for example in el.load_task("ioi", order=order, n_train=20).train:
        first, second, again = names(example)
        assert again == {"ABBA": second, "BABA": first}[order]


def test_pairs_of_names_are_in_one_split():
    task = el.load_task("ioi", n_train=600, n_validation=300, n_test=325)
    pairs = [frozenset(names(e)) for s in (task.train, task.validation, task.test) for e in s]
    assert len(set(pairs)) == 1225
    assert task.hash == el.load_task("ioi", n_train=600, n_validation=300, n_test=325).hash
    assert task.hash != el.load_task("ioi", n_train=600, n_validation=300, n_test=325, seed=1).hash
    with pytest.raises(ValueError, match=r"1226 examples .* 1225 pairs"):
        el.load_task("ioi", n_train=600, n_validation=300, n_test=326)
    with pytest.raises(ValueError, match="order"):
        el.load_task("ioi", order="BAAB")


def with_candidates(rows):
    plain = dataset([(prompt, answer) for prompt, answer, _ in rows]).remove_columns("candidates")
    return plain.add_column("candidates", [candidates for *_, candidates in rows])


def test_logit_difference_by_hand(tiny):
    model = tiny("gpt2")
    data = with_candidates(
        [("1 + 2 =", " 3", [" 3", " 4"]), ("7 + 7 + 7 =", " 21 5", [" 20 5", " 21 5"])]
    )
    wrong = wrong_candidates(data, model.tokenizer)
    assert wrong.tolist() == [model.tokenizer.convert_tokens_to_ids(t) for t in ("4", "20")]
    differences = []
    for example, other in zip(data, wrong, strict=True):
        prompt = torch.tensor([model.tokenizer.encode(example["prompt"], add_special_tokens=False)])
        right = model.tokenizer.encode(example["answer"], add_special_tokens=False)[0]
        with torch.no_grad():
            last = model.original_model(prompt).logits[0, -1]
        differences.append(float(last[other] - last[right]))
    spectra = el.decompose(model, ("W_out",), progress=False)
    found = []

    def metric(logits, batch):
        values = logit_diff(wrong)(logits, batch)
        found.extend(zip(batch.indices, values.tolist(), strict=True))
        return values

    el.score(model, spectra, data, metric=metric, progress=False)
    assert dict(found) == pytest.approx(dict(enumerate(differences)))


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ([" 3"], "needs two candidates"),
        ([" 3", " 4", " 5"], "needs two candidates"),
        ([" 4", " 5"], "needs two candidates"),
        (None, "needs two candidates"),
        ([" 3", " 3 1"], "begin with the same token"),
    ],
)
def test_no_logit_difference(candidates, message, tiny):
    data = with_candidates([("1 + 2 =", " 3", candidates)])
    with pytest.raises(ValueError, match=f"Example 0: .*{message}"):
        wrong_candidates(data, tiny("gpt2").tokenizer)
