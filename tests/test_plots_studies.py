"""Figures of studies show the tables that they are given."""

import numpy as np
import pandas as pd
import pytest

from eigenlens.paper import plots as paper_plots
from eigenlens.plots.style import log_ticks

METHODS = pd.DataFrame(
    {
        "method": ["before", "few-shot", "frozen", "LoRA"],
        "accuracy": [0.02, 0.2, 0.87, 0.85],
        "low": [0.0, 0.1, 0.81, 0.8],
        "high": [0.07, 0.3, 0.92, 0.9],
        "seconds": [0.0, np.nan, 200.0, 85.0],
        "parameters": [0, 0, 2123, 2_440_000],
    }
)
PAIRS = pd.DataFrame(
    {
        "learned_on": ["+", "+", "x"],
        "tested_on": ["+", "x", "x"],
        "change": [0.853, -0.04, 0.14],
        "low": [0.8, -0.1, np.nan],
        "high": [0.9, 0.02, np.nan],
    }
)


def test_methods_have_accuracies_with_intervals_and_costs():
    figure = paper_plots.methods(METHODS)
    accuracy, seconds, no_seconds, parameters, no_parameters = figure.data
    np.testing.assert_allclose(accuracy.x, METHODS["accuracy"])
    np.testing.assert_allclose(accuracy.x + accuracy.error_x.array, METHODS["high"])
    np.testing.assert_allclose(accuracy.x - accuracy.error_x.arrayminus, METHODS["low"])
    assert dict(zip(seconds.y, seconds.x, strict=True)) == {"frozen": 200.0, "LoRA": 85.0}
    assert list(no_seconds.y) == ["before"]
    assert dict(zip(parameters.y, parameters.x, strict=True)) == {"frozen": 2123, "LoRA": 2_440_000}
    assert list(no_parameters.y) == ["before", "few-shot"]
    for axis in figure.select_xaxes():
        assert axis.title.text
    for axis, column in ((figure.layout.xaxis2, "seconds"), (figure.layout.xaxis3, "parameters")):
        there = METHODS[column][METHODS[column] > 0]
        assert axis.range[0] < np.log10(there.min())
        assert np.log10(there.max()) < axis.range[1]
    # Drawn from top to bottom.
    assert list(figure.layout.yaxis.categoryarray) == list(METHODS["method"])[::-1]


def test_methods_refuse_what_they_cannot_show():
    with pytest.raises(ValueError, match="lacks the columns low, parameters"):
        paper_plots.methods(METHODS.drop(columns=["low", "parameters"]))
    with pytest.raises(ValueError, match="'before' comes twice"):
        paper_plots.methods(pd.concat([METHODS, METHODS.head(1)]))
    with pytest.raises(ValueError, match="no rows"):
        paper_plots.methods(METHODS.head(0))


def test_transfer_has_a_cell_per_pair_in_points():
    (heat,) = paper_plots.transfer(PAIRS).data
    assert list(heat.y) == ["+", "x"]
    assert list(heat.x) == ["+", "x"]
    np.testing.assert_allclose(heat.z, [[85.3, -4.0], [np.nan, 14.0]])
    assert heat.zmax == -heat.zmin == pytest.approx(85.3)
    assert heat.text[0][1] == "−4.0<br>(−10.0 … +2.0)"
    assert heat.text[1][1] == "+14.0"
    assert heat.text[1][0] == ""
    (plain,) = paper_plots.transfer(PAIRS[["learned_on", "tested_on", "change"]]).data
    assert plain.text[0][0] == "+85.3"


def test_transfer_refuses_what_it_cannot_show():
    with pytest.raises(ValueError, match="lacks the columns change"):
        paper_plots.transfer(PAIRS.drop(columns="change"))
    with pytest.raises(ValueError, match="comes twice"):
        paper_plots.transfer(pd.concat([PAIRS, PAIRS]))
    with pytest.raises(ValueError, match="no rows"):
        paper_plots.transfer(PAIRS.head(0))


def test_logarithmic_axes_have_legible_ticks():
    assert log_ticks(0.15, 3.0) == ([0.2, 0.5, 1, 2], ["0.2", "0.5", "1", "2"])
    ticks, labels = log_ticks(0.5, 2e7, most=4)
    np.testing.assert_allclose(ticks, [1, 1e3, 1e6])
    assert labels == ["1", "10<sup>3</sup>", "10<sup>6</sup>"]
    assert log_ticks(2.1, 4.9) == ([2.1, 4.9], ["2.1", "4.9"])
