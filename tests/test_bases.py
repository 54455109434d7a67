"""Every basis against what its components claim to be."""

import numpy as np
import pytest
import torch
from tiny_models import EQUAL, MIXED, in_families

import eigenlens as el
from eigenlens.exact import exact_effects
from eigenlens.far_side import scaled_heads
from eigenlens.gates import Gates
from eigenlens.metrics import answer_logits
from eigenlens.scoring.by_cache import effects_by_cache
from eigenlens.tasks import make_batches

BASES = ("svd", "qk_ov", "random", "neurons", "pca")


def spectra_of(model, basis):
    data = MIXED if basis == "pca" else None
    return el.decompose(model, basis=basis, data=data, progress=False)


@in_families(["gpt2", "llama"])
@pytest.mark.parametrize("basis", BASES)
def test_write_vectors_are_dual_to_read_vectors(tiny, family, basis):
    """``w_i · r_j = δ_ij``: setting one coordinate leaves the others as they are."""
    for s in spectra_of(tiny(family), basis).values():
        h = torch.randn(4, s.site.n_heads, s.site.width, dtype=torch.float64)
        c = s.coordinates(h)
        wanted = torch.randn_like(c)
        again = s.coordinates(h + s.compose(wanted - c))
        torch.testing.assert_close(again, wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("basis", BASES)
def test_scores_gates_and_exact_effects_agree_on_every_basis(tiny, family, basis):
    model = tiny(family)
    spectra = spectra_of(model, basis)
    for reference in ("mean", "shared", "zero"):
        scores = el.score(model, spectra, EQUAL, reference=reference, progress=False)
        by_cache = effects_by_cache(model, spectra, EQUAL, reference=reference)
        expected = torch.cat([e.sum(1).mean(0).flatten() for e in by_cache.values()])
        scale = float(expected.abs().max())
        np.testing.assert_allclose(scores.delta_loss, expected, atol=1e-9 * scale)
        with Gates(model, scores) as gates:
            slopes = [gates.gradient(batch)[1] for batch in make_batches(EQUAL, model, 3)]
        slope = torch.stack(slopes).sum(0) / len(EQUAL)
        np.testing.assert_allclose(slope, scores.delta_loss, atol=1e-9 * scale)
        rows = np.arange(0, len(scores), 61)
        exact = exact_effects(model, scores, rows, EQUAL, progress=False)
        before = el.evaluate(model, EQUAL, progress=False).examples["loss"]
        for row, effect in zip(rows, exact, strict=True):
            with el.freeze(model, el.FrozenSet.from_scores(scores, np.array([row]))):
                after = el.evaluate(model, EQUAL, progress=False).examples["loss"]
            np.testing.assert_allclose(effect, after - before, atol=1e-9)


@pytest.mark.parametrize("basis", BASES)
def test_a_frozen_set_of_every_basis_survives_a_round_trip(tiny, tmp_path, basis):
    model = tiny("llama")
    scores = el.score(model, spectra_of(model, basis), MIXED, progress=False)
    frozen = el.select(scores, 0.2)
    (batch,) = make_batches(MIXED, model, 5)
    with torch.no_grad(), el.freeze(model, frozen):
        expected = answer_logits(model, batch)
    for directions in (False, True):
        frozen.save(tmp_path / "frozen.safetensors", directions=directions)
        again = el.FrozenSet.load(tmp_path / "frozen.safetensors", model)
        assert (again.directions is not None) == (directions or basis == "pca")
        with torch.no_grad(), el.freeze(model, again):
            torch.testing.assert_close(answer_logits(model, batch), expected)
        again.save(tmp_path / "again.safetensors", directions=directions)


@in_families(["gpt2", "llama", "phi", "qwen3"])
def test_joint_components_give_the_joint_product_back(tiny, family):
    """Singular values and vectors of ``W_V W_O`` and ``W_Q W_Kᵀ``, head by head."""
    model = tiny(family)
    maps = {m.kind: m for m in el.weight_matrices(model, layers=[1])}
    spectra = el.decompose(model, layers=[1], basis="qk_ov", progress=False)
    heads = maps["W_Q"].n_heads
    w = {k: m.weight.repeat_interleave(heads // m.n_heads, 0) for k, m in maps.items() if m.site}
    for kind, product in (
        ("OV", w["W_V"] @ w["W_O"]),
        ("QK", w["W_Q"] @ w["W_K"].mT),
    ):
        s = spectra[f"blocks.1.{kind}"]
        sigma = torch.linalg.svdvals(product)[:, : s.sigma.shape[1]]
        torch.testing.assert_close(s.sigma, sigma, rtol=1e-9, atol=1e-12)
        if kind == "OV":
            u, v = w["W_V"] @ s.read, s.write @ w["W_O"]
        else:
            u, v = w["W_Q"] @ s.read, s.write @ w["W_K"].mT
        torch.testing.assert_close(u @ v, product, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(u.norm(dim=1), s.sigma, rtol=1e-8, atol=1e-11)


def _keep_largest(model, kind, k):
    """Freeze all but the k largest joint components of every head, at zero input."""
    spectra = el.decompose(model, [kind], basis="qk_ov", progress=False)
    scores = el.score(model, spectra, EQUAL, reference="zero", progress=False)
    return el.FrozenSet.from_scores(scores, np.flatnonzero(scores.components["index"] >= k))


@in_families(["gpt2", "opt", "bloom"])
@pytest.mark.parametrize("kind", ["OV", "QK"])
def test_freezing_all_but_k_truncates_the_joint_matrix(tiny_folder, family, kind):
    """Without rotary embeddings, at any distance, biases included.

    The oracle writes ``U_k U_kᵀ W`` into the first map of the joint product, whose product with the
    second is the truncated joint matrix; biases stay as they are.
    """
    model = el.load_model(tiny_folder(family), dtype=torch.float64, device="cpu")
    frozen = _keep_largest(model, kind, 3)
    (batch,) = make_batches(EQUAL, model, 6)
    with torch.no_grad(), el.freeze(model, frozen):
        hooked = answer_logits(model, batch)
    for layer in (0, 1):
        maps = {m.kind: m for m in el.weight_matrices(model, layers=[layer])}
        one = maps["W_V" if kind == "OV" else "W_Q"]
        two = maps["W_O"].weight if kind == "OV" else maps["W_K"].weight.mT
        u, _, _ = torch.linalg.svd(one.weight @ two, full_matrices=False)
        truncated = u[:, :, :3] @ u[:, :, :3].mT @ one.weight
        one.flat_weight.data.copy_(truncated.transpose(0, 1).flatten(1))
    with torch.no_grad():
        edited = answer_logits(model, batch)
    torch.testing.assert_close(hooked, edited, rtol=1e-9, atol=1e-10)


def test_rotated_scores_are_truncated_at_distance_zero(tiny):
    """With rotary embeddings, a query's score with the key at its own position is the joint map's.

    A prompt of one token has no other; its rotation by the same angle cancels.
    """
    model = tiny("llama")
    frozen = _keep_largest(model, "QK", 3)
    name = "blocks.1.attn.hook_attn_scores"
    tokens = torch.tensor([[9]])
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=[name, "blocks.1.attn.q.hook_in"])
        layer_one = frozen.components["layer"] == 1
        rows = np.flatnonzero(layer_one)
        only = el.FrozenSet(
            frozen.components.iloc[rows].reset_index(drop=True),
            frozen.means[rows],
            frozen.n_candidates,
            frozen.provenance,
            frozen.basis,
            spectra=frozen.spectra,
        )
        with el.freeze(model, only):
            _, after = model.run_with_cache(tokens, names_filter=[name])
    x = cache["blocks.1.attn.q.hook_in"][0, 0]
    maps = {m.kind: m for m in el.weight_matrices(model, ["W_Q", "W_K"], [1])}
    joint = maps["W_Q"].weight @ maps["W_K"].weight.repeat_interleave(2, 0).mT
    u, s, vh = torch.linalg.svd(joint)
    scale = maps["W_Q"].d_out ** -0.5
    whole = torch.einsum("i,hij,j->h", x, joint, x) * scale
    truncated = (u[:, :, :3] * s[:, None, :3]) @ vh[:, :3]
    cut = torch.einsum("i,hij,j->h", x, truncated, x) * scale
    torch.testing.assert_close(cache[name][0, :, 0, 0], whole, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(after[name][0, :, 0, 0], cut, rtol=1e-9, atol=1e-10)


def test_neurons_are_the_input_of_w_out(tiny):
    model = tiny("gpt2")
    spectra = el.decompose(model, basis="neurons", progress=False)
    assert list(spectra) == ["blocks.0.W_out", "blocks.1.W_out"]
    frozen = el.select(el.score(model, spectra, EQUAL, progress=False), count=5)
    (batch,) = make_batches(EQUAL, model, 6)
    name = "blocks.1.mlp.out.hook_in"
    _, before = model.run_with_cache(batch.tokens, names_filter=[name])
    with el.freeze(model, frozen):
        _, after = model.run_with_cache(batch.tokens, names_filter=[name])
    table = frozen.components
    neurons = table["index"][table["layer"] == 1].tolist()
    changed = (before[name] != after[name]).any(0).any(0)
    assert set(changed.nonzero()[:, 0].tolist()) <= {*range(96)}
    unfrozen = [i for i in range(96) if i not in neurons]
    if not (table["layer"] == 0).any():
        assert torch.equal(before[name][..., unfrozen], after[name][..., unfrozen])
    assert (after[name][..., neurons].std(0) < 1e-12).all()


def test_principal_axes_are_uncorrelated_and_ordered(tiny):
    model = tiny("llama")
    s = el.decompose(model, ["W_in"], [1], basis="pca", data=EQUAL, progress=False)["blocks.1.W_in"]
    (batch,) = make_batches(EQUAL, model, 6)
    with torch.no_grad():
        _, cache = model.run_with_cache(batch.tokens, names_filter=[s.site.hook])
    c = s.coordinates(s.site.split(cache[s.site.hook], batch.tokens.shape[1])).flatten(0, 2)
    covariance = torch.cov(c.T, correction=0)
    variance = covariance.diagonal()
    torch.testing.assert_close(covariance, variance.diag(), rtol=0, atol=1e-10)
    assert (variance.diff() <= 1e-12).all()


def test_a_random_basis_does_not_depend_on_what_else_is_decomposed(tiny):
    model = tiny("gpt2")
    whole = el.decompose(model, basis="random", seed=1, progress=False)
    part = el.decompose(model, ["W_in"], [1], basis="random", seed=1, progress=False)
    other = el.decompose(model, ["W_in"], [1], basis="random", seed=2, progress=False)
    name = "blocks.1.W_in"
    assert torch.equal(whole[name].read, part[name].read)
    assert not torch.allclose(whole[name].read, other[name].read)
    for s in whole.values():
        ones = torch.ones_like(s.sigma)
        weight = s.site.find(model).weight
        if s.site.width == s.sigma.shape[1]:  # complete
            torch.testing.assert_close(scaled_heads(model, s, ones), weight, atol=1e-12, rtol=1e-9)
