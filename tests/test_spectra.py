"""Decompositions against the weights they came from."""

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, REFUSED

import eigenlens as el
from eigenlens import spectra as spectra_module
from eigenlens.files import FileFormatError, cache_dir
from eigenlens.matrices import MATRIX_KINDS, UnsupportedModelError
from eigenlens.spectra import Spectrum, thin_svd


@pytest.mark.parametrize("family", FAMILIES)
def test_u_s_v_gives_the_weight_back(tiny, family):
    model = tiny(family)
    spectra = el.decompose(model, progress=False)
    matrices = el.weight_matrices(model)
    assert list(spectra) == [m.name for m in matrices]
    for matrix in matrices:
        s = spectra[matrix.name]
        assert s.u.shape == (matrix.n_heads, matrix.d_in, matrix.rank)
        rebuilt = (s.u * s.sigma[:, None, :]) @ s.vh
        torch.testing.assert_close(rebuilt, matrix.weight, rtol=1e-10, atol=1e-12)
        assert (s.sigma.diff(dim=-1) <= 0).all()
        eye = torch.eye(matrix.rank, dtype=s.u.dtype).expand(matrix.n_heads, -1, -1)
        torch.testing.assert_close(s.u.transpose(1, 2) @ s.u, eye, rtol=0, atol=1e-12)
        largest = s.u.gather(1, s.u.abs().argmax(1, keepdim=True))
        assert (largest > 0).all()


@pytest.mark.parametrize("family", FAMILIES)
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
    with pytest.raises(
        UnsupportedModelError, match=r"Layer 0 .* (MixtralSparseMoeBlock|MambaMixer)"
    ):
        el.decompose(model)


def test_unknown_kinds_and_layers(tiny):
    model = tiny("gpt2")
    with pytest.raises(ValueError, match="Unknown matrix kind 'W_E'"):
        el.decompose(model, ["W_E"])
    with pytest.raises(ValueError, match="layers 0 to 1"):
        el.decompose(model, layers=[2])
    with pytest.raises(ValueError, match="no W_gate"):
        el.decompose(model, ["W_gate"])
    with pytest.raises(ValueError, match="dtype"):
        el.decompose(model, dtype="float16")


def test_near_equal_singular_values_form_blocks(tiny):
    matrix = el.weight_matrices(tiny("gpt2"), ["W_in"], [0])[0]
    sigma = torch.tensor([[5.0, 5.0 - 1e-13, 3.0, 1.0, 1.0]], dtype=torch.float64)
    spectrum = Spectrum(
        matrix,
        torch.zeros(1, 24, 5, dtype=torch.float64),
        sigma,
        torch.zeros(1, 5, 96, dtype=torch.float64),
    )
    assert spectrum.blocks.tolist() == [[0, 0, 1, 2, 2]]


def test_second_driver_when_the_first_does_not_converge(monkeypatch):
    weight = torch.randn(2, 6, 4)
    expected = thin_svd(weight)

    def fails(*args, **kwargs):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", fails)
    for one, two in zip(thin_svd(weight), expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_a_second_run_reads_the_cache(tiny, monkeypatch):
    model = tiny("phi")
    first = el.decompose(model, progress=False)
    calls = []
    monkeypatch.setattr(spectra_module, "thin_svd", lambda w: calls.append(1) or thin_svd(w))
    second = el.decompose(model, progress=False)
    assert not calls
    assert all(torch.equal(first[n].u, second[n].u) for n in first)
    files = sorted((cache_dir() / "svd").rglob("*.safetensors"))
    for file in files:
        whole = file.read_bytes()  # a damaged entry is made anew
        file.unlink()  # first, since what was read is mapped from it
        file.write_bytes(whole[:50])
    third = el.decompose(model, progress=False)
    assert len(calls) == len(first)
    assert all(torch.equal(first[n].u, third[n].u) for n in first)


def test_projections_equal_the_map(tiny):
    """Σ_i a_i v_i is the output of the map; writes are its transpose."""
    for kind in MATRIX_KINDS:
        spectrum = el.decompose(tiny("llama"), [kind], [1], progress=False)[f"blocks.1.{kind}"]
        matrix = spectrum.matrix
        x = torch.randn(3, 5, matrix.flat_weight.shape[0], dtype=torch.float64)
        g = torch.randn(3, 5, matrix.flat_weight.shape[1], dtype=torch.float64)
        y = x @ matrix.flat_weight
        # ⟨g, y⟩ summed over heads equals Σ_i a_i (v_i · g)
        total = (spectrum.reads(x) * spectrum.writes(g)).sum((-1, -2))
        torch.testing.assert_close(total, (g * y).sum(-1), rtol=1e-10, atol=1e-10)


def test_save_and_load(tiny, tmp_path):
    spectra = el.decompose(tiny("gpt2"), ["W_V"], progress=False)
    spectra.save(tmp_path / "spectra.safetensors")
    again = el.Spectra.load(tmp_path / "spectra.safetensors", tiny("gpt2"))
    assert again.n_components == spectra.n_components == 48
    np.testing.assert_array_equal(again.to_pandas()["sigma"], spectra.to_pandas()["sigma"])
    with pytest.raises(FileFormatError, match="other weights"):
        el.Spectra.load(tmp_path / "spectra.safetensors", tiny("phi"))
