"""Text that a model writes itself, and the price that it puts on components."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import MIXED

import eigenlens as el
from eigenlens.gates import Gates
from eigenlens.tasks.batches import make_batches
from eigenlens.tasks.own_text import OwnTextError, own_text

SIZES = {"n_examples": 12, "n_tokens": 9}


@pytest.fixture
def writer(tiny):
    return tiny("llama")


def test_own_text_is_drawn_by_its_seed_and_leaves_the_callers_random_numbers_alone(writer):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = own_text(writer, **SIZES)
    assert torch.equal(torch.rand(3), expected)
    assert own_text(writer, **SIZES).to_list() == first.to_list()
    assert own_text(writer, **SIZES, seed=1).to_list() != first.to_list()
    assert all(row["prompt"] and row["answer"] for row in first.to_list())


def test_own_text_is_read_as_it_was_sampled(writer, monkeypatch):
    """The tokens of a passage are those that ``generate`` gave, in the order it gave them."""
    seen = []
    generate = type(writer).generate

    def watched(model, *args, **kwargs):
        seen.append(generate(model, *args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(type(writer), "generate", watched)
    text = own_text(writer, **SIZES, seed=2)
    special = set(writer.tokenizer.all_special_ids)
    sampled = {tuple(t for t in row if t not in special) for row in seen[0].tolist()}
    for batch in make_batches(text, writer, 1):
        read = [*batch.tokens[0].tolist(), batch.answer[0, -1].item()]
        assert tuple(t for t in read if t not in special) in sampled


def test_a_toy_has_no_text_of_its_own(writer, monkeypatch):
    with pytest.raises(OwnTextError, match="A context of 8 tokens"):
        own_text(el.load_model("arith-tiny"))
    with pytest.raises(ValueError, match="0 passages of 9 tokens"):
        own_text(writer, n_examples=0, n_tokens=9)
    monkeypatch.setattr(type(writer.tokenizer), "decode", lambda *args: "+ x")
    with pytest.raises(OwnTextError, match="0 of 12 passages are read"):
        own_text(writer, **SIZES)


@pytest.mark.parametrize("reference", ["shared", "mean"])
def test_predicted_harm_is_half_the_mean_square_of_the_slopes_of_single_passages(writer, reference):
    """With the means as they are, and moved: gates on the moved means are the independent truth."""
    scores = el.score(
        writer, el.decompose(writer, progress=False), MIXED, reference=reference, progress=False
    )
    text = own_text(writer, **SIZES)
    protect = el.Protection(writer, {"own": text})
    batches = make_batches(text.select(range(0, len(text), 2)), writer, 1)
    n_tokens = sum(int(batch.answer_mask.sum()) for batch in batches)

    def half_square(shift):
        moved = replace(scores, means=scores.means.shifted(shift.numpy()))
        with Gates(writer, moved) as gates:
            slopes = torch.stack([gates.gradient(batch)[1] for batch in batches]).double()
        return slopes.square().sum(0) / 2 / n_tokens

    harm = protect.harm(scores, progress=False)
    best = harm.best_shift()
    found = {}
    for shift in (torch.zeros_like(best), best, best + 0.1, best - 0.1):
        found[shift] = half_square(shift)
        torch.testing.assert_close(harm.at(shift), found[shift], rtol=1e-6, atol=1e-12)
    at_zero, least, above, below = found.values()
    assert (least <= torch.minimum(above, below) + 1e-12).all()
    assert least.sum() < 0.9 * at_zero.sum()
    assert at_zero.max() > 0


@pytest.mark.slow
def test_an_open_gate_costs_its_price(writer):
    """With prices alone, gates that harm nothing open and those that harm stay shut."""
    scores = el.score(
        writer, el.decompose(writer, progress=False), MIXED, reference="shared", progress=False
    )
    text = own_text(writer, **SIZES)
    free = el.LearnedConfig(steps=60, lr=0.3, sparsity=0.0, dropout=0.0, batch_size=5)
    data = (writer, scores, MIXED, MIXED, free)
    opened = []
    for price in (0.0, 0.01):
        protect = el.Protection(writer, {"own": text}, price=price, weight=0.0, bound=100.0)
        opened.append(el.learned(*data, protect=protect, progress=False).frozen)
    assert len(opened[1]) > 0
    harm = protect.harm(scores, progress=False)
    prices = harm.at(harm.best_shift()).numpy()
    means = [prices[[_row(scores, c) for c in f.components.itertuples()]].mean() for f in opened]
    assert means[1] < means[0]


def _row(scores, component):
    same = (
        scores.components[["layer", "matrix", "head", "index"]]
        == [component.layer, component.matrix, component.head, component.index]
    ).all(axis=1)
    return int(np.flatnonzero(same)[0])
