"""Measurements against the transformers model and hand computation."""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from tiny_models import MIXED, dataset, in_families

import eigenlens as el
from eigenlens.evaluation import majority_accuracy
from eigenlens.provenance import Provenance
from eigenlens.statistics import paired_interval, wilson_interval
from eigenlens.tasks.batches import make_batches


def evaluation(correct, loss):
    n = len(correct)
    table = pd.DataFrame(
        {"prompt": [f"p{i}" for i in range(n)], "answer": "a", "loss": loss, "correct": correct}
    )
    return el.Evaluation(table, Provenance(model="m", model_fingerprint="f", versions={}))


@in_families(["gpt2", "llama", "bloom", "opt"])
def test_losses_are_those_of_the_transformers_model(tiny, family):
    model = tiny(family)
    found = el.evaluate(model, MIXED, batch_size=5).examples
    for row, example in enumerate(MIXED):
        prompt = model.tokenizer.encode(example["prompt"], add_special_tokens=False)
        answer = model.tokenizer.encode(example["answer"], add_special_tokens=False)
        with torch.no_grad():
            logits = model.original_model(torch.tensor([prompt + answer])).logits[0]
        predicting = logits[len(prompt) - 1 : -1]
        loss = F.cross_entropy(predicting, torch.tensor(answer), reduction="sum")
        assert found["loss"][row] == pytest.approx(float(loss), rel=1e-9)
        assert found["correct"][row] == (predicting.argmax(-1).tolist() == answer)
        assert found["predicted"][row] == model.tokenizer.decode(predicting.argmax(-1))


def test_exact_match_is_what_greedy_generation_writes(tiny):
    model = tiny("llama")
    prompts = [f"{a} + 2 =" for a in range(6)]
    written = []
    for prompt in prompts:
        tokens = torch.tensor([model.tokenizer.encode(prompt, add_special_tokens=False)])
        out = model.generate(
            tokens, max_new_tokens=3, do_sample=False, verbose=False, stop_at_eos=False
        )
        written.append(" " + model.tokenizer.decode(out[0, -3:]))
    right = el.evaluate(model, dataset(list(zip(prompts, written, strict=True))))
    assert right.accuracy == 1.0
    wrong = [" ".join([*w.split()[:2], "40" if w.split()[2] != "40" else "41"]) for w in written]
    assert (
        el.evaluate(
            model, dataset(list(zip(prompts, [f" {w}" for w in wrong], strict=True)))
        ).accuracy
        == 0.0
    )


def test_choice_accuracy_takes_the_likeliest_candidate(tiny):
    model = tiny("gpt2")
    data = dataset([("1 + 2 =", " 3"), ("4 + 4 =", " 8 1")])
    data = data.remove_columns("candidates").add_column(
        "candidates", [[" 3", " 4 4"], [" 7", " 8 1"]]
    )
    found = el.evaluate(model, data)
    for row, example in enumerate(data):
        losses = [
            el.evaluate(model, dataset([(example["prompt"], text)])).loss
            for text in example["candidates"]
        ]
        likeliest = example["candidates"][int(np.argmin(losses))]
        assert found.examples["choice"][row] == likeliest
        assert found.examples["choice_correct"][row] == (likeliest == example["answer"])
    assert found.choice_interval is not None
    assert el.evaluate(model, MIXED).choice_accuracy is None
    broken = data.remove_columns("answer").add_column("answer", [" 9", " 7"])
    with pytest.raises(ValueError, match="Example 0: the answer ' 9' is not among"):
        el.evaluate(model, broken)


def with_candidates(rows, candidates):
    return dataset(rows).remove_columns("candidates").add_column("candidates", candidates)


@pytest.mark.parametrize("nothing", [None, []])
def test_examples_without_candidates_count_for_nothing(nothing, tiny, tmp_path):
    """4 of 10 examples have candidates: mean and interval are over these four."""
    model = tiny("gpt2")
    rows = [(f"{a} + 2 =", f" {a + 2}") for a in range(10)]
    some = [[f" {a + 2}", f" {a + 20}"] if a % 3 == 0 else nothing for a in range(10)]
    found = el.evaluate(model, with_candidates(rows, some))
    four = el.evaluate(model, with_candidates(rows[::3], some[::3]))
    assert (found.choice_n, four.choice_n, found.n) == (4, 4, 10)
    assert found.choice_accuracy == four.choice_accuracy
    right = int(four.examples["choice_correct"].sum())
    assert found.choice_interval == four.choice_interval == wilson_interval(right, 4)
    assert found.summary()["choice_n"] == 4
    assert found.examples["choice"].notna().tolist() == [a % 3 == 0 for a in range(10)]
    found.save(tmp_path / "e.parquet")
    again = el.Evaluation.load(tmp_path / "e.parquet")
    assert again.examples.equals(found.examples)
    assert again.summary() == found.summary()
    none = el.evaluate(model, with_candidates(rows, [nothing] * 10))
    assert none.choice_accuracy is none.choice_interval is None
    assert "choice_n" not in none.summary()


@pytest.mark.parametrize("same", [[" 3", " 3"], [" 3", "  3"], [" 3", " 98", " 99"]])
def test_candidates_that_are_the_same_tokens_are_refused(same, tiny):
    """' 98' and ' 99' are no words of this tokenizer: both are unknown."""
    model = tiny("gpt2")
    data = with_candidates([("4 + 4 =", " 8"), ("1 + 2 =", " 3")], [[" 8", " 7"], same])
    with pytest.raises(
        ValueError, match=rf"Example 1: .*{same[-2]!r} and {same[-1]!r} are the sam"
    ):
        el.evaluate(model, data)
    assert el.evaluate(model, data, choices=False).choice_accuracy is None


def test_bad_candidates_are_named_by_example(tiny):
    model = tiny("gpt2")
    rows = [("4 + 4 =", " 8"), ("1 + 2 =", " 3"), ("1 + 3 =", " 4")]
    long = " 3" + " + 1" * 16
    data = with_candidates(rows, [[" 8", " 7", " 6"], None, [" 4", long]])
    with pytest.raises(ValueError, match="Example 2 has 36 tokens to read"):
        el.evaluate(model, data)
    with pytest.raises(ValueError, match="Example 0: the candidates must be a list"):
        el.evaluate(model, with_candidates(rows, [" 8", None, " 4"]))
    with pytest.raises(ValueError, match="Example 2: the answer ' ' tokenises to nothing"):
        el.evaluate(model, with_candidates(rows, [[" 8", " 7"], None, [" 4", " "]]))


@in_families(["gpt2", "llama"])
def test_perplexity_is_that_of_the_transformers_model(tiny, family):
    model = tiny(family)
    nats, n_tokens = 0.0, 0
    for example in MIXED:
        prompt = model.tokenizer.encode(example["prompt"], add_special_tokens=False)
        answer = model.tokenizer.encode(example["answer"], add_special_tokens=False)
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            mean = model.original_model(torch.tensor([prompt + answer]), labels=labels).loss
        nats, n_tokens = nats + float(mean) * len(answer), n_tokens + len(answer)
    # Answers of different lengths: every token counts alike, whatever the batches.
    for batch_size in (1, 3, 50):
        found = el.perplexity(model, MIXED, batch_size=batch_size)
        assert found == pytest.approx(np.exp(nats / n_tokens), rel=1e-9)
    assert el.evaluate(model, MIXED).token_loss == pytest.approx(nats / n_tokens, rel=1e-9)


def test_majority_accuracy_by_hand():
    def answers(*texts):
        return dataset([("p", text) for text in texts])

    train = answers(" b", " a", " c", " a", " b", " a")
    assert majority_accuracy(train, answers(" a", " b", " a", " d")) == 0.5
    assert majority_accuracy(train, answers(" b")) == 0.0
    assert majority_accuracy(answers(" b", " a"), answers(" b", " b", " a")) == 2 / 3  # a tie
    with pytest.raises(ValueError, match="both sides"):
        majority_accuracy(train, answers())


def test_comparison_by_hand():
    before = evaluation([True, False, False, False, True], [1.0, 2.0, 3.0, 4.0, 5.0])
    after = evaluation([True, True, True, True, False], [0.5, 1.0, 2.0, 1.0, 6.0])
    found = el.compare(before, after)
    assert (found.gained, found.lost, found.n) == (3, 1, 5)
    assert found.accuracy_change == pytest.approx(0.4)
    assert found.loss_change == pytest.approx(-0.9)
    assert found.p_value == pytest.approx(2 * (1 + 4) / 16)  # two-sided binomial, 3 of 4
    assert found.accuracy_interval == paired_interval(both=1, gained=3, lost=1, neither=0)
    low, high = found.loss_interval
    assert low < -0.9 < high
    shown = found._repr_html_()
    assert "3 became right, 1 wrong" in shown
    assert "+40.0%" in shown
    assert "-0.900 nats" in shown
    same = el.compare(before, before)
    assert (same.p_value, same.accuracy_change, same.loss_interval) == (1.0, 0.0, (0.0, 0.0))
    with pytest.raises(ValueError, match="same examples"):
        el.compare(before, evaluation([True], [1.0]))


def test_save_load_and_training_mode(tiny, tiny_folder, tmp_path):
    found = el.evaluate(tiny("gpt2"), MIXED)
    found.save(tmp_path / "e.parquet")
    again = el.Evaluation.load(tmp_path / "e.parquet")
    assert again.examples.equals(found.examples)
    assert again.summary() == found.summary()
    model = el.load_model(tiny_folder("gpt2"), device="cpu").train()
    with pytest.raises(ValueError, match="training mode"):
        el.evaluate(model, MIXED)


@pytest.mark.parametrize("measure", [el.evaluate, el.perplexity])
def test_a_loss_that_is_nan_is_no_wrong_answer(tiny, measure):
    model = tiny("gpt2")

    def spoil(value, hook):
        return value.index_fill(0, torch.tensor([0]), torch.nan)

    first = make_batches(MIXED, model, 50)[0].indices[0]
    with (
        model.hooks(fwd_hooks=[("unembed.hook_in", spoil)]),
        pytest.raises(ValueError, match=f"The loss of example {first} is NaN"),
    ):
        measure(model, MIXED)
