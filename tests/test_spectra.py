"""Decompositions against the weights they came from."""

import os

import numpy as np
import pytest
import torch
from tiny_models import EQUAL, REFUSED, in_families

import eigenlens as el
from eigenlens import bases, cache, decomposition
from eigenlens.blocks import UnsupportedModelError
from eigenlens.far_side import (
    input_vectors,
    map_directions,
    output_vectors,
    scaled_heads,
    zero_coordinates,
)
from eigenlens.files import FileFormatError
from eigenlens.matrices import MATRIX_KINDS, Site
from eigenlens.spectra import Spectrum


@in_families()
def test_components_are_the_singular_ones_of_lapack(tiny, family):
    model = tiny(family)
    spectra = el.decompose(model, progress=False)
    matrices = el.weight_matrices(model)
    assert list(spectra) == [m.name for m in matrices]
    for matrix in matrices:
        s = spectra[matrix.name]
        assert (s.site.width, s.sigma.shape) == (
            matrix.width(matrix.side),
            (matrix.n_heads, matrix.rank),
        )
        _, sigma, _ = torch.linalg.svd(matrix.weight, full_matrices=False)
        torch.testing.assert_close(s.sigma, sigma, rtol=1e-12, atol=1e-13)
        assert (s.sigma.diff(dim=-1) <= 0).all()
        weight = scaled_heads(model, s, torch.ones_like(s.sigma))
        torch.testing.assert_close(weight, matrix.weight, rtol=1e-10, atol=1e-12)
        u, v = input_vectors(model, s), output_vectors(model, s)
        rank_one = torch.einsum("hik,hko->hkio", u, v)
        norms = rank_one.flatten(2).norm(dim=-1)
        torch.testing.assert_close(norms, s.sigma, rtol=1e-9, atol=1e-12)
        eye = torch.eye(matrix.rank, dtype=u.dtype).expand(matrix.n_heads, -1, -1)
        torch.testing.assert_close(s.read.mT @ s.read, eye, rtol=0, atol=1e-12)
        # The vectors of the other side are orthogonal, too: both are singular.
        far = u.mT if s.site.side == "out" else v
        scale = s.sigma[:, :, None] * s.sigma[:, None, :]
        torch.testing.assert_close(far @ far.mT, eye * scale, rtol=1e-9, atol=1e-10)
        assert (s.read.gather(1, s.read.abs().argmax(1, keepdim=True)) > 0).all()


def test_the_small_side_is_where_heads_are_apart_or_the_map_is_narrow(tiny):
    sides = {m.kind: m.side for m in el.weight_matrices(tiny("llama"), layers=[0])}
    heads = {"W_Q": "out", "W_K": "out", "W_V": "out", "W_O": "in"}
    assert sides == {**heads, "W_in": "in", "W_gate": "in", "W_out": "out"}
    hooks = [s.site.hook for s in el.decompose(tiny("gpt2"), layers=[1], progress=False).values()]
    assert hooks == [
        f"blocks.1.{name}"
        for name in (
            "attn.q.hook_out",
            "attn.k.hook_out",
            "attn.v.hook_out",
            "attn.o.hook_in",
            "mlp.in.hook_in",
            "mlp.out.hook_out",
        )
    ]


@in_families()
def test_matrices_agree_with_the_bridge(tiny, family):
    """Our per-head weights are TransformerLens' own, where it lists them per head."""
    model = tiny(family)
    for matrix in el.weight_matrices(model):
        theirs = getattr(model, matrix.kind)[matrix.layer]
        if matrix.head_axis is None:
            theirs = theirs[None]
        elif (
            len(theirs) != matrix.n_heads
        ):  # the bridge repeats key/value heads for each query head
            theirs = theirs[:: len(theirs) // matrix.n_heads]
        torch.testing.assert_close(matrix.weight, theirs.reshape(matrix.weight.shape))


def test_kinds_heads_and_grouped_queries(tiny):
    kinds = {m.kind: m for m in el.weight_matrices(tiny("llama"), layers=[1])}
    assert tuple(kinds) == MATRIX_KINDS
    assert [kinds[k].n_heads for k in ("W_Q", "W_K", "W_V", "W_O", "W_in")] == [4, 2, 2, 4, 1]
    assert kinds["W_O"].weight.shape == (4, 8, 32)
    assert "W_gate" not in {m.kind for m in el.weight_matrices(tiny("gpt2"))}
    assert {m.n_heads for m in el.weight_matrices(tiny("falcon"), ["W_K"])} == {1}
    table = el.weight_matrices(tiny("gpt2")).to_pandas()
    assert len(table) == 12
    assert "blocks.0.attn.q.hook_in" in table["hook_in"].tolist()


@pytest.mark.parametrize("family", REFUSED)
def test_sparse_and_state_space_blocks_are_refused(tiny_folder, family):
    model = el.load_model(tiny_folder(family), device="cpu")
    wanted = r"Layer 0 .*(SparseMoeBlock|MambaMixer) .*skip_unsupported=True"
    with pytest.raises(UnsupportedModelError, match=wanted):
        el.decompose(model)


def test_unknown_kinds_layers_and_bases(tiny):
    model = tiny("gpt2")
    with pytest.raises(ValueError, match="Unknown matrix kind 'W_E'"):
        el.decompose(model, ["W_E"])
    with pytest.raises(ValueError, match="layers 0 to 1"):
        el.decompose(model, layers=[2])
    with pytest.raises(ValueError, match="no W_gate"):
        el.decompose(model, ["W_gate"])
    with pytest.raises(ValueError, match="dtype"):
        el.decompose(model, dtype="float16")
    with pytest.raises(ValueError, match="Unknown basis 'fourier'"):
        el.decompose(model, basis="fourier")
    with pytest.raises(ValueError, match="pca' needs data"):
        el.decompose(model, basis="pca")
    with pytest.raises(ValueError, match="Unknown matrix kind 'W_K'; choose from QK, OV"):
        el.decompose(model, ["W_K"], basis="qk_ov")
    with pytest.raises(
        ValueError, match="basis='neurons': Unknown matrix kind 'W_in'; choose from W_out"
    ):
        el.decompose(model, ["W_in"], basis="neurons")


def _planted(sigma, d_in, d_out, seed=0):
    """A matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(d, len(sigma), generator=generator, dtype=torch.float64)).Q
        for d in (d_in, d_out)
    )
    return (u * torch.tensor(sigma, dtype=torch.float64)) @ v.T, u


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-200, 1e150])
def test_singular_values_to_the_rounding_of_float64(scale):
    sigma = [3.0, 2.0, 2.0 - 1e-10, 1.0, 1e-5]
    weight, u = _planted(sigma, 6, 9)
    basis, found = bases.singular_basis(scale * weight[None])
    expected = scale * torch.tensor([[*sigma, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14 * scale)
    overlap = (basis[0, :, [0, 1, 2, 3]].T @ u[:, [0, 1, 2, 3]]).diagonal().abs()
    torch.testing.assert_close(overlap, torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1), (4, 4)])
@pytest.mark.parametrize("kind", ["random", "zero", "rank one"])
def test_matrices_of_any_shape_and_rank(shape, kind):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    if kind == "zero":
        weight = torch.zeros_like(weight)
    elif kind == "rank one":
        weight = weight[:, :, :1] * weight[:, :1, :]
    basis, sigma = bases.singular_basis(weight)
    rank = min(shape)
    assert basis.shape == (2, shape[0], rank)
    torch.testing.assert_close(sigma, torch.linalg.svdvals(weight), rtol=1e-12, atol=1e-14)
    eye = torch.eye(rank, dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(basis.mT @ basis, eye, rtol=0, atol=1e-12)


def test_near_equal_singular_values_form_blocks():
    sigma = torch.tensor([[5.0, 5.0 - 1e-13, 3.0, 1.0, 1.0 - 1e-9]], dtype=torch.float64)
    site = Site(0, "W_in", 1, "in", 5, 9, "mlp.in")
    eye = torch.eye(5, dtype=torch.float64)[None]
    blocks = Spectrum(site, eye, eye.mT, sigma, bases.RESOLUTION).blocks
    assert blocks.tolist() == [[0, 0, 1, 2, 3]]
    assert Spectrum(site, eye, eye.mT, sigma).blocks.tolist() == [[0, 1, 2, 3, 4]]


def test_a_second_run_reads_the_cache(tiny, monkeypatch):
    model = tiny("phi")
    first = el.decompose(model, progress=False)
    calls = []
    made = bases.svd
    monkeypatch.setattr(bases, "svd", lambda m, d: calls.append(1) or made(m, d))
    second = el.decompose(model, progress=False)
    assert not calls
    assert all(torch.equal(first[n].read, second[n].read) for n in first)
    for entry in cache.entries():
        if entry.kind == "decomposition":
            whole = entry.path.read_bytes()  # a damaged entry is made anew
            entry.path.unlink()  # first, since what was read is mapped from it
            entry.path.write_bytes(whole[:50])
    third = el.decompose(model, progress=False)
    assert len(calls) == len(first)
    assert all(torch.equal(first[n].read, third[n].read) for n in first)
    el.decompose(model, cache=False, progress=False)
    assert len(calls) == 2 * len(first)


def test_the_cache_forgets_what_was_not_used_longest(tmp_path, monkeypatch):
    monkeypatch.setenv("EIGENLENS_CACHE", str(tmp_path))
    for number, key in enumerate(("aa", "bb", "cc")):
        cache.kept(key, lambda: {"basis": torch.zeros(1000)})
        path = tmp_path / "bases" / key / f"{key}.safetensors"
        os.utime(path, (number, number))
    cache.kept("aa", lambda: pytest.fail("it is there"))  # used now
    size = cache.entries()[0].size
    cache.trim(2.5 * size / 1e9)
    assert [entry.path.stem for entry in cache.entries()] == ["aa", "cc"]
    cache.trim(1.5 * size / 1e9)
    assert [entry.path.stem for entry in cache.entries()] == ["aa"]
    assert cache.clear() == size
    assert not cache.entries()


def test_projections_equal_the_map(tiny):
    """Coordinates times slopes, summed, are the derivative along the output of the map."""
    model = tiny("llama")
    for kind in MATRIX_KINDS:
        spectrum = el.decompose(model, [kind], [1], progress=False)[f"blocks.1.{kind}"]
        matrix = spectrum.site.find(model)
        x = torch.randn(3, 5, matrix.flat_weight.shape[0], dtype=torch.float64)
        heads, places = (np.repeat(np.arange(matrix.n_heads), matrix.rank),) * 2
        places = np.tile(np.arange(matrix.rank), matrix.n_heads)
        own = map_directions(model, spectrum, heads, places)
        y = own.coordinates(x) @ own.writes
        torch.testing.assert_close(y, x @ matrix.flat_weight, rtol=1e-10, atol=1e-10)
        at = x if spectrum.site.side == "in" else y
        c = spectrum.coordinates(spectrum.site.split(at, 5)).flatten(2)
        torch.testing.assert_close(c, own.coordinates(x), rtol=1e-10, atol=1e-10)


@in_families(["gpt2", "phi", "llama", "opt"])
def test_coordinates_at_zero_input_are_those_of_the_bias(tiny, family):
    model = tiny(family)
    for s in el.decompose(model, progress=False).values():
        matrix = s.site.find(model)
        heads = np.repeat(np.arange(matrix.n_heads), matrix.rank)
        own = map_directions(model, s, heads, np.tile(np.arange(matrix.rank), matrix.n_heads))
        zero = zero_coordinates(model, s)
        torch.testing.assert_close(zero.flatten(), own.offset, rtol=1e-12, atol=1e-14)
        bias = matrix.bias if matrix.bias is not None else None
        expected = 0.0 if bias is None or s.site.side == "in" else 1.0
        assert bool(zero.any()) == bool(expected)


def test_save_and_load(tiny, tiny_folder, tmp_path):
    model = tiny("gpt2")
    for basis, kinds in (("svd", ["W_V"]), ("qk_ov", ["OV"]), ("neurons", None)):
        spectra = el.decompose(model, kinds, basis=basis, progress=False)
        spectra.save(tmp_path / "spectra.safetensors")
        again = el.Spectra.load(tmp_path / "spectra.safetensors", model)
        assert again.basis == basis
        assert again.n_components == spectra.n_components
        np.testing.assert_array_equal(again.to_pandas()["sigma"], spectra.to_pandas()["sigma"])
        for name, s in spectra.items():
            assert again[name].is_orthonormal == s.is_orthonormal
            for part, value in s.tensors().items():
                assert torch.equal(again[name].tensors()[part], value)
    with pytest.raises(FileFormatError, match="other weights"):
        el.Spectra.load(tmp_path / "spectra.safetensors", tiny("phi"))


def test_a_decomposition_belongs_to_weights_and_not_to_one_object(tiny, tiny_folder, tmp_path):
    """Made on one bridge, it scores and edits another of the same weights, and only that."""
    one = tiny("llama")
    two = el.load_model(tiny_folder("llama"), dtype=torch.float64, device="cpu")
    spectra = el.decompose(one, progress=False)
    spectra.save(tmp_path / "spectra.safetensors")
    again = el.Spectra.load(tmp_path / "spectra.safetensors", two)
    expected = el.score(one, spectra, EQUAL, progress=False)
    for source in (spectra, again):
        found = el.score(two, source, EQUAL, progress=False)
        np.testing.assert_array_equal(found.delta_loss, expected.delta_loss)
    frozen = el.select(expected, 0.3)
    before = el.evaluate(one, EQUAL, progress=False).loss
    with el.freeze(two, frozen):
        edited = el.evaluate(two, EQUAL, progress=False).loss
        assert el.evaluate(one, EQUAL, progress=False).loss == before
    assert edited != before
    with el.freeze(one, frozen):
        assert el.evaluate(one, EQUAL, progress=False).loss == edited


def test_results_from_disk_find_their_directions(tiny, tmp_path):
    model = tiny("qwen3")
    train, validation = EQUAL, EQUAL
    for basis in ("svd", "random", "qk_ov"):
        spectra = el.decompose(model, basis=basis, seed=3, progress=False)
        scores = el.score(model, spectra, train, progress=False)
        scores.save(tmp_path / "scores.parquet")
        again = el.Scores.load(tmp_path / "scores.parquet")
        assert (again.spectra, again.basis) == (None, basis)
        config = el.LearnedConfig(steps=2, every=1)
        found = [
            el.learned(model, s, train, validation, config, progress=False).trace["train_loss"]
            for s in (scores, again)
        ]
        np.testing.assert_allclose(*found, rtol=1e-12)


def test_finite_weights_only(tiny_folder):
    model = el.load_model(tiny_folder("gpt2"), dtype=torch.float64, device="cpu")
    model.blocks[1].mlp.out.original_component.weight.data[0] = torch.nan
    for basis in ("svd", "random"):
        with pytest.raises(ValueError, match=r"blocks\.1\.W_out holds NaN"):
            decomposition.decompose(model, basis=basis)
