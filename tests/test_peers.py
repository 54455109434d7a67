"""Scores of other methods, against plain transformers, brute force and completeness."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_models import EQUAL, MIXED, in_families
from transformers import AutoModelForCausalLM

import eigenlens as el
from eigenlens.evaluation import evaluate
from eigenlens.exact import exact_effects
from eigenlens.far_side import output_vectors
from eigenlens.metrics import answer_loss
from eigenlens.paper.studies import peers
from eigenlens.passes import FiniteCheck, forward_backward
from eigenlens.scoring.by_cache import effects_by_cache
from eigenlens.tasks import make_batches

PAIRED = EQUAL.add_column("corrupt", [EQUAL[(i + 1) % len(EQUAL)]["prompt"] for i in range(6)])


def quiet(model, spectra, data, **options):
    return el.score(model, spectra, data, progress=False, **options)


def spectra_of(model, **options):
    return el.decompose(model, progress=False, **options)


def whole(scores, name):
    """Rows of one matrix."""
    c = scores.components
    layer, kind = name.split(".")[1:]
    return np.flatnonzero((c["layer"] == int(layer)) & (c["matrix"] == kind))


def same(found, expected):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8 * scale)


def test_gradient_times_activation_is_the_product(tiny):
    model = tiny("gpt2")  # has biases, so that a coordinate of zero is not that at input zero
    spectra = spectra_of(model)
    found = quiet(model, spectra, MIXED, criterion="grad_activation", batch_size=2)
    total = dict.fromkeys(spectra, 0.0)
    for batch in make_batches(MIXED, model, 8):

        def add(site, h, g, values, batch=batch):
            s = spectra[site.name]
            there = batch.attention_mask[..., None, None]
            total[site.name] -= (s.coordinates(h) * s.slopes(g) * there).sum((0, 1)).flatten()

        sites = [s.site for s in spectra.values()]
        forward_backward(model, sites, batch, answer_loss, add, FiniteCheck())
    same(found.delta_loss, torch.cat([*total.values()]).numpy() / len(MIXED))
    means = quiet(model, spectra, MIXED, batch_size=2).means
    np.testing.assert_allclose(found.means.values, means.values)


@pytest.mark.parametrize(
    "family", ["gemma3", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gpt2", "gptj"))]
)
@pytest.mark.parametrize("reference", ["mean", "pair", "resample"])
def test_scores_along_activations_add_up_to_replacing_the_matrix(tiny, family, reference):
    model = tiny(family)
    spectra = spectra_of(model, matrices=["W_V", "W_Q", "W_out"], layers=[1])
    options = {"criterion": "eap_ig_activations", "steps": 24, "reference": reference}
    scores = quiet(model, spectra, PAIRED, batch_size=6, **options)
    for name in spectra:
        rows = whole(scores, name)
        if reference == "mean":
            frozen = el.FrozenSet.from_scores(scores, rows)
            before = el.evaluate(model, PAIRED).loss
            with el.freeze(model, frozen):
                real = el.evaluate(model, PAIRED).loss - before
        else:
            real = _patched(model, spectra[name], reference)
        assert scores.delta_loss[rows].sum() == pytest.approx(real, rel=2e-3, abs=1e-5)


def _patched(model, spectrum, reference):
    """Rise of the loss when a site holds what it held in another run, by hand."""
    hook = spectrum.site.hook
    seen = []

    def run(data, hooks):
        (batch,) = make_batches(data, model, 6)
        mask = batch.attention_mask.long()
        with torch.no_grad(), model.hooks(fwd_hooks=hooks):
            logits = model(batch.tokens, attention_mask=mask)[:, batch.n_prompt - 1 :]
        logs = logits.log_softmax(-1).gather(-1, batch.answer[..., None])[..., 0]
        return -logs.sum(-1), batch.indices

    corrupt = Dataset.from_dict({"prompt": PAIRED["corrupt"], "answer": PAIRED["answer"]})
    own, order = run(PAIRED, [])
    if reference == "pair":
        _, other_order = run(corrupt, [(hook, lambda value, hook: seen.append(value))])
        assert order == other_order
        other = seen[0]
    else:
        run(PAIRED, [(hook, lambda value, hook: seen.append(value))])
        step = int(torch.randint(1, 6, (), generator=torch.Generator().manual_seed(0)))
        other = seen[0].roll(step, 0)
    patched, _ = run(PAIRED, [(hook, lambda value, hook: other)])
    return float((patched - own).mean())


def test_scores_along_inputs_equal_plain_transformers(tiny, tiny_folder):
    """Integrated slopes from autograd over ``inputs_embeds`` of the model without any bridge."""
    model = tiny("llama")
    steps = 3
    spectra = spectra_of(model, matrices=["W_V", "W_out"])
    found = quiet(model, spectra, EQUAL, criterion="eap_ig_inputs", steps=steps)
    plain = AutoModelForCausalLM.from_pretrained(
        tiny_folder("llama"), dtype=torch.float64, attn_implementation="eager"
    ).eval()
    (batch,) = make_batches(EQUAL, model, 6)
    embedded = plain.get_input_embeddings()(batch.tokens).detach()
    mean = embedded.mean(0, keepdim=True)
    maps = {
        f"blocks.{i}.{kind}": part
        for i, layer in enumerate(plain.model.layers)
        for kind, part in (("W_V", layer.self_attn.v_proj), ("W_out", layer.mlp.down_proj))
    }

    def run(inputs):
        kept = {}

        def keep(name):
            def hook(module, args, output):
                kept[name] = output

            return hook

        handles = [part.register_forward_hook(keep(name)) for name, part in maps.items()]
        logits = plain(inputs_embeds=inputs).logits[:, batch.n_prompt - 1 :]
        for handle in handles:
            handle.remove()
        logs = logits.log_softmax(-1).gather(-1, batch.answer[..., None])
        return -logs.sum(), kept

    with torch.enable_grad():
        _, clean = run(embedded)
        slopes = dict.fromkeys(maps, 0)
        along = 0
        for node in range(steps):
            inputs = (mean + (node + 0.5) / steps * (embedded - mean)).requires_grad_()
            loss, kept = run(inputs)
            grads = torch.autograd.grad(loss, [inputs, *(kept[name] for name in maps)])
            along = along + ((embedded - mean) * grads[0]).sum() / steps
            for name, grad in zip(maps, grads[1:], strict=True):
                slopes[name] = slopes[name] + grad / steps
    expected = []
    for name, s in spectra.items():
        delta = (clean[name].mean(0, keepdim=True) - clean[name]).detach()
        heads = (
            delta.unflatten(-1, (s.site.n_heads, -1)),
            slopes[name].unflatten(-1, (s.site.n_heads, -1)),
        )
        v = output_vectors(model, s)
        c, g = (torch.einsum("bphd, hkd -> bphk", part, v) for part in heads)
        expected.append((c * g).sum((0, 1)).flatten())
    same(found.delta_loss, torch.cat(expected).numpy() / len(EQUAL))


@in_families(["llama", "gemma3", "gpt2", "bloom", "gptj", "phi"])
def test_qk_correction_is_the_change_of_attention_times_its_gradient(tiny, tiny_folder, family):
    """Attention of transformers itself, with the query or key of one component replaced."""
    model = tiny(family)
    layer = 1
    spectra = spectra_of(model, matrices=["W_Q", "W_K"], layers=[layer])
    found = quiet(model, spectra, EQUAL, criterion="atp_qk", batch_size=6)
    plain = quiet(model, spectra, EQUAL, batch_size=6)
    values = spectra_of(model, matrices=["W_V"], layers=[layer])["blocks.1.W_V"].site
    out = spectra_of(model, matrices=["W_O"], layers=[layer])["blocks.1.W_O"].site
    (batch,) = make_batches(EQUAL, model, 6)
    held = {}

    def add(site, h, g, metric):
        held[site.name] = h, g

    forward_backward(model, [values, out], batch, answer_loss, add, FiniteCheck())
    v, g = held[values.name][0], held[out.name][1]
    v = v.repeat_interleave(out.n_heads // values.n_heads, dim=2)
    by_pattern = torch.einsum("bqhd, bkhd -> bhqk", g, v)  # ∂L/∂A

    def patterns(hooks):
        seen = []
        hooks = [*hooks, (f"blocks.{layer}.attn.hook_pattern", lambda a, hook: seen.append(a))]
        with torch.no_grad(), model.hooks(fwd_hooks=hooks):
            model(batch.tokens)
        return seen[0]

    base = patterns([])
    rng = np.random.default_rng(0)
    rows = rng.choice(len(found), 12, replace=False)
    for row in rows:
        c = found.components.iloc[row]
        s = spectra[f"blocks.{layer}.{c['matrix']}"]
        q = s.read[c["head"], :, c["index"]]

        def edit(value, hook, s=s, q=q, head=c["head"]):
            h = value.reshape(*value.shape[:2], s.site.n_heads, s.site.width).clone()
            own = h[:, :, head] @ q
            h[:, :, head] += (own.mean(0) - own)[..., None] * q
            return h.reshape(value.shape)

        change = patterns([(s.site.hook, edit)]) - base
        expected = float((change * by_pattern).sum()) / len(EQUAL)
        assert found.delta_loss[row] == pytest.approx(expected, rel=1e-6, abs=1e-12)
    # Nearer to the truth than the slope where attention is what matters.
    every = np.arange(0, len(found), 2)
    exact = exact_effects(model, plain, every, EQUAL, progress=False).mean(1)
    errors = [np.abs(s.delta_loss[every] - exact).mean() for s in (found, plain)]
    assert errors[0] < errors[1]


def test_qk_correction_leaves_other_maps_as_they_are(tiny):
    model = tiny("llama")
    spectra = spectra_of(model)
    one, other = (
        quiet(model, spectra, MIXED, criterion=name, batch_size=2) for name in ("atp_qk", "mean")
    )
    rest = ~one.components["matrix"].isin(["W_Q", "W_K"]).to_numpy()
    same(one.delta_loss[rest], other.delta_loss[rest])
    assert not np.allclose(one.delta_loss[~rest], other.delta_loss[~rest], rtol=0.01)


@in_families(["llama", "gemma2", "gptj"])
def test_graddrop_is_the_mean_magnitude_without_one_layer(tiny, family):
    """By hand: gradients of the model whose layer's attention and MLP put out constants."""
    model = tiny(family)
    spectra = spectra_of(model)
    found = quiet(model, spectra, EQUAL, criterion="atp_drop", batch_size=6)
    base = quiet(model, spectra, EQUAL)
    plain = effects_by_cache(model, spectra, EQUAL)
    (batch,) = make_batches(EQUAL, model, 6)
    magnitude = dict.fromkeys(spectra, 0.0)
    for layer in (0, 1):
        kept = {}
        held = []

        def constant(value, hook, kept=kept):
            return kept[hook.name]

        names = [f"blocks.{layer}.{part}.hook_out" for part in ("attn", "mlp")]
        with (
            torch.no_grad(),
            model.hooks(
                fwd_hooks=[
                    (name, lambda v, hook, kept=kept: kept.update({hook.name: v})) for name in names
                ]
            ),
        ):
            model(batch.tokens)

        def add(site, h, g, values, held=held):
            held.append((site.name, h, g))

        sites = [s.site for s in spectra.values() if s.site.layer != layer]
        hooks = [(name, constant) for name in names]
        forward_backward(model, sites, batch, answer_loss, add, FiniteCheck(), hooks)
        for name, h, g in held:
            s = spectra[name]
            c = s.coordinates(h)
            effect = ((c.mean(0) - c) * s.slopes(g)).sum(1)
            magnitude[name] = magnitude[name] + effect.abs().mean(0).flatten()
    expected = torch.cat([*magnitude.values()]).numpy() * np.sign(base.delta_loss)
    same(found.delta_loss, expected)
    # Without the one other layer, what is left of a component of the last layer is all it does.
    last = (base.components["layer"] == 1).to_numpy()
    single = np.concatenate([e.sum(1).abs().mean(0).flatten() for e in plain.values()])
    same(np.abs(found.delta_loss[last]), single[last])


def test_atp_star_has_both_corrections(tiny):
    model = tiny("llama")
    spectra = spectra_of(model)
    star, drop, qk = (
        quiet(model, spectra, EQUAL, criterion=f"atp_{name}") for name in ("star", "drop", "qk")
    )
    rest = ~star.components["matrix"].isin(["W_Q", "W_K"]).to_numpy()
    same(star.delta_loss[rest], drop.delta_loss[rest])
    mine = ~rest
    assert (np.sign(star.delta_loss[mine]) == np.sign(qk.delta_loss[mine])).all()
    assert (
        np.abs(star.delta_loss[mine & (star.components["layer"] == 1)])
        >= np.abs(qk.delta_loss[mine & (star.components["layer"] == 1)]) - 1e-12
    ).all()  # of the last layer nothing is dropped: |mean| ≤ mean of magnitudes


@pytest.mark.parametrize("basis", ["qk_ov", "random"])
@pytest.mark.parametrize("criterion", ["atp_star", "eap_ig_activations", "eap_ig_inputs"])
def test_other_bases_and_batches_of_two_give_the_same(tiny, basis, criterion):
    model = tiny("llama")
    spectra = spectra_of(model, basis=basis)
    options = {"criterion": criterion, "steps": 2}
    one = quiet(model, spectra, MIXED, batch_size=2, **options)
    other = quiet(model, spectra, MIXED, batch_size=5, **options)
    np.testing.assert_allclose(one.delta_loss, other.delta_loss, rtol=1e-7, atol=1e-10)


def test_peers_are_saved_and_not_mixed_up(tiny, tmp_path):
    model = tiny("llama")
    spectra = spectra_of(model, matrices=["W_V"])
    scores = quiet(model, spectra, EQUAL, criterion="eap_ig_inputs", steps=1)
    scores.save(tmp_path / "scores.parquet")
    back = el.Scores.load(tmp_path / "scores.parquet")
    np.testing.assert_array_equal(back.delta_loss, scores.delta_loss)
    assert back.with_criterion("eap_ig_inputs").criterion == "eap_ig_inputs"
    with pytest.raises(ValueError, match=r"atp_star.*score again"):
        back.with_criterion("atp_star")
    with pytest.raises(ValueError, match="steps=0"):
        quiet(model, spectra, EQUAL, criterion="eap_ig_inputs", steps=0)


@pytest.mark.slow
def test_study_counts_verifications_and_what_scores_cost(tmp_path):
    file = tmp_path / "peers.yaml"
    file.write_text(
        "models: [arith-tiny]\nn_examples: 4\nsteps: 1\nk: [2, 6]\n"
        "tasks: {product: {task: ambiguous, arguments: {n_train: 20}}}\n"
    )
    found = peers.run(config=file)
    assert set(found.table["method"]) >= set(peers.METHODS)
    model = el.load_model("arith-tiny", device="cpu")
    data = el.load_task("ambiguous", n_train=20).train.select(range(4))
    scores = quiet(model, spectra_of(model), data, criterion="mean")
    exact = exact_effects(model, scores, np.arange(len(scores)), data, progress=False).mean(1)
    harmful = set(np.argsort(exact)[:6].tolist())
    found_at = []
    order = np.argsort(scores.delta_loss, kind="stable").tolist()
    for verified, row in enumerate(order, start=1):
        if row in harmful:
            found_at.append(verified)
    (mean,) = found.table[(found.table["method"] == "mean") & (found.table["k"] == 6)].to_dict(
        "records"
    )
    assert mean["found_at"] == " ".join(map(str, found_at))
    stated = found.summary.set_index("scores").loc["attribution patching"]
    within = sum(place + 3 <= 50 for place in found_at)  # a forward and a backward pass
    assert int(stated["found, 50 passes"]) == within
    # The most harmful component is that, by the evaluation of the frozen model.
    worst = el.FrozenSet.from_scores(scores, np.argsort(exact)[:1])
    before = evaluate(model, data, progress=False).loss
    with el.freeze(model, worst):
        assert evaluate(model, data, progress=False).loss - before == pytest.approx(
            exact.min(), abs=1e-5
        )
    file.write_text("models: []\ntasks: {}\n")
    with pytest.raises(ValueError, match="not a valid study"):
        peers.run(config=file)
