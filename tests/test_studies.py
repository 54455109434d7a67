"""Studies on a small scale: what is measured is measured, and finished parts are not made again."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pandas as pd
import pytest
from typer.testing import CliRunner

import eigenlens as el
from eigenlens.cli import app
from eigenlens.paper import studies
from eigenlens.paper.studies import estimators, figures, searches
from eigenlens.paper.studies.parts import Parts
from eigenlens.statistics import wilson_interval

SMALL = {"n_train": 40, "n_validation": 20, "n_test": 30}


def test_parts_are_made_once(tmp_path):
    parts = Parts(tmp_path)
    assert parts.do("one", lambda: [{"a": 1}]) == [{"a": 1}]
    assert Parts(tmp_path).do("one", lambda: pytest.fail("made again")) == [{"a": 1}]
    assert parts.do("two", lambda: [{"a": None}]) == [{"a": None}]


def test_an_interrupted_part_leaves_nothing(tmp_path):
    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Parts(tmp_path).do("one", fail)
    assert list(tmp_path.iterdir()) == []


def counting(search, spent):
    """The search, with the training examples that it runs put into ``spent`` pass by pass.

    A backward pass counts as two; batches of the size of the validation split are no training.
    """

    def count(module, args, logits):
        if len(logits) != SMALL["n_validation"] or logits.requires_grad:
            spent.append(len(logits) * (3 if logits.requires_grad else 1))

    def run(model, base, task):
        handle = model.unembed.register_forward_hook(count)
        try:
            return search(model, base, task)
        finally:
            handle.remove()

    return run


def test_searches_reports_the_test_accuracy_of_the_chosen_set(tmp_path, monkeypatch):
    setting = replace(
        searches.SETTINGS[0],
        arguments={"reading": "product", **SMALL},
        seeds=(0,),
        methods=("one-shot", "guarded"),
    )
    monkeypatch.setattr(searches, "SETTINGS", (setting,))
    spent = []
    short = partial(searches._guarded, 1 / 40)
    monkeypatch.setitem(searches._SEARCHES, "guarded", counting(short, spent))
    found = searches.run(models=("arith-tiny",), parts=tmp_path)
    final = found.table[found.table["step"] == -1].set_index("method")
    assert list(final.index) == ["before", "one-shot", "guarded"]
    model = el.load_model("arith-tiny", device="cpu")
    task = el.load_task("ambiguous", model.tokenizer, reading="product", seed=0, **SMALL)
    before = el.evaluate(model, task.test)
    assert final.loc["before", "test_right"] == before.examples["correct"].sum()
    scores = el.score(
        model, el.decompose(model, progress=False), task.train, criterion="fisher", progress=False
    )
    chosen = el.one_shot(model, scores, task.validation)
    with el.freeze(model, chosen.frozen):
        after = el.evaluate(model, task.test)
    assert final.loc["one-shot", "test_right"] == after.examples["correct"].sum()
    assert final.loc["one-shot", "components"] == len(chosen.frozen)
    assert len(spent) > 5
    scoring = 4 * SMALL["n_train"]  # before the search: forward for the means, forward, backward
    passes = (scoring + sum(spent)) / SMALL["n_train"]
    assert final.loc["guarded", "passes"] == pytest.approx(passes)
    low, high = wilson_interval(int(after.examples["correct"].sum()), after.n)
    stated = found.summary.set_index("method").loc["one-shot", "test accuracy"]
    assert f"({low:.1%} … {high:.1%})" in stated
    monkeypatch.setattr(searches, "_measure", lambda *a: pytest.fail("measured again"))
    assert searches.run(models=("arith-tiny",), parts=tmp_path).table.equals(found.table)


@pytest.mark.slow
def test_estimators_are_judged_by_exact_effects(tmp_path, monkeypatch):
    setting = replace(
        estimators.SETTINGS[0],
        arguments={"reading": "product", **SMALL},
        n_examples=20,
        n_components=40,
        seeds=(0,),
    )
    monkeypatch.setattr(estimators, "SETTINGS", (setting,))
    found = estimators.run(models=("arith-tiny",), parts=tmp_path)
    overall = found.table[found.table["stratum"] == "all"].set_index("estimator")
    assert overall.loc["refined", "spearman"] > overall.loc["max", "spearman"]
    assert overall.loc["margin", "spearman"] > overall.loc["max", "spearman"]
    assert {"released code", "… without any", "released code with fine-tuning"} <= set(
        overall.index
    )
    monkeypatch.setattr(estimators, "_measure", lambda *a: pytest.fail("measured again"))
    again = estimators.run(models=("arith-tiny",), parts=tmp_path)
    assert again.summary.equals(found.summary)


def test_all_runs_every_study_and_says_how_long(monkeypatch, tmp_path):
    made = []

    def result(name):
        made.append(name)
        return SimpleNamespace(
            save=lambda folder: (folder / name).touch(), summary=pd.DataFrame({"study": [name]})
        )

    named = {name: SimpleNamespace(MINUTES=90, run=lambda name=name: result(name)) for name in "ab"}
    monkeypatch.setattr(studies, "EXPERIMENTS", named)
    monkeypatch.setattr(figures, "write_index", lambda folder: (folder / "index").touch())
    found = CliRunner().invoke(app, ["experiment", "all", "--out", str(tmp_path)])
    assert found.exit_code == 0, found.output
    assert made == ["a", "b"]
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "index"}
    assert "About 3 hours on 2 cores" in found.output
    refused = CliRunner().invoke(app, ["experiment", "all", "--model", "arith-tiny"])
    assert refused.exit_code == 2
    assert "drop --model" in refused.output
    assert made == ["a", "b"]
