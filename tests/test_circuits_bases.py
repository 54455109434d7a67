"""Circuits, readouts and composition in every basis, from disk, and without gradients."""

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import EQUAL, MIXED, in_families

import eigenlens as el
from eigenlens.circuits.nodes import make_nodes
from eigenlens.circuits.readout import token_summary
from eigenlens.spectra import COMPONENT

QUIET = {"progress": False}
BASES = ("svd", "qk_ov", "random", "neurons", "pca")


def decomposed(model, basis):
    return el.decompose(model, basis=basis, data=EQUAL if basis == "pca" else None, **QUIET)


def table(*rows):
    return pd.DataFrame(rows, columns=COMPONENT)


def tokens(model, layer):
    """Embeddings at length one behind the first norm of a block of a Llama."""
    e = model.W_E * model.blocks[layer].ln1.weight
    return e / e.norm(dim=1, keepdim=True)


def weights(model, layer, *kinds):
    return [m.weight.detach() for m in el.weight_matrices(model, kinds, [layer])]


@in_families(["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("basis", BASES)
def test_edges_out_sum_to_the_score_in_every_basis(tiny, family, basis):
    model = tiny(family)
    scores = el.score(model, decomposed(model, basis), MIXED, batch_size=2, **QUIET)
    frozen = el.select(scores, count=2)
    options = {"strongest": 6, "norm": "full", "batch_size": 3}
    found = el.circuit(model, scores, MIXED, frozen, **options, **QUIET).nodes
    own = scores.to_pandas().merge(found[COMPONENT], how="right", on=COMPONENT)
    assert (found["strength"] > 0).sum() == 2
    np.testing.assert_allclose(found["effect"], own["delta_loss"], rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(found["outflow"], own["delta_loss"], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("options", [{"reference": "shared"}, {"reference": "zero"}])
def test_edges_out_sum_to_the_score_without_positions(tiny, options):
    model = tiny("gpt2")
    scores = el.score(model, decomposed(model, "qk_ov"), MIXED, **options, **QUIET)
    found = el.circuit(model, scores, MIXED, strongest=6, norm="full", **QUIET).nodes
    own = scores.to_pandas().merge(found[COMPONENT], how="right", on=COMPONENT)
    np.testing.assert_allclose(found["outflow"], own["delta_loss"], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("basis", ["qk_ov", "neurons"])
def test_weak_cuts_change_the_loss_as_the_edges_say(tiny, basis):
    model = tiny("llama")
    scores = el.score(model, decomposed(model, basis), MIXED, **QUIET)
    found = el.circuit(model, scores, MIXED, strongest=8, **QUIET)
    cut = el.cut_paths(model, scores, MIXED, found, edges=8, nodes=4, strength=1e-5)
    assert len(cut) > 8
    largest = cut["predicted"].abs().max()
    np.testing.assert_allclose(cut["measured"], cut["predicted"], rtol=2e-3, atol=1e-4 * largest)


def test_pairs_of_a_qk_component_are_those_of_its_part_of_the_joint_map(tiny):
    """``(tokens W_Q r)(tokens W_K wᵀ)``, which is ``σ (tokens u)(tokens v)`` of ``W_Q W_Kᵀ``."""
    model = tiny("llama")
    found = el.readout(model, decomposed(model, "qk_ov"), 0, "QK", 3, 1, top=4)
    w_q, w_k = weights(model, 0, "W_Q", "W_K")
    u, sigma, vh = torch.linalg.svd(w_q[3] @ w_k[1].T)
    e = tokens(model, 0)
    scores = torch.outer(e @ u[:, 1] * sigma[1], e @ vh[1])
    best = scores.flatten().sort(descending=True).values
    np.testing.assert_allclose(found.pairs["score"], [*best[:4], *best[-4:]])
    assert set(found.pairs["through"]) == {3}
    assert len(found.writes) == 0
    query, key = (found.reads[found.reads["side"] == side] for side in ("query", "key"))
    np.testing.assert_allclose(abs(e @ u[:, 1]).max(), query["score"].abs().max())
    np.testing.assert_allclose(abs(e @ vh[1]).max(), key["score"].abs().max())
    assert len(query) + len(key) == len(found.reads)


def test_the_summary_of_a_qk_component_names_the_tokens_of_either_side(tiny):
    model = tiny("llama")
    spectra = decomposed(model, "qk_ov")
    nodes = make_nodes(spectra, table((0, "QK", 3, 1)))
    (row,) = token_summary(model, nodes, top=3).to_dict("records")
    e = tokens(model, 0)
    w_q, w_k = weights(model, 0, "W_Q", "W_K")
    s = spectra["blocks.0.QK"]
    sides = {"query": e @ w_q[3] @ s.read[3, :, 1], "key": e @ w_k[1] @ s.write[3, 1]}
    expected = [
        f"{side}: {' '.join(model.tokenizer.decode([t]) for t in scores.topk(3).indices.tolist())}"
        for side, scores in sides.items()
    ]
    assert row["reads"] == "; ".join(expected)


def test_what_an_ov_component_reads_and_promotes_are_both_sides_of_the_joint_map(tiny):
    model = tiny("llama")
    found = el.readout(model, decomposed(model, "qk_ov"), 1, "OV", 2, 0, top=3)
    w_v, w_o = weights(model, 1, "W_V", "W_O")
    u, _, vh = torch.linalg.svd(w_v[1] @ w_o[2])
    read = tokens(model, 1) @ u[:, 0]
    written = (vh[0] * model.ln_final.weight) @ model.W_U
    written = written - written.mean()
    sign = torch.sign(read[read.abs().argmax()]) * found.reads["score"].pipe(
        lambda s: np.sign(s[s.abs().idxmax()])
    )
    for table, scores in ((found.reads, sign * read), (found.writes, sign * written)):
        order = scores.detach().argsort(descending=True).tolist()
        ends = [*order[:3], *order[-3:]]
        assert table["token"].tolist() == [model.tokenizer.decode([t]) for t in ends]
        np.testing.assert_allclose(table["score"], scores.detach()[ends])
    assert set(found.writes["through"]) == {2}


def test_composition_of_joint_maps_by_hand(tiny):
    model = tiny("llama")
    spectra = decomposed(model, "qk_ov")
    chosen = table((0, "OV", 3, 0), (1, "QK", 2, 1), (1, "OV", 0, 1))
    found = el.composition(model, spectra, chosen).set_index(["writer", "reader", "side"])["score"]
    assert set(found.index) == {
        ("L0.OV[3,0]", "L1.QK[2,1]", "query"),
        ("L0.OV[3,0]", "L1.QK[2,1]", "key"),
        ("L0.OV[3,0]", "L1.OV[0,1]", ""),
    }
    (w_o,) = weights(model, 0, "W_O")
    w_q, w_k, w_v = weights(model, 1, "W_Q", "W_K", "W_V")
    wrote = spectra["blocks.0.OV"].write[3, 0] @ w_o[3] * model.blocks[1].ln1.weight
    qk, ov = spectra["blocks.1.QK"], spectra["blocks.1.OV"]
    for reader, side, read in (
        ("L1.QK[2,1]", "query", w_q[2] @ qk.read[2, :, 1]),
        ("L1.QK[2,1]", "key", w_k[1] @ qk.write[2, 1]),
        ("L1.OV[0,1]", "", w_v[0] @ ov.read[0, :, 1]),
    ):
        expected = torch.cosine_similarity(wrote, read, dim=0)
        assert found["L0.OV[3,0]", reader, side] == pytest.approx(float(expected))


@pytest.mark.parametrize(
    ("basis", "place"),
    [
        ("svd", (1, "W_K", 1, 2)),
        pytest.param("svd", (1, "W_O", 3, 0), marks=pytest.mark.slow),
        ("qk_ov", (1, "QK", 2, 1)),
    ],
)
def test_a_readout_lists_the_writers_as_composition_does(tiny, basis, place):
    model = tiny("llama")
    spectra = decomposed(model, basis)
    rest = el.readout(model, spectra, *place, top=2000).reads_from
    writers = spectra.components[COMPONENT]
    pairs = el.composition(model, spectra, writers, table(place))
    assert len(rest) == len(pairs) >= 8
    np.testing.assert_allclose(rest["score"].abs(), pairs["score"].abs())
    keys = ["writer", "side", "score"]
    one, two = (t[keys].sort_values(keys, ignore_index=True) for t in (rest, pairs))
    assert one["writer"].equals(two["writer"])
    np.testing.assert_allclose(one["score"], two["score"], atol=1e-12)
    first = el.readout(model, spectra, *place, top=5).reads_from
    pd.testing.assert_frame_equal(first, rest.head(5))


@pytest.mark.parametrize(("basis", "seed"), [("svd", 0), ("random", 3), ("qk_ov", 0)])
def test_scores_from_disk_find_their_directions_again(tiny, tmp_path, basis, seed):
    model = tiny("gpt2")
    spectra = el.decompose(model, layers=[1], basis=basis, seed=seed, **QUIET)
    scores = el.score(model, spectra, EQUAL, **QUIET)
    scores.save(tmp_path / "scores.parquet")
    loaded = el.Scores.load(tmp_path / "scores.parquet")
    found = []
    for each in (scores, loaded):
        circuit = el.circuit(model, each, EQUAL, el.select(each, count=2), strongest=3, **QUIET)
        cut = el.cut_paths(model, each, EQUAL, circuit, edges=3, nodes=2)
        found.append((circuit, cut))
    (one, cut_one), (two, cut_two) = found
    for name in ("nodes", "edges", "outflows", "inflows"):
        pd.testing.assert_frame_equal(getattr(one, name), getattr(two, name))
    pd.testing.assert_frame_equal(cut_one, cut_two)


def test_directions_that_follow_from_data_are_not_guessed(tiny, tmp_path):
    model = tiny("gpt2")
    scores = el.score(model, decomposed(model, "pca"), EQUAL, **QUIET)
    scores.save(tmp_path / "scores.parquet")
    with pytest.raises(ValueError, match="pca basis follow from data"):
        el.circuit(model, el.Scores.load(tmp_path / "scores.parquet"), EQUAL, **QUIET)


def test_a_decomposition_of_another_object_with_the_same_weights_will_do(tiny, tiny_folder):
    model = tiny("llama")
    other = el.load_model(tiny_folder("llama"), dtype=torch.float64, device="cpu")
    spectra = decomposed(other, "svd")
    scores = el.score(other, spectra, EQUAL, **QUIET)
    del other
    own = el.score(model, decomposed(model, "svd"), EQUAL, **QUIET)
    one, two = (el.circuit(model, s, EQUAL, strongest=4, **QUIET) for s in (scores, own))
    pd.testing.assert_frame_equal(one.nodes, two.nodes)
    read = el.readout(model, spectra, 1, "W_O", 0, 0)
    pd.testing.assert_frame_equal(
        read.writes, el.readout(model, own.spectra, 1, "W_O", 0, 0).writes
    )
    with pytest.raises(ValueError, match="other weights"):
        el.readout(tiny("gpt2"), spectra, 1, "W_O", 0, 0)


def test_everything_runs_with_gradients_switched_off(tiny):
    model = tiny("gemma2")

    def everything():
        spectra = decomposed(model, "svd")
        scores = el.score(model, spectra, EQUAL, **QUIET)
        frozen = el.select(scores, count=2)
        circuit = el.circuit(model, scores, EQUAL, frozen, strongest=2, **QUIET)
        cut = el.cut_paths(model, scores, EQUAL, circuit, edges=3, nodes=2)
        read = el.readout(model, spectra, 1, "W_V", 0, 0)
        pairs = el.composition(model, spectra, circuit.nodes)
        return circuit.nodes, circuit.edges, cut, read.writes, read.reads_from, pairs

    with torch.set_grad_enabled(True):
        expected = everything()
    with torch.set_grad_enabled(False):
        found = everything()
    for one, two in zip(found, expected, strict=True):
        pd.testing.assert_frame_equal(one, two)


def test_what_does_not_fit_together_is_refused(tiny):
    model = tiny("gpt2")
    svd, random = (
        el.score(model, decomposed(model, basis), EQUAL, **QUIET) for basis in ("svd", "random")
    )
    with pytest.raises(ValueError, match=r"basis svd, the scores of random \(seed 0\)"):
        el.circuit(model, random, EQUAL, el.select(svd, count=1), **QUIET)
    with pytest.raises(ValueError, match="top=0"):
        el.readout(model, svd.spectra, 0, "W_Q", 0, 0, top=0)
    with pytest.raises(ValueError, match="QK is not decomposed"):
        el.readout(model, svd.spectra, 0, "QK", 0, 0)
