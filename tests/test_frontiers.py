"""Accuracy against harm: what is measured, what is on the frontier, what is chosen."""

from math import log

import numpy as np
import pandas as pd
import pytest
from tiny_models import EQUAL, MIXED

import eigenlens as el
from eigenlens.frontiers import on_frontier
from eigenlens.tasks import Task


@pytest.fixture
def measured(tiny):
    model = tiny("llama")
    scores = el.score(
        model, el.decompose(model, progress=False), EQUAL, reference="shared", progress=False
    )
    edits = {"few": el.select(scores, count=4), "many": el.select(scores, count=60)}
    task = Task("sums", EQUAL, EQUAL.select(range(4)), EQUAL.select(range(4, 6)))
    found = el.frontier(
        model,
        edits,
        task,
        MIXED.select(range(3)),
        MIXED.select(range(3, 5)),
        bound=0.01,
        strengths=(1.0, 0.5),
        progress=False,
    )
    return model, edits, task, found


def test_points_are_what_evaluation_gives_under_the_edit(measured):
    model, edits, task, found = measured
    row = found.table.query("edit == 'many' and strength == 0.5").iloc[0]
    text = MIXED.select(range(3))
    before = el.perplexity(model, text)
    with el.freeze(model, edits["many"].scaled(0.5)):
        expected = el.evaluate(model, task.validation, progress=False)
        after = el.perplexity(model, text)
    assert row["loss"] == pytest.approx(expected.loss)
    assert row["harm"] == pytest.approx(log(after / before))
    assert (row["components"], len(found.table)) == (60, 5)
    nothing = found.table.iloc[0]
    assert (nothing["edit"], nothing["components"], nothing["harm"]) == ("none", 0, 0.0)


def test_choice_is_within_the_bound_and_only_the_frontier_meets_the_test_split(measured):
    *_, found = measured
    table = found.table
    assert table["chosen"].sum() == 1
    assert found.chosen["harm"] <= 0.01
    within = table[table["harm"] <= 0.01]
    assert found.chosen["accuracy"] == within["accuracy"].max()
    shown = table["on_frontier"] | table["chosen"]
    assert table.loc[shown, "test_loss"].notna().all()
    assert table.loc[~shown, "test_loss"].isna().all()


def test_the_frontier_by_hand():
    table = pd.DataFrame(
        {"accuracy": [0.0, 0.5, 0.5, 0.9, 0.4], "harm": [0.0, 0.1, 0.2, 0.3, 0.05]}
    )
    assert on_frontier(table).tolist() == [True, True, False, True, True]
    assert on_frontier(table.iloc[[1, 1]]).all()


def test_round_trip_drawing_and_wrong_input(measured, tmp_path):
    model, edits, task, found = measured
    found.save(tmp_path / "frontier.parquet")
    back = el.Frontier.load(tmp_path / "frontier.parquet")
    pd.testing.assert_frame_equal(back.table, found.table)
    assert back.bound == found.bound
    figure = el.plots.frontier(back)
    assert [trace.name for trace in figure.data][:2] == ["few, validation", "few, test"]
    assert figure.layout.xaxis.title.text.endswith("(nats per token)")
    with pytest.raises(ValueError, match="0 edits"):
        el.frontier(model, {}, task, MIXED, MIXED)
    with pytest.raises(ValueError, match=r"strengths \(2\.0,\)"):
        el.frontier(model, edits, task, MIXED, MIXED, strengths=(2.0,))
    with pytest.raises(ValueError, match="strength=-1"):
        edits["few"].scaled(-1.0)
    half = edits["few"].scaled(0.5).scaled(0.5).components["strength"]
    np.testing.assert_allclose(half, 0.25)
