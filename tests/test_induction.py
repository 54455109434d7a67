"""Copying in context: what a prompt says, and the heads that are found for it."""

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import EQUAL, TYPICAL

import eigenlens as el
from eigenlens.frozen_set import FrozenSet
from eigenlens.paper.studies import induction
from eigenlens.paper.studies.by_split import Split
from eigenlens.paper.studies.config import Data
from eigenlens.tasks import make_batches


@pytest.mark.parametrize("options", [{}, {"n_words": 3, "n_lists": 1}, {"n_words": 30, "seed": 7}])
def test_the_answer_is_what_followed_the_last_word_before(options):
    task = el.load_task("induction", **options)
    lists = set()
    for row in [*task.train, *task.validation, *task.test]:
        words = row["prompt"].split()
        seen = [i for i, word in enumerate(words[:-1]) if word == words[-1]]
        assert len(seen) == options.get("n_lists", 2)
        assert {f" {words[i + 1]}" for i in seen} == {row["answer"]}
        *same, other = row["corrupt"].split()
        assert same == words[:-1]
        assert other not in words
        lists.add(tuple(words[: options.get("n_words", 16)]))
    assert len(lists) == 400  # none is in two splits
    again = el.load_task("induction", **{**options, "seed": 8})
    assert not lists & {
        tuple(row["prompt"].split()[: options.get("n_words", 16)]) for row in again.test
    }


def test_a_list_needs_words():
    with pytest.raises(ValueError, match="n_words"):
        el.load_task("induction", n_words=2)
    with pytest.raises(ValueError, match="n_words"):
        el.load_task("induction", n_words=10_000)


@pytest.fixture
def scored(tiny):
    model = tiny("llama")
    spectra = el.decompose(model, ["W_O"], progress=False)
    options = {"criterion": "mean", "reference": "shared", "batch_size": 3, "progress": False}
    return model, el.score(model, spectra, EQUAL, **options)


def test_the_score_of_a_head_is_the_slope_of_freezing_it(scored):
    """By finite differences, all that a head writes being moved towards its mean at once."""
    model, scores = scored
    unedited = el.evaluate(model, EQUAL, choices=False, progress=False).loss
    heads = induction.of_heads(scores)
    assert len(heads) == model.cfg.n_layers * model.cfg.n_heads
    step = 1e-3
    for head in heads.itertuples():
        rows = np.flatnonzero(
            (scores.components["layer"] == head.layer) & (scores.components["head"] == head.head)
        )
        assert len(rows) == model.cfg.d_head

        def loss(strength, rows=rows):
            frozen = FrozenSet.from_scores(scores, rows, strength)
            with el.freeze(model, frozen):
                return el.evaluate(model, EQUAL, choices=False, progress=False).loss

        # The slope at the end of an interval, to second order.
        slope = (4 * loss(step) - loss(2 * step) - 3 * unedited) / (2 * step)
        assert head.score == pytest.approx(slope, rel=1e-3, abs=1e-7)


def test_frozen_heads_write_their_means(scored):
    """By a hook of our own on what each head gives to W_O."""
    model, scores = scored
    heads = pd.DataFrame({"layer": [0, 1], "head": [2, 1]})
    frozen = induction.heads_frozen(scores, heads)
    (batch,) = make_batches(EQUAL, model, len(EQUAL))
    n = batch.n_prompt + batch.answer.shape[-1] - 1  # the last answer token is not read
    sites = [scores.spectra[f"blocks.{layer}.W_O"].site for layer in (0, 1)]
    held = {}

    def mean_of(site, head):
        def hook(value, hook):
            z = value.clone().view(*value.shape[:2], site.n_heads, site.width)
            z[:, :, head] = held[site.name][:, :n, head].mean((0, 1))
            return z.view(value.shape)

        return site.hook, hook

    def keep(site):
        def hook(value, hook):
            held[site.name] = value.view(*value.shape[:2], site.n_heads, site.width)

        return site.hook, hook

    with torch.no_grad():
        with model.hooks(fwd_hooks=[keep(site) for site in sites]):
            model(batch.tokens)
        with el.freeze(model, frozen):
            edited = model(batch.tokens)
        edits = [mean_of(site, head) for site, head in zip(sites, heads["head"], strict=True)]
        with model.hooks(fwd_hooks=edits):
            expected = model(batch.tokens)
    torch.testing.assert_close(edited, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", TYPICAL)
def test_attention_on_what_followed_by_hand(tiny, family):
    model = tiny(family)
    rows = EQUAL.select([0, 0, 0]).to_list()
    for row, prompt in zip(rows, ("1 2 3 1 2", "4 4 4 5", "7 1 7 1 7"), strict=True):
        row["prompt"] = prompt
    data = EQUAL.from_list(rows, features=EQUAL.features)
    task = el.Task("copy", data, data, data, {})
    found = induction.attention_to_what_followed(model, task)
    expected = torch.zeros(model.cfg.n_layers, model.cfg.n_heads)
    for row in rows:
        tokens = model.to_tokens(row["prompt"])
        _, cache = model.run_with_cache(tokens)
        n = tokens.shape[-1]
        for layer in range(model.cfg.n_layers):
            pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0]
            for head in range(model.cfg.n_heads):
                on = sum(
                    float(pattern[head, t, s + 1])
                    for t in range(n)
                    for s in range(t)
                    if tokens[0, s] == tokens[0, t]
                )
                expected[layer, head] += on / float(pattern[head].sum()) / len(rows)
    np.testing.assert_allclose(found, expected.numpy().ravel(), atol=2e-3)  # TransformerLens rounds
    assert found.max() > 0.01


def test_the_study_shows_what_it_measured(tiny):
    model = tiny("llama")
    task = el.Task("equal", EQUAL, EQUAL, EQUAL, {})
    config = induction.InductionStudyConfig(
        models=("tiny",), tasks={"x": Data(task="induction")}, k=(1, 2), draws=2
    )
    split = Split(model, task, "tiny", "x", config.tasks["x"], 0)
    table = pd.DataFrame({**split.names, **row} for row in induction._measure(split, config))
    heads, frozen = table[table["what"] == "head"], table[table["what"] == "frozen"]
    assert len(heads) == 8
    assert len(frozen) == 1 + 2 * (1 + 1 + 2)
    unedited = el.evaluate(model, EQUAL, progress=False).loss
    assert frozen[frozen["k"] == 0]["loss"].tolist() == pytest.approx([unedited])
    scores = el.score(
        model,
        el.decompose(model, ["W_O"], progress=False),
        EQUAL,
        criterion="mean",
        reference="shared",
        progress=False,
    )
    best = heads.nlargest(2, "score")
    with el.freeze(model, induction.heads_frozen(scores, best)):
        loss = el.evaluate(model, EQUAL, progress=False).loss
    measured = frozen[(frozen["by"] == "score") & (frozen["k"] == 2)]["loss"]
    assert measured.tolist() == pytest.approx([loss])
    (row,) = induction.summary(table).to_dict("records")
    assert row["without 2: by score / look / random"].startswith(f"{loss:.2f} / ")
    assert f"the loss of {unedited:.2f} becomes {loss:.2f} by score" in induction.text(table)
    drawn = induction.figure(table)
    (dots,) = [t for t in drawn.data if t.mode == "markers"]
    assert sorted(dots.y) == pytest.approx(sorted(heads["score"]))


def test_the_page_says_where_the_finding_shows():
    rows = []
    for model, random in (("one", (1.0, 2.9)), ("other", (1.0, 3.1))):
        names = {"model": model, "seed": 0}
        for i in range(20):  # the last ten score highest, every other one of them looks
            head = {"layer": 0, "head": i, "score": i, "attention": i if i % 2 else -i}
            rows.append({**names, "what": "head", **head})
        rows.append({**names, "what": "frozen", "by": "none", "k": 0, "draw": 0, "loss": 0.5})
        measured = [
            ("score", 0, 3.0),
            ("attention", 0, 4.0),
            *(("random", *r) for r in enumerate(random)),
        ]
        for by, draw, loss in measured:
            rows.append({**names, "what": "frozen", "by": by, "k": 8, "draw": draw, "loss": loss})
    said = induction.text(pd.DataFrame(rows))
    assert "costs more than losing any random ones in one, and" in said
    assert "some random heads costs as much in other." in said
    assert "one: of the 10 heads with the highest scores 5.0 are among the 10" in said
    assert "becomes 3.00 by score, 4.00 by where they look, 1.00 to 2.90 random" in said
