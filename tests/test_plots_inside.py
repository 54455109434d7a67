"""Pictures of what freezing does inside the model show the numbers of their results."""

import sys

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

import eigenlens as el
from eigenlens.marchenko_pastur import bulk_edge, median_of_law
from eigenlens.plots.attention import attention_array
from eigenlens.plots.style import BLUE, VERMILION


@pytest.fixture(scope="module")
def results():
    model = el.load_model("arith-tiny", device="cpu")
    task = el.load_task("ambiguous", model.tokenizer)
    spectra = el.decompose(model, progress=False)
    options = {"batch_size": 240, "progress": False}
    scores = el.score(model, spectra, task.train, criterion="margin", **options)
    frozen = el.select(scores, count=15)
    circuit = el.circuit(model, scores, task.train, frozen, **options)
    change = el.activation_change(model, frozen, task.test, batch_size=240)
    return spectra, scores, frozen, circuit, change


def drawn(results):
    spectra, scores, frozen, circuit, change = results
    return {
        "spectrum": el.plots.spectrum(scores, frozen),
        "spectrum by head": el.plots.spectrum(scores, frozen, against="sigma", matrix="W_V"),
        "circuit": el.plots.circuit(circuit),
        "pruned map": el.plots.pruned_map(frozen, scores),
        "pruned map alone": el.plots.pruned_map(frozen),
        "singular values": el.plots.singular_values(spectra, frozen),
        "activations": el.plots.activation_change(change),
        "attention": el.plots.attention_change(change),
    }


def test_every_axis_has_a_title_and_every_panel_data(results):
    for name, figure in drawn(results).items():
        assert figure.layout.title.text, name
        xs, ys = list(figure.select_xaxes()), list(figure.select_yaxes())
        shared_x = {axis.matches for axis in xs} | {None}
        for axis in [*xs, *ys]:
            hidden = axis.matches is not None or axis.plotly_name in shared_x
            assert axis.title.text or hidden, f"{name}: {axis.plotly_name}"
        used = {(trace.xaxis or "x") for trace in figure.data}
        assert len(used) == len(xs), name


def test_the_circuit_shows_the_strongest_edges_with_their_sign(results):
    circuit = results[3]
    figure = el.plots.circuit(circuit, edges=25)
    lines = [t for t in figure.data if t.mode == "lines" and t.x is not None and t.x[0] is not None]
    strongest = circuit.strongest(25)
    assert len(lines) == 25
    colours = [line.line.color for line in lines]
    assert colours.count(VERMILION) == int((strongest["effect"] < 0).sum())
    assert colours.count(BLUE) == int((strongest["effect"] > 0).sum())
    widths = sorted(line.line.width for line in lines)
    sizes = np.sort(strongest["effect"].abs().to_numpy())
    np.testing.assert_allclose(widths, np.maximum(0.6, 8 * sizes / sizes[-1]))
    nodes = [t for t in figure.data if t.mode == "markers+text"]
    ends = {*strongest["writer"], *strongest["reader"]}
    assert sum(len(t.x) for t in nodes) == len(ends)
    frozen = next(t for t in nodes if t.name == "frozen")
    names = circuit.nodes.set_index("node")
    assert len(frozen.x) == sum(names["strength"].get(node, 0) > 0 for node in ends)
    hover = "".join(frozen.hovertext)
    assert "promotes: " in hover
    with pytest.raises(ValueError, match="edges=0"):
        el.plots.circuit(circuit, edges=0)


def test_no_two_nodes_of_the_circuit_overlap(results):
    figure = el.plots.circuit(results[3])
    nodes = [t for t in figure.data if t.mode == "markers+text"]
    x = np.concatenate([t.x for t in nodes]) * (900 - 130) / 1.08
    rows = figure.layout.yaxis.range[1] - figure.layout.yaxis.range[0]
    y = np.concatenate([t.y for t in nodes]) * (figure.layout.height - 170) / rows
    distance = np.hypot(x[:, None] - x, y[:, None] - y) + 1e9 * np.eye(len(x))
    assert distance.min() > 32


def test_the_map_adds_up_to_the_frozen_set(results):
    _, scores, frozen, _, _ = results
    share, total = el.plots.pruned_map(frozen, scores).data
    counts = np.array(share.customdata)
    assert np.nansum(counts[..., 0]) == len(frozen)
    assert np.nansum(counts[..., 1]) == len(scores)
    np.testing.assert_allclose(share.z, counts[..., 0] / counts[..., 1])
    table = scores.to_pandas().sort_values("delta_loss").head(15)
    assert np.nansum(total.z) == pytest.approx(table["delta_loss"].sum())


def test_a_loaded_frozen_set_needs_scores_for_its_map(results, tmp_path):
    _, scores, frozen, _, _ = results
    frozen.save(tmp_path / "frozen.safetensors")
    loaded = el.FrozenSet.load(tmp_path / "frozen.safetensors")
    with pytest.raises(ValueError, match="pass scores="):
        el.plots.pruned_map(loaded)
    one, two = el.plots.pruned_map(loaded, scores), el.plots.pruned_map(frozen, scores)
    np.testing.assert_array_equal(one.data[0].z, two.data[0].z)


def test_the_bulk_edge_is_where_noise_ends():
    rng = np.random.default_rng(0)
    for n, m in ((400, 400), (600, 150), (128, 512)):
        sigma = np.linalg.svd(0.3 * rng.standard_normal((n, m)), compute_uv=False)
        edge = bulk_edge(sigma, n, m)
        assert edge == pytest.approx(0.3 * (n**0.5 + m**0.5), rel=0.02)
        assert sigma[0] == pytest.approx(edge, rel=0.05)
        planted = np.sort(np.append(sigma[:-3], [20 * edge] * 3))[::-1]
        assert bulk_edge(planted, n, m) == pytest.approx(edge, rel=0.05)
    # Gavish and Donoho (2014): optimal thresholds (4/√3 for square matrices) over √μ are 2.858.
    assert 4 / 3**0.5 / median_of_law(1.0) ** 0.5 == pytest.approx(2.858, abs=1e-3)
    with pytest.raises(ValueError, match="beta=2"):
        median_of_law(2.0)


def test_singular_values_mark_the_frozen_ones(results):
    spectra, _, frozen, _, _ = results
    figure = el.plots.singular_values(spectra, frozen)
    marks = [t for t in figure.data if t.name == "frozen"]
    assert sum(x is not None for t in marks for x in t.x) == len(frozen)
    lines = [t for t in figure.data if t.name == "a matrix or head"]
    points = sum(np.isfinite(np.array(t.y, dtype=float)).sum() for t in lines)
    assert points == spectra.n_components
    w_in = next(t for t in lines if t.xaxis == "x5")
    sigma = spectra["blocks.0.W_in"].sigma.numpy()
    np.testing.assert_allclose(w_in.y[:128], sigma[0] / bulk_edge(sigma, 128, 512)[0])
    with pytest.raises(ValueError, match=r"layers \[9\]"):
        el.plots.singular_values(spectra, layers=[9])


def test_activation_panels_hold_the_tables(results):
    change = results[4]
    figure = el.plots.activation_change(change)
    heat = [t for t in figure.data if isinstance(t, go.Heatmap)]
    pivot = change.residual.pivot(index="depth", columns="position", values="cosine")
    np.testing.assert_array_equal(heat[0].z, pivot)
    after = [t for t in figure.data if t.name == "after"]
    np.testing.assert_array_equal(after[1].y, change.lens["logprob_after"])
    np.testing.assert_array_equal(after[2].y, change.lens["top_after"])


def test_the_score_spectrum_shows_scores_against_sigma_head_by_head(results):
    _, scores, frozen, _, _ = results
    figure = el.plots.spectrum(scores, frozen, against="sigma", matrix="W_V")
    titles = [annotation.text for annotation in figure.layout.annotations]
    assert titles == [f"layer {la}, W<sub>V</sub>, head {h}" for la in (0, 1) for h in range(4)]
    table = scores.to_pandas().query("matrix == 'W_V' and layer == 1 and head == 2")
    own = [t for t in figure.data if (t.xaxis or "x") == "x7"]
    x = np.concatenate([np.array(t.x, dtype=float) for t in own])
    np.testing.assert_allclose(np.sort(x[~np.isnan(x)]), np.sort(table["sigma"]))
    assert figure.layout.xaxis7.type == "log"
    kept = next(t for t in own if t.name == "kept")
    low, middle = np.sinh(np.array([kept.y - kept.error_y.arrayminus, kept.y]) * np.log(10)) * 2e-6
    rows = table.set_index("sigma").loc[np.array(kept.x)]
    np.testing.assert_allclose(middle - low, rows["stderr"], rtol=1e-6)
    marked = [t for t in el.plots.spectrum(scores, frozen).data if t.name == "frozen"]
    assert sum(x is not None for t in marked for x in t.x) == len(frozen)
    with pytest.raises(ValueError, match="No scores of layer 5; there are 0, 1"):
        el.plots.spectrum(scores, layer=5)
    with pytest.raises(ValueError, match="Unknown against='rank'"):
        el.plots.spectrum(scores, against="rank")


def test_cut_paths_show_both_numbers_of_every_cut(results):
    columns = ["cut", "writer", "reader", "strength", "predicted", "measured"]
    rows = [("edge", "a", "b", 1.0, -0.5, -0.2), ("node", "c", "all", 1.0, 0.1, 0.3)]
    figure = el.plots.path_cuts(pd.DataFrame(rows, columns=columns))
    predicted, measured = (t for t in figure.data if t.mode == "markers")
    assert dict(zip(predicted.y, predicted.x, strict=True)) == {"a → b": -0.5, "c, all paths": 0.1}
    assert dict(zip(measured.y, measured.x, strict=True)) == {"a → b": -0.2, "c, all paths": 0.3}
    with pytest.raises(ValueError, match="0 cuts"):
        el.plots.path_cuts(pd.DataFrame(columns=columns))


def test_a_circuit_can_be_drawn_from_chosen_edges(results):
    circuit = results[3]
    pruned = circuit.edges[circuit.edges["pruned"]].head(7)
    figure = el.plots.circuit(circuit, edges=pruned)
    nodes = {
        text.split(", σ")[0]
        for t in figure.data
        if t.mode == "markers+text"
        for text in t.hovertext
    }
    assert nodes == {*pruned["writer"], *pruned["reader"]}


def test_circuitsvis_gets_the_patterns_of_a_layer(results, monkeypatch):
    change = results[4]
    values = attention_array(change, 1, "difference")
    own = change.patterns.query("layer == 1 and head == 3").sort_values(["query", "key"])
    size = values.shape[1]
    expected = np.nan_to_num((own["after"] - own["before"]).to_numpy()).reshape(size, size)
    np.testing.assert_allclose(values[3], expected)
    monkeypatch.setitem(sys.modules, "circuitsvis.attention", None)
    with pytest.raises(ImportError, match=r"pip install 'eigenlens\[notebook\]'"):
        el.plots.attention_heads(change, 1)


def test_circuitsvis_draws_a_page(results):
    pytest.importorskip("circuitsvis")
    change = results[4]
    view = el.plots.attention_heads(change, 0, "before", tokens=["a", "?", "b", "="])
    page = view.show_code()
    assert "AttentionHeads" in page
    assert '"?"' in page
    ends = el.plots.attention_heads(change, 0, "before", tokens=["a", "</script>", "b", "="])
    assert ends.show_code().count("</script") == page.count("</script")
    with pytest.raises(ValueError, match="Unknown state 'later'"):
        el.plots.attention_heads(change, 0, "later")
    with pytest.raises(ValueError, match="no layer 5"):
        el.plots.attention_heads(change, 5)
    with pytest.raises(ValueError, match="2 tokens for 4 positions"):
        el.plots.attention_heads(change, 0, tokens=["a", "b"])


def test_attention_shows_the_head_that_changed_most(results):
    change = results[4]
    patterns = change.patterns.assign(
        size=(change.patterns["after"] - change.patterns["before"]).abs()
    )
    layer, head = patterns.groupby(["layer", "head"])["size"].sum().idxmax()
    figure = el.plots.attention_change(change)
    assert f"layer {layer}, head {head}" in figure.layout.title.text
    before, after, difference = (np.array(t.z, dtype=float) for t in figure.data)
    np.testing.assert_allclose(difference, after - before)
    assert np.isnan(before[0, 1])  # no query sees a later key
    np.testing.assert_allclose(np.nansum(before, axis=1), 1, atol=1e-5)
    with pytest.raises(ValueError, match="both layer= and head="):
        el.plots.attention_change(change, layer=0)
    with pytest.raises(ValueError, match="no layer 7"):
        el.plots.attention_change(change, layer=7, head=0)
