"""Tasks: prompts to the letter, disjoint splits, tokens that spell the text."""

import pytest
import torch
from tiny_models import MIXED, dataset

import eigenlens as el
from eigenlens.tasks import UnknownTaskError, make_batches
from eigenlens.tasks.batches import tokenise


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
