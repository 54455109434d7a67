"""Figures of large models stay small, and of every basis; what matters stays visible."""

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import EQUAL

import eigenlens as el
from eigenlens.matrices import Site
from eigenlens.plots.style import bends, signed_log, visible
from eigenlens.position_means import PositionMeans
from eigenlens.provenance import Provenance
from eigenlens.scoring import Scores
from eigenlens.spectra import Spectra, Spectrum

PROVENANCE = Provenance(model="none", model_fingerprint="", versions={})
UNIT = 1e-6


@pytest.fixture(scope="module")
def large():
    """As many components as SmolLM2 has, every 40th of them frozen, of the criterion ``fisher``."""
    sites = [
        Site(layer, kind, n_heads, side, width, far, "")
        for layer in range(30)
        for kind, n_heads, side, width, far in [
            ("W_Q", 9, "out", 64, 576),
            ("W_K", 3, "out", 64, 576),
            ("W_V", 3, "out", 64, 576),
            ("W_O", 9, "in", 64, 576),
            ("W_in", 1, "in", 576, 1536),
            ("W_gate", 1, "in", 576, 1536),
            ("W_out", 1, "out", 576, 1536),
        ]
    ]
    rng = np.random.default_rng(0)
    found = []
    for site in sites:
        shape = (site.n_heads, site.width)
        sigma = torch.tensor(np.sort(rng.lognormal(size=shape))[:, ::-1].copy())
        found.append(Spectrum(site, None, None, sigma))
    spectra = Spectra(found, PROVENANCE)
    n = spectra.n_components
    statistics = dict.fromkeys(("margin_std", "position_square", "worst", "estimate"), np.nan)
    effect = 1e-4 * rng.standard_t(2, size=n) ** 3
    components = spectra.components.assign(effect=effect, std=0.1, margin=effect, **statistics)
    means = PositionMeans.constant(np.zeros(n))
    scores = Scores(components, means, "fisher", "zero", 10, PROVENANCE, spectra=spectra)
    return spectra, scores, el.FrozenSet.from_scores(scores, np.arange(0, n, 40))


def points(figure, name):
    traces = [t for t in figure.data if t.name == name]
    return [np.array([t.x, t.y], dtype=float) for t in traces]


@pytest.mark.parametrize("against", ["index", "sigma"])
def test_a_spectrum_of_a_large_model_is_thin_and_shows_what_matters(large, against):
    _, scores, frozen = large
    assert len(scores) == 97_920
    figure = el.plots.spectrum(scores, frozen, against=against)
    kept, marked = points(figure, "kept"), points(figure, "frozen")
    assert max(p.shape[1] for p in kept) < 5000
    assert sum(p.shape[1] for p in marked) == len(frozen)
    assert len(figure.to_json()) < 3e6
    table = scores.to_pandas()
    table["matrix_order"] = table["matrix"].map({k: i for i, k in enumerate(el.matrices.KINDS)})
    for (_, own), p, f in zip(table.groupby("matrix_order"), kept, marked, strict=True):
        ends = [own["delta_loss"].min(), own["delta_loss"].max()]
        y = np.concatenate([p[1], f[1]])
        np.testing.assert_allclose([y.min(), y.max()], signed_log(np.array(ends), UNIT))


def test_criteria_without_standard_errors_promise_none(large):
    _, scores, frozen = large
    assert np.isnan(scores.stderr).all()
    for trace in el.plots.spectrum(scores, frozen, layer=0).data:
        assert "±" not in trace.hovertemplate
        assert trace.error_y.array is None
    mean = scores.with_criterion("mean")
    assert "±" in el.plots.spectrum(mean, frozen, layer=0).data[0].hovertemplate


def test_what_a_thinned_point_stood_for_is_covered_by_another():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=20_000), rng.normal(size=20_000)
    y[7], y[8] = np.nan, np.inf
    rows = visible(x, y)
    assert len(rows) < 7000
    finite = np.isfinite(y)
    scale = np.array([np.ptp(x[finite]), np.ptp(y[finite])])
    there, gone = (np.stack([x[r], y[r]], 1) / scale for r in (rows, np.flatnonzero(finite)[:500]))
    nearest = np.abs(gone[:, None] - there).max(-1).min(1)
    assert nearest.max() <= 1 / 60
    assert np.array_equal(visible(x[:1000], y[:1000]), np.delete(np.arange(1000), [7, 8]))


def test_singular_values_of_a_large_model_keep_ends_and_shape(large):
    spectra, _, frozen = large
    figure = el.plots.singular_values(spectra, frozen)
    lines = [t for t in figure.data if t.name == "a matrix or head"]
    sizes = [np.isfinite(np.array(t.y, dtype=float)).sum() for t in lines]
    assert max(sizes) <= 6000
    assert sum(p.shape[1] for p in points(figure, "frozen")) == len(frozen)
    assert len(figure.to_json()) < 4e6
    w_in = next(t for t in lines if t.xaxis == "x5")
    x, y = np.array(w_in.x, dtype=float)[:200], np.array(w_in.y, dtype=float)[:200]
    last = int(np.flatnonzero(np.isnan(x))[0])
    assert (x[0], x[last - 1]) == (0, 575)
    # A straight line between the points that are kept runs through those that are not.
    sigma = spectra["blocks.0.W_in"].sigma[0].numpy()
    drawn = np.exp(np.interp(np.arange(576), x[:last], np.log(y[:last])))
    edge = sigma[0] / y[0]
    np.testing.assert_allclose(drawn * edge, sigma, rtol=0.1)  # a pixel or two


def test_bends_of_a_line_are_where_it_is_steep():
    y = np.concatenate([np.linspace(10, 1, 20), np.ones(1000)])
    places = bends(y, 40)
    assert len(places) <= 40
    assert (places[0], places[-1]) == (0, len(y) - 1)
    assert (places < 20).sum() > 10
    assert np.array_equal(bends(np.ones(3), 8), [0, 1, 2])


def test_the_map_of_a_large_model_is_small(large):
    _, scores, frozen = large
    assert len(el.plots.pruned_map(frozen, scores).to_json()) < 3e5


@pytest.mark.parametrize("basis", ["qk_ov", "neurons", "random"])
def test_every_basis_can_be_drawn(tiny, basis):
    model = tiny("gpt2")
    spectra = el.decompose(model, basis=basis, progress=False)
    scores = el.score(model, spectra, EQUAL, reference="shared", progress=False)
    frozen = el.select(scores, count=3)
    circuit = el.circuit(model, scores, EQUAL, frozen, strongest=3, progress=False)
    drawn = [
        el.plots.spectrum(scores, frozen),
        el.plots.spectrum(scores, frozen, matrix=spectra.components["matrix"].iloc[0]),
        el.plots.pruned_map(frozen, scores),
        el.plots.circuit(circuit),
    ]
    kinds = pd.unique(spectra.components["matrix"])
    titles = [annotation.text for annotation in drawn[0].layout.annotations]
    assert titles == [f"W<sub>{k[2:]}</sub>" if k.startswith("W_") else k for k in kinds]
    with pytest.raises(ValueError, match=f"basis {basis}: the bulk edge is that of singular"):
        el.plots.singular_values(spectra)
