"""Tokens, prompts and names are shown letter by letter in figures and notebooks."""

import html
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from tiny_models import EQUAL, dataset

import eigenlens as el
from eigenlens.baselines.baseline import FitResult
from eigenlens.baselines.edits import NoEdit
from eigenlens.costs import Cost
from eigenlens.evaluation import Evaluation
from eigenlens.paper import plots as paper_plots
from eigenlens.paper.studies import views
from eigenlens.plots.style import plain
from eigenlens.provenance import Provenance
from eigenlens.tasks import Task

NASTY = "<s>1</s> <b>&lt; & <br>\"'"
PROVENANCE = Provenance(model="m", model_fingerprint="f", versions={})


@pytest.fixture(scope="module")
def found():
    """A search on one small map, and what it was made from."""
    model = el.load_model("arith-tiny", device="cpu")
    task = el.load_task("ambiguous", model.tokenizer, n_train=20, n_validation=9, n_test=9)
    spectra = el.decompose(model, ["W_V"], [0], progress=False)
    scores = el.score(model, spectra, task.train, progress=False)
    search = el.one_shot(model, scores, task.validation, fractions=(0.1,))
    circuit = el.circuit(model, scores, task.train, el.select(scores, count=3), progress=False)
    return scores, search, circuit


def texts(value) -> Iterator[str]:
    """Every text in a figure."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from texts(item)
    elif isinstance(value, list | tuple | np.ndarray):
        for item in value:
            yield from texts(item)


def shows(figure) -> bool:
    """Whether a figure shows the nasty text, and nowhere as markup."""
    written = list(texts(figure.to_plotly_json()))
    assert not [text for text in written if "<s>" in text or "<b>" in text]
    return any(NASTY in html.unescape(text) for text in written)


def evaluation(n=4):
    correct = np.arange(n) % 2 == 0
    table = {"prompt": NASTY, "answer": NASTY, "predicted": NASTY, "loss": 1.0, "correct": correct}
    return Evaluation(pd.DataFrame(table), PROVENANCE)


def test_plain_is_what_plotly_turns_back():
    assert plain("a < b & c") == "a &lt; b &amp; c"
    assert plain('"it\'s"') == '"it\'s"'
    assert plain(3) == "3"


def test_prompts_and_names_of_curves():
    assert shows(el.plots.example_losses(evaluation(), evaluation()))
    curve = pd.DataFrame({"kept": [0.0, 1.0], "faithfulness": [0.0, 1.0]})
    assert shows(el.plots.faithfulness({NASTY: curve}))


def test_tokens_and_nodes_of_circuits(found):
    circuit = found[2]
    for column in ("reads", "promotes", "suppresses"):
        nodes = circuit.nodes.assign(**{column: NASTY})
        assert shows(el.plots.circuit(replace(circuit, nodes=nodes)))
    assert shows(el.plots.circuit(replace(circuit, norm=NASTY)))
    cut = pd.DataFrame({"writer": NASTY, "reader": "r", "cut": ["edge", "node"]})
    assert shows(el.plots.path_cuts(cut.assign(predicted=1.0, measured=1.0, strength=1.0)))


def test_methods_criteria_and_tasks(found):
    scores, search, _ = found
    assert shows(el.plots.search_trace(replace(search, method=NASTY)))
    assert shows(el.plots.spectrum(replace(scores, criterion=NASTY)))
    costs = {"low": 0.1, "high": 0.9, "seconds": [1.0, 0.0], "parameters": [0, 5]}
    table = pd.DataFrame({"method": [NASTY, "b"], "accuracy": 0.5, **costs})
    assert shows(paper_plots.methods(table))
    pairs = pd.DataFrame({"learned_on": [NASTY, "b"], "tested_on": ["a", NASTY], "change": 0.1})
    assert shows(paper_plots.transfer(pairs))


@pytest.mark.parametrize("column", ["label", "method"])
def test_names_in_studies(column):
    cells = {"label": "l", "method": "before", "choice": np.nan, "low": 0.1, "high": 0.9}
    table = pd.DataFrame({**cells, "accuracy": [0.5]}).assign(**{column: NASTY})
    drawn = views.dots(table, list(table["label"]), list(table["method"]))
    written = "".join(texts(drawn.to_plotly_json()))
    assert plain(NASTY) in written


def test_names_in_notebooks(found):
    scores, search, circuit = found
    result = el.EigenpruneResult(
        el.EigenpruneConfig(model=NASTY),
        evaluation(),
        evaluation(),
        el.compare(evaluation(), evaluation()),
        scores,
        search,
    )
    table = pd.DataFrame({"token": [NASTY], "score": [1.0]})
    fit = FitResult(NASTY, NoEdit(), evaluation(), table, Cost())
    data = dataset([(NASTY, NASTY)])
    for shown in (
        evaluation(),
        result,
        fit,
        el.Readout(NASTY, table, table, table, table, PROVENANCE),
        replace(circuit, norm=NASTY),
        replace(scores, criterion=NASTY),
        replace(search, method=NASTY),
        Task(NASTY, EQUAL, EQUAL, EQUAL),
        Task("t", data, data, data),
    ):
        page = shown._repr_html_()
        assert "<s>" not in page, type(shown)
        assert "&lt;s&gt;1&lt;/s&gt;" in page, type(shown)
