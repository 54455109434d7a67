"""Circuits against autograd by hand, conservation laws, brute force and real cuts."""

from dataclasses import replace

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import EQUAL, MIXED, in_families, write_tiny_model

import eigenlens as el
from eigenlens.circuits.norms import final_gain, gain_after, gain_before
from eigenlens.files import FileFormatError
from eigenlens.spectra import COMPONENT

QUIET = {"progress": False}


def scored(model, data=EQUAL, **options):
    return el.score(model, el.decompose(model, **QUIET), data, **QUIET, **options)


def traced(model, scores, data=EQUAL, **options):
    return el.circuit(model, scores, data, **QUIET, **options)


def some(scores, kinds, each=2):
    """The strongest components of every layer and kind."""
    table = scores.to_pandas()
    table = table[table["matrix"].isin(kinds)]
    order = table["delta_loss"].abs().sort_values(ascending=False).index
    return table.loc[order].groupby(["layer", "matrix"]).head(each)[COMPONENT]


@pytest.fixture(scope="module")
def without_norms(tmp_path_factory):
    """A GPT-2 whose norms do nothing."""
    path = tmp_path_factory.mktemp("without_norms")
    write_tiny_model("gpt2", path)
    model = el.load_model(path, dtype=torch.float64, device="cpu")
    norms = [norm for block in model.blocks for norm in (block.ln1, block.ln2)]
    for norm in [*norms, model.ln_final]:
        norm.set_original_component(torch.nn.Identity())
        norm.use_native_layernorm_autograd = True
    for matrix in el.weight_matrices(model):
        matrix.flat_weight.data.mul_(0.5)  # activations stay in range without norms
    return model


@pytest.fixture(scope="module")
def arith():
    model = el.load_model("arith-tiny", dtype=torch.float64, device="cpu")
    task = el.load_task("ambiguous", model.tokenizer)
    scores = scored(model, task.train, criterion="margin", batch_size=240)
    frozen = el.select(scores, count=15)
    return model, task, scores, frozen, traced(model, scores, task.train, frozen=frozen)


def test_without_norms_edges_out_of_every_writer_sum_to_its_score(without_norms):
    scores = scored(without_norms)
    found = traced(
        without_norms, scores, components=scores.components[COMPONENT], limit=len(scores)
    )
    assert len(found) == len(scores)
    out = found.edges.groupby("writer")["effect"].sum().reindex(found.nodes["node"]).fillna(0)
    np.testing.assert_allclose(out, scores.delta_loss, atol=1e-12)
    np.testing.assert_allclose(found.nodes["outflow"], scores.delta_loss, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"reference": "shared"}, {"n_positions": 1}])
def test_without_norms_edges_into_readers_of_the_stream_sum_to_their_scores(without_norms, options):
    scores = scored(without_norms, **options)
    found = traced(without_norms, scores, components=some(scores, ["W_Q", "W_K", "W_V", "W_in"]))
    assert (found.nodes["effect"].abs() > 1e-12).all()
    np.testing.assert_allclose(found.nodes["inflow"], found.nodes["effect"], rtol=1e-6, atol=1e-16)


@in_families()
def test_with_the_whole_norm_edges_out_sum_to_the_score_in_every_family(tiny, family):
    model = tiny(family)
    scores = scored(model, MIXED, batch_size=2)
    found = traced(model, scores, MIXED, strongest=25, norm="full", batch_size=3)
    own = scores.to_pandas().merge(found.nodes[COMPONENT], how="right", on=COMPONENT)
    np.testing.assert_allclose(found.nodes["effect"], own["delta_loss"], rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(found.nodes["outflow"], own["delta_loss"], rtol=1e-7, atol=1e-10)


def sides(model, spectrum):
    """``r_i`` as columns and ``w_i`` as rows, by head; ``E_i = r_i w_i`` is part of the weight."""
    weight = spectrum.site.find(model).weight.detach()
    if spectrum.site.side == "in":
        return spectrum.read, spectrum.write @ weight
    return weight @ spectrum.read, spectrum.write


def by_hand(model, spectra, names, *others):
    """What all components of these maps read of the input, and of the output's gradient."""
    maps = {name: spectra[name].site.find(model) for name in names}
    kept = [*others, *(point for m in maps.values() for point in (m.hook_in, m.hook_out))]
    hooks = [("blocks.0.hook_in", lambda value, hook: value.detach().requires_grad_())]
    batch = el.tasks.make_batches(EQUAL, model, len(EQUAL))[0]
    tokens = torch.cat([batch.tokens, batch.answer[:, -1:]], dim=1)
    labels = tokens.clone()
    labels[:, : batch.n_prompt] = -100
    with torch.enable_grad(), model.hooks(fwd_hooks=hooks):
        _, cache = model.run_with_cache(
            tokens, return_type="loss", labels=labels, names_filter=kept, incl_bwd=True
        )
    found = {}
    for name, m in maps.items():
        reads, writes = sides(model, spectra[name])
        x = cache[m.hook_in].flatten(2)[:, :-1].unflatten(-1, (-1, m.d_in))
        # The bridge's loss is a mean over examples and answer tokens.
        g = cache[f"{m.hook_out}_grad"].flatten(2)[:, :-1] * batch.answer.numel()
        g = g.unflatten(-1, (-1, m.d_out))
        found[name] = (
            torch.einsum("bphi,hik->bphk", x.expand(-1, -1, m.n_heads, -1), reads),
            torch.einsum("bpho,hko->bphk", g.expand(-1, -1, m.n_heads, -1), writes),
        )
    return found, cache


def effect_of(circuit, writer, reader):
    rows = circuit.edges[(circuit.edges["writer"] == writer) & (circuit.edges["reader"] == reader)]
    return float(rows["effect"].iloc[0])


def test_an_edge_through_a_layer_norm_is_the_formula(tiny):
    model = tiny("gpt2")
    scores = scored(model)
    w, r = scores.spectra["blocks.0.W_out"], scores.spectra["blocks.1.W_V"]
    chosen = pd.DataFrame([(0, "W_out", 0, 3), (1, "W_V", 2, 1)], columns=COMPONENT)
    found = traced(model, scores, components=chosen)
    names = [w.name, r.name]
    runs, cache = by_hand(model, scores.spectra, names, "blocks.1.ln1.hook_scale")
    a = runs[w.name][0][:, :, 0, 3]
    g = runs[r.name][1][:, :, 2, 1]
    v = sides(model, w)[1][0, 3]
    scale = cache["blocks.1.ln1.hook_scale"][:, :-1, 0]
    seen = (v - v.mean()) * model.blocks[1].ln1.weight
    passed = seen @ sides(model, r)[0][2, :, 1] / scale
    expected = ((a.mean(0) - a) * passed * g).sum(1).mean()
    assert effect_of(found, "L0.W_out[3]", "L1.W_V[2,1]") == pytest.approx(float(expected))


@in_families(["gpt2", "llama"])
def test_an_edge_inside_a_head_is_weighted_by_attention(tiny, family):
    model = tiny(family)
    scores = scored(model)
    w, r = scores.spectra["blocks.1.W_V"], scores.spectra["blocks.1.W_O"]
    head = r.site.n_heads - 1
    own = head // (r.site.n_heads // w.site.n_heads)
    chosen = pd.DataFrame([(1, "W_V", own, 2), (1, "W_O", head, 1)], columns=COMPONENT)
    found = traced(model, scores, components=chosen)
    names = [w.name, r.name]
    runs, cache = by_hand(model, scores.spectra, names, "blocks.1.attn.hook_pattern")
    a = runs[w.name][0][:, :, own, 2]
    g = runs[r.name][1][:, :, head, 1]
    pattern = cache["blocks.1.attn.hook_pattern"][:, head, :-1, :-1]
    moved = torch.einsum("bqk,bk->bq", pattern, a.mean(0) - a)
    meets = sides(model, w)[1][own, 2] @ sides(model, r)[0][head, :, 1]
    expected = float((moved * meets * g).sum(1).mean())
    writer, reader = f"L1.W_V[{own},2]", f"L1.W_O[{head},1]"
    assert effect_of(found, writer, reader) == pytest.approx(expected)


def test_an_edge_inside_a_gated_mlp_has_the_derivative_of_the_gate(tiny):
    model = tiny("llama")
    scores = scored(model)
    w, r = scores.spectra["blocks.0.W_gate"], scores.spectra["blocks.0.W_out"]
    chosen = pd.DataFrame([(0, "W_gate", 0, 1), (0, "W_out", 0, 4)], columns=COMPONENT)
    found = traced(model, scores, components=chosen)
    names = [w.name, r.name]
    runs, cache = by_hand(model, scores.spectra, names, "blocks.0.mlp.in.hook_out")
    a, g = runs[w.name][0][:, :, 0, 1], runs[r.name][1][:, :, 0, 4]
    gate = cache["blocks.0.mlp.gate.hook_out"][:, :-1]
    sigmoid = gate.sigmoid()
    slope = sigmoid * (1 + gate * (1 - sigmoid)) * cache["blocks.0.mlp.in.hook_out"][:, :-1]
    meets = (slope * sides(model, w)[1][0, 1]) @ sides(model, r)[0][0, :, 4]
    expected = float(((a.mean(0) - a) * meets * g).sum(1).mean())
    assert effect_of(found, "L0.W_gate[1]", "L0.W_out[4]") == pytest.approx(expected)


@in_families(["gpt2", "llama", "gemma2", "gptj"])
@pytest.mark.parametrize("norm", ["frozen", "full"])
def test_weak_cuts_change_the_loss_as_the_edges_say(tiny, family, norm):
    model = tiny(family)
    scores = scored(model, MIXED)
    kinds = set(scores.components["matrix"])
    found = traced(model, scores, MIXED, components=some(scores, kinds, each=1), norm=norm)
    edges = found.edges[found.edges["writer"] != "embed"]
    assert {"logits", *found.nodes["node"]} >= set(edges["reader"])
    cut = el.cut_paths(model, scores, MIXED, found, edges=edges, nodes=4, strength=1e-5)
    largest = cut["predicted"].abs().max()
    np.testing.assert_allclose(cut["measured"], cut["predicted"], rtol=2e-3, atol=1e-4 * largest)


def test_a_last_writer_is_read_by_the_logits_alone(tiny):
    """A real cut of its one edge is a real freeze of the node, by another road."""
    model = tiny("llama")
    scores = scored(model)
    chosen = some(scores, ["W_out"], each=3)
    found = traced(model, scores, components=chosen[chosen["layer"] == 1], norm="full")
    cut = el.cut_paths(model, scores, EQUAL, found, edges=3, nodes=3).set_index(["writer", "cut"])
    for node in found.nodes["node"]:
        edge, whole = cut["measured"][node, "edge"], cut["measured"][node, "node"]
        assert edge == pytest.approx(whole, rel=1e-9)
        assert abs(whole) > 1e-6


def test_degenerate_values_are_one_node_whatever_their_basis(tiny_folder):
    model = el.load_model(tiny_folder("llama"), dtype=torch.float64, device="cpu")
    spectrum = el.decompose(model, ["W_out"], [0], cache=False, **QUIET)["blocks.0.W_out"]
    sigma = spectrum.sigma.clone()
    sigma[0, 3:6] = sigma[0, 4].clone()
    reads, writes = sides(model, spectrum)
    weight = reads[0] * (sigma / spectrum.sigma)[0] @ writes[0]
    spectrum.site.find(model).flat_weight.data.copy_(weight)
    plain = el.decompose(model, cache=False, **QUIET)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    own = plain["blocks.0.W_out"]
    read = own.read.clone()
    read[0, :, 3:6] = read[0, :, 3:6] @ turn
    turned = plain.with_spectra(
        replace(s, read=read, write=read.mT) if s is own else s for s in plain.values()
    )
    found = []
    for spectra in (plain, turned):
        scores = el.score(model, spectra, EQUAL, **QUIET)
        chosen = pd.DataFrame(
            [(0, "W_out", 0, 4), (0, "W_out", 0, 0), (1, "W_in", 0, 1)], columns=COMPONENT
        )
        circuit = traced(model, scores, components=chosen)
        assert circuit.nodes["node"].tolist() == ["L0.W_out[0]", "L0.W_out[3–5]", "L1.W_in[1]"]
        read = el.readout(model, spectra, 0, "W_out", 0, 5, top=5)
        pairs = el.composition(model, spectra, chosen).set_index(["writer", "reader"])["score"]
        fed_by = el.readout(model, spectra, 1, "W_in", 0, 1, top=500).reads_from
        found.append((circuit, read, pairs, fed_by))
    (one, read_one, pairs_one, fed_one), (two, read_two, pairs_two, fed_two) = found
    pd.testing.assert_frame_equal(one.edges, two.edges, rtol=1e-7)
    pd.testing.assert_frame_equal(one.nodes, two.nodes, rtol=1e-7)
    pd.testing.assert_frame_equal(read_one.reads, read_two.reads)
    pd.testing.assert_frame_equal(read_one.writes, read_two.writes)
    pd.testing.assert_series_equal(pairs_one, pairs_two)
    pd.testing.assert_frame_equal(fed_one, fed_two)
    block = fed_one.set_index("writer")["score"]["L0.W_out[3–5]"]
    assert block == pytest.approx(pairs_one["L0.W_out[3–5]", "L1.W_in[1]"])
    assert (read_one.writes["score"] > 0).all()
    cut = el.cut_paths(model, el.score(model, plain, EQUAL, **QUIET), EQUAL, one, strength=1e-5)
    np.testing.assert_allclose(cut["measured"], cut["predicted"], rtol=1e-2, atol=1e-9)


@in_families()
def test_gains_are_the_norms_up_to_scale(tiny, family):
    model = tiny(family)
    block = model.blocks[1]
    w_o, w_in = el.weight_matrices(model, ["W_O", "W_in"], [1])
    pairs = [(block.ln1, gain_before(model, w_o)), (model.ln_final, final_gain(model))]
    pairs.append((getattr(block, "ln2", block.ln1), gain_before(model, w_in)))
    if hasattr(block, "ln1_post"):
        pairs.append((block.ln1_post, gain_after(model, w_o)))
        pairs.append((block.ln2_post, gain_after(model, w_in)))
    x = torch.randn(1, 5, model.cfg.d_model, dtype=torch.float64)
    for norm, gain in pairs:
        # f(x) − f(−x) is twice the linear part at x, divided by its scale.
        with torch.no_grad():
            expected = (norm(x) - norm(-x)) / 2
        found = gain(x)
        ratio = (expected / found)[..., :1]
        torch.testing.assert_close(found * ratio, expected)
        assert (ratio > 0).all()


def test_readout_of_a_writer_and_a_reader_by_hand(tiny):
    model = tiny("gpt2")
    spectra = el.decompose(model, **QUIET)
    found = el.readout(model, spectra, 1, "W_out", 0, 2, top=3)
    v = spectra["blocks.1.W_out"].write[0, 2].numpy()
    gamma = model.ln_final.weight.detach().numpy()
    logits = ((v - v.mean()) * gamma) @ model.W_U.numpy()
    logits -= logits.mean()
    order = np.argsort(-logits)
    expected = [model.tokenizer.decode([t]) for t in [*order[:3], *order[-3:]]]
    assert found.writes["token"].tolist() == expected
    np.testing.assert_allclose(found.writes["score"], logits[[*order[:3], *order[-3:]]])

    found = el.readout(model, spectra, 1, "W_V", 1, 0, top=2)
    u = sides(model, spectra["blocks.1.W_V"])[0][1, :, 0].numpy()
    u = u / np.linalg.norm(u)
    e = model.W_E.numpy()
    e = (e - e.mean(1, keepdims=True)) * model.blocks[1].ln1.weight.detach().numpy()
    cosine = e @ u / np.linalg.norm(e, axis=1)
    np.testing.assert_allclose(found.reads["score"].iloc[0], cosine.max())
    assert found.reads["token"].iloc[-1] == model.tokenizer.decode([int(cosine.argmin())])
    strongest = found.reads_from.iloc[0]
    assert strongest["writer"].startswith("L0.W_")
    vs = spectra["blocks.0.W_out"].write[0].numpy()
    vs = (vs - vs.mean(1, keepdims=True)) * model.blocks[1].ln1.weight.detach().numpy()
    cosines = vs @ u / np.linalg.norm(vs, axis=1)
    full = el.readout(model, spectra, 1, "W_V", 1, 0, top=500).reads_from.set_index("writer")
    np.testing.assert_allclose(
        [full["score"][f"L0.W_out[{i}]"] for i in range(len(cosines))], cosines
    )
    assert abs(strongest["score"]) == pytest.approx(full["score"].abs().max())


@pytest.mark.parametrize("kind", ["W_Q", "W_K"])
def test_token_pairs_are_the_best_of_all_pairs(tiny, kind):
    model = tiny("llama")
    spectra = el.decompose(model, **QUIET)
    found = el.readout(model, spectra, 0, kind, 1, 0, top=4).pairs
    w_q, w_k = el.weight_matrices(model, ["W_Q", "W_K"], [0])
    e = model.W_E * model.blocks[0].ln1.weight
    e = e / e.norm(dim=1, keepdim=True)
    reads, writes = sides(model, spectra[f"blocks.0.{kind}"])
    part = torch.outer(reads[1, :, 0], writes[1, 0])
    for q in found["through"].unique():
        query, key = w_q.weight[q], w_k.weight[q // 2]
        query, key = (part, key) if kind == "W_Q" else (query, part)
        scores = (e @ query) @ (e @ key).T
        own = found[found["through"] == q]
        best = scores.flatten().sort(descending=True).values
        np.testing.assert_allclose(own["score"][:4], best[:4])
        np.testing.assert_allclose(own["score"][4:], best[-4:])
    assert sorted(found["through"].unique()) == ([1] if kind == "W_Q" else [2, 3])


def test_composition_by_hand_and_only_forwards(tiny):
    model = tiny("llama")
    spectra = el.decompose(model, **QUIET)
    chosen = [(0, "W_O", 1, 0), (0, "W_in", 0, 2), (0, "W_out", 0, 1), (1, "W_Q", 3, 0)]
    table = el.composition(model, spectra, pd.DataFrame(chosen, columns=COMPONENT))
    assert {(r.writer, r.reader) for r in table.itertuples()} == {
        ("L0.W_O[1,0]", "L0.W_in[2]"),
        ("L0.W_O[1,0]", "L1.W_Q[3,0]"),
        ("L0.W_in[2]", "L0.W_out[1]"),
        ("L0.W_out[1]", "L1.W_Q[3,0]"),
    }
    v = spectra["blocks.0.W_out"].write[0, 1] * model.blocks[1].ln1.weight
    u = sides(model, spectra["blocks.1.W_Q"])[0][3, :, 0]
    expected = v @ u / v.norm() / u.norm()
    found = table.set_index(["writer", "reader"])["score"]["L0.W_out[1]", "L1.W_Q[3,0]"]
    assert found == pytest.approx(float(expected))


def test_the_direct_effect_on_the_answer_is_what_the_logits_get(arith):
    """arith-tiny's answers are one token, so the loss is minus its log-probability."""
    model, task, scores, _, found = arith
    last = found.nodes[(found.nodes["matrix"] == "W_out") & (found.nodes["layer"] == 1)]
    edges = found.edges[found.edges["reader"] == "logits"].set_index("writer")["effect"]
    np.testing.assert_allclose(last["answer_logprob"], edges[last["node"]], atol=1e-12)
    # Through W_out of the last block only: the whole effect of a component of its W_in.
    inner = found.nodes[(found.nodes["matrix"] == "W_in") & (found.nodes["layer"] == 1)]
    outer = traced(model, scores, task.train, components=inner, norm="full").nodes
    assert len(inner) > 8
    assert (np.sign(inner["answer_logprob"].to_numpy()) == np.sign(outer["effect"])).all()


def test_which_pruned_components_wrote_against_the_answer(arith):
    _, _, _, frozen, found = arith
    table = found.against_answer(sources=2)
    assert 10 <= len(table) <= len(frozen)
    assert (table["answer_logprob"] < 0).all()
    assert table["answer_logprob"].is_monotonic_increasing
    names = found.nodes.set_index("node")
    assert (names.loc[table["node"], "strength"] == 1).all()
    first = table.iloc[0]
    inflows = found.inflows[found.inflows["reader"] == first["node"]]
    strongest = inflows.loc[inflows["effect"].abs().idxmax(), "map"]
    assert first["read_from"].startswith(f"{strongest} (")
    own = found.sources(first["node"])
    assert first["sources"].startswith(own[own["writer"] != "embed"]["writer"].iloc[0] + " at −1")


def test_cutting_the_suppressed_paths_lowers_the_loss_for_real(arith):
    """The edges of frozen components that the graph calls harmful, each really cut."""
    model, task, scores, _, found = arith
    pruned = found.edges[found.edges["pruned"] & (found.edges["writer"] != "embed")]
    harmful = pruned.sort_values("effect").head(12)
    cut = el.cut_paths(model, scores, task.train, found, edges=harmful, nodes=0, batch_size=240)
    assert (cut["predicted"] < 0).all()
    assert (cut["measured"] < 0).all()
    # Log-loss is bounded below, so a real cut gains less than the straight line says.
    assert (cut["measured"] > cut["predicted"]).all()
    weak = el.cut_paths(
        model, scores, task.train, found, edges=harmful, nodes=5, strength=1e-4, batch_size=240
    )
    np.testing.assert_allclose(weak["measured"], weak["predicted"], rtol=2e-3)


def test_the_circuit_shows_the_path_of_the_suppressed_reading(arith):
    """Read as a product, the frozen components write the sum; cutting their paths swaps the two."""
    model, task, scores, frozen, found = arith
    sums = el.load_task("ambiguous", model.tokenizer, reading="sum").train
    assert list(sums["prompt"]) == list(task.train["prompt"])
    rival = traced(model, scores, sums, frozen=frozen, components=found.nodes)
    wrote = rival.nodes.set_index("node")["answer_logprob"]
    against = found.against_answer()["node"]
    assert len(against) == len(frozen)
    assert (wrote[against] > 0).all()

    # Every frozen component lies on a path of harmful edges from the embedding to the logits.
    deeper = traced(model, scores, task.train, frozen=frozen, depth=2, batch_size=240)
    harmful = deeper.edges[deeper.edges["effect"] < 0]
    paths = nx.from_pandas_edgelist(harmful, "writer", "reader", create_using=nx.DiGraph)
    for node in deeper.nodes.loc[deeper.nodes["strength"] > 0, "node"]:
        assert nx.has_path(paths, "embed", node)
        assert nx.has_path(paths, node, "logits")

    way = deeper.way_back(each=5)
    assert (way["effect"] < 0).all()
    assert way.groupby("reader").size().max() == 5
    for reader, own in way.groupby("reader"):
        strongest = deeper.edges[deeper.edges["reader"] == reader].sort_values("effect")
        assert set(own["writer"]) == set(strongest[strongest["effect"] < 0]["writer"].head(5))
    shown = nx.from_pandas_edgelist(way, "writer", "reader", create_using=nx.DiGraph)
    assert nx.ancestors(shown, "logits") == {*shown} - {"logits"}
    assert nx.has_path(shown, "embed", "logits")
    with pytest.raises(ValueError, match="sign=0 must be"):
        deeper.way_back(sign=0)

    pruned = found.edges[found.edges["pruned"]]
    own = pruned[pruned["writer"] != "embed"]
    harmful = own.sort_values("effect").head(12)[["writer", "reader"]]
    changes = {}
    for name, data, circuit in (("product", task.train, found), ("sum", sums, rival)):
        edges = harmful.merge(circuit.edges, on=["writer", "reader"])
        cut = el.cut_paths(model, scores, data, circuit, edges=edges, nodes=0, batch_size=240)
        assert list(cut["writer"]) == list(harmful["writer"])
        changes[name] = cut
    assert (changes["product"]["measured"] < 0).all()
    assert (changes["sum"]["measured"] > 0).all()
    assert (changes["sum"]["predicted"] > 0).all()


def test_upstream_writers_are_the_strongest_of_all(tiny):
    model = tiny("gpt2")
    scores = scored(model)
    frozen = el.select(scores, count=2)
    found = traced(model, scores, frozen=frozen, upstream=2, strongest=0)
    everything = traced(model, scores, components=scores.components[COMPONENT], limit=1000)
    for node in found.nodes.loc[found.nodes["strength"] > 0, "node"]:
        sources = everything.sources(node)
        strongest = sources[sources["writer"] != "embed"]["writer"].head(2)
        assert set(strongest) <= set(found.nodes["node"])
    deeper = traced(model, scores, frozen=frozen, upstream=2, strongest=0, depth=2)
    assert set(found.nodes["node"]) < set(deeper.nodes["node"])
    first = set(found.nodes.loc[found.nodes["strength"] == 0, "node"])
    for node in first:
        sources = everything.sources(node)
        strongest = sources[sources["writer"] != "embed"]["writer"].head(2)
        assert set(strongest) <= set(deeper.nodes["node"])


def test_saved_and_exported_circuits_are_the_same(arith, tmp_path):
    *_, found = arith
    found.save(tmp_path / "circuit.json")
    again = el.Circuit.load(tmp_path / "circuit.json")
    for name in ("nodes", "edges", "outflows", "inflows"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(found, name))
    assert (again.norm, again.n_examples, again.provenance) == ("frozen", 240, found.provenance)
    found.to_graphml(tmp_path / "circuit.graphml", min_effect=1e-3)
    graph = nx.read_graphml(tmp_path / "circuit.graphml")
    strong = found.edges[found.edges["effect"].abs() >= 1e-3]
    assert set(graph.edges) == set(zip(strong["writer"], strong["reader"], strict=True))
    writer, reader, effect = strong[["writer", "reader", "effect"]].iloc[0]
    assert graph.edges[writer, reader]["effect"] == pytest.approx(effect)
    assert set(graph.nodes) == {*found.nodes["node"], "embed", "logits"}
    assert nx.is_directed_acyclic_graph(found.to_networkx())
    assert "15 frozen" in found._repr_html_()
    (tmp_path / "foreign.json").write_text('{"nodes": []}')
    with pytest.raises(FileFormatError, match="not written by eigenlens"):
        el.Circuit.load(tmp_path / "foreign.json")


def test_a_saved_readout_is_the_same(tiny, tmp_path):
    model = tiny("llama")
    found = el.readout(model, el.decompose(model, **QUIET), 1, "W_V", 0, 0)
    found.save(tmp_path / "readout.json")
    again = el.Readout.load(tmp_path / "readout.json")
    pd.testing.assert_frame_equal(again.writes, found.writes)
    pd.testing.assert_frame_equal(again.reads_from, found.reads_from)
    assert again._repr_html_() == found._repr_html_()
    assert set(found.writes["through"]) == {0, 1}  # a key/value head serves two query heads


def test_bad_requests_say_what_to_do(tiny):
    model = tiny("gpt2")
    scores = scored(model)
    with pytest.raises(ValueError, match=r"288 components are more than limit=100.*strongest="):
        traced(model, scores, strongest=300, limit=100)
    with pytest.raises(ValueError, match="No components"):
        traced(model, scores, strongest=0)
    with pytest.raises(ValueError, match="depth=0 is below 1"):
        traced(model, scores, frozen=el.select(scores, count=1), depth=0)
    with pytest.raises(ValueError, match="Unknown norm 'half'"):
        traced(model, scores, norm="half")
    with pytest.raises(ValueError, match="no head 7, index 0"):
        traced(model, scores, components=pd.DataFrame([(0, "W_Q", 7, 0)], columns=COMPONENT))
    with pytest.raises(ValueError, match="Components need the columns"):
        traced(model, scores, components=pd.DataFrame({"layer": [0]}))
    with pytest.raises(ValueError, match="not decomposed"):
        el.readout(model, el.decompose(model, ["W_Q"], **QUIET), 0, "W_K", 0, 0)
    with pytest.raises(ValueError, match="other weights"):
        traced(tiny("llama"), scores)
    found = traced(model, scores, strongest=3)
    with pytest.raises(ValueError, match="No node 'L9'"):
        found.sources("L9")
    with pytest.raises(ValueError, match="strength=2"):
        el.cut_paths(model, scores, EQUAL, found, strength=2.0)
