"""Tasks: prompts to the letter, disjoint splits, tokens that spell the text."""

from itertools import combinations

import pytest
import torch
from tiny_models import MIXED, dataset

import eigenlens as el
from eigenlens.tasks import UnknownTaskError, make_batches
from eigenlens.tasks.batches import tokenise

TENS = {"low": 10, "high": 30, "n_train": 300, "n_validation": 50, "n_test": 50}


def pairs(split):
    return {tuple(int(p) for p in prompt.split() if p.isdigit()) for prompt in split["prompt"]}


@pytest.mark.parametrize(("name", "sign"), [("int_add", "+"), ("int_mult", "x")])
def test_prompts_and_answers(name, sign):
    task = el.load_task(name, low=10, high=30, seed=3)
    assert (len(task.train), len(task.validation), len(task.test)) == (240, 80, 80)
    for example in task.train:
        a, s, b, equals = example["prompt"].split(" ")
        assert (s, equals) == (sign, "=")
        assert 10 <= int(a) < 30
        assert example["answer"] == f" {int(a) + int(b) if sign == '+' else int(a) * int(b)}"
        assert example["candidates"] == []


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sizes", [{}, {"n_train": 301, "n_validation": 50, "n_test": 49}])
def test_twins_are_on_the_same_side(seed, sizes):
    task = el.load_task("int_add", low=10, high=30, seed=seed, **sizes)
    splits = [pairs(s) for s in (task.train, task.validation, task.test)]
    for i, one in enumerate(splits):
        for other in splits[i + 1 :]:
            assert not one & other
            assert not one & {(b, a) for a, b in other}
    assert [len(s) for s in splits] == (list(sizes.values()) or [240, 80, 80])


@pytest.mark.parametrize(
    ("name", "sizes", "seeds"),
    [
        ("int_add", TENS, 8),
        ("int_mult", {"high": 20, "n_train": 200, "n_validation": 33, "n_test": 57}, 6),
        ("ambiguous", {"reading": "sum"}, 5),
        ("int_add", {"high": 20, "n_train": 198, "n_validation": 2, "n_test": 200}, 2),
        ("ioi", {}, 12),
        ("ioi", {"n_test": 700}, 1),
    ],
)
def test_seeds_are_tested_on_different_examples(name, sizes, seeds):
    tasks = [el.load_task(name, **sizes, seed=seed) for seed in range(seeds + 1)]
    words = [
        # two sentences about the same two people are no different examples
        [tuple(row["candidates"]) or row["prompt"] for row in task.test]
        for task in tasks
    ]
    for one, other in combinations(words[:seeds], 2):
        assert not set(one) & set(other)
    assert len(set(words[0])) == len(tasks[0].test)
    assert {len(one) for one in words} == {len(tasks[0].test)}
    assert set(words[seeds]) == set(words[0])  # then they begin again
    assert set(tasks[seeds].train["prompt"]) != set(tasks[0].train["prompt"])


# Numbers that are published were measured on these splits.
@pytest.mark.parametrize(
    ("name", "arguments", "published"),
    [
        ("int_add", TENS, "687c062bcf6e"),
        ("int_mult", {**TENS, "low": 0, "high": 20}, "e7592b5ed4d9"),
        ("ambiguous", {}, "878b75e608ae"),
        ("ioi", {}, "6d87eb34c070"),
    ],
)
def test_seed_0_stays_what_it_was(name, arguments, published):
    assert el.load_task(name, **arguments).hash[:12] == published


@pytest.mark.parametrize("name", ["int_add", "int_mult", "ambiguous"])
@pytest.mark.parametrize("seed", [0, 1, 2, 40])
def test_unseen_answers(name, seed):
    sizes = {"low": 10, "high": 30, "n_train": 250, "n_validation": 50, "n_test": 50}
    sizes |= {"reading": "sum"} if name == "ambiguous" else {}
    plain = el.load_task(name, **sizes, seed=seed)
    task = el.load_task(name, **sizes, seed=seed, unseen_answers=True)
    for split, size in ((task.train, 250), (task.validation, 50), (task.test, 50)):
        assert len(set(split["prompt"])) == len(split) == size
    learned_from = {*task.train["answer"], *task.validation["answer"]}
    assert not learned_from & set(task.test["answer"])
    assert not pairs(task.train) & {(b, a) for a, b in pairs(task.validation)}
    if name != "int_mult":  # what the plain split does not promise
        seen = {*plain.train["answer"], *plain.validation["answer"]}
        assert sum(answer in seen for answer in plain.test["answer"]) > 40


def test_unseen_answers_of_different_seeds():
    sizes = {"low": 10, "high": 30, "n_train": 200, "n_validation": 50, "n_test": 50}
    tests = [
        pairs(el.load_task("int_add", **sizes, seed=seed, unseen_answers=True).test)
        for seed in range(5)
    ]
    for one, other in combinations(tests, 2):
        assert not one & other


def test_unseen_answers_that_cannot_be_had():
    sizes = {"high": 7, "n_train": 20, "n_validation": 20, "n_test": 9}
    el.load_task("int_add", **sizes)
    with pytest.raises(ValueError, match=r"leaves 39 pairs .* 20 for train .* lower n_train"):
        el.load_task("int_add", **sizes, unseen_answers=True)


def test_defaults_and_seeds():
    add, mult = el.load_task("int_add"), el.load_task("int_mult")
    assert (len(add.train), len(add.validation), len(add.test)) == (300, 100, 100)
    assert max(max(p) for p in pairs(add.train)) > 90
    assert len(mult.test) == 80  # as many as the paper tested on
    assert add.hash == el.load_task("int_add").hash
    assert add.hash != el.load_task("int_add", seed=1).hash


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 5, "high": 6}, "at least"),
        ({"high": 10, "n_train": 99}, "100 pairs"),
        ({"hihg": 10}, "hihg"),
        ({"low": "ten"}, "low"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        el.load_task("int_add", **arguments)
    with pytest.raises(UnknownTaskError, match="int_sub"):
        el.load_task("int_sub")


def test_batches_spell_the_text(tiny):
    model = tiny("gpt2")
    seen = []
    for batch in make_batches(MIXED, model, 2):
        for row, index in enumerate(batch.indices):
            seen.append(index)
            example = MIXED[index]
            there = batch.attention_mask[row]
            read = model.tokenizer.decode(batch.tokens[row][there])
            answer = batch.answer[row][batch.answer_mask[row]]
            text = model.tokenizer.decode(answer)
            assert " " + text == example["answer"]
            full = f"{example['prompt']} {text}"
            assert model.tokenizer.decode(answer[-1:]) == full.removeprefix(read).strip()
            assert batch.positions[-1] == batch.answer.shape[1] - 2
            assert there[: batch.n_prompt].sum() == len(example["prompt"].split())
    assert sorted(seen) == list(range(len(MIXED)))


def test_beginning_of_sequence_follows_the_model(tiny):
    model = tiny("llama")
    plain, bos = (
        tokenise(MIXED, model.tokenizer),
        tokenise(MIXED, model.tokenizer, prepend_bos=True),
    )
    assert all(
        b.prompt == [model.tokenizer.bos_token_id, *p.prompt]
        for p, b in zip(plain, bos, strict=True)
    )
    assert model.cfg.default_prepend_bos is False
    model.cfg.default_prepend_bos = True
    try:
        (batch,) = make_batches(MIXED.select([0]), model, 1)
        assert torch.equal(batch.tokens, model.to_tokens(MIXED[0]["prompt"]))
    finally:
        model.cfg.default_prepend_bos = False


def test_nothing_to_predict(tiny):
    with pytest.raises(ValueError, match="Example 1: the answer ' ' tokenises to nothing"):
        tokenise(dataset([("1 =", " 2"), ("3 =", " ")]), tiny("gpt2").tokenizer)
