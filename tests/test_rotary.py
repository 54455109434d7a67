"""Scores of QK components at a distance, against the attention of transformers itself."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import eigenlens as el
from eigenlens.circuits.norms import gain_before
from eigenlens.circuits.rotary import turns
from eigenlens.far_side import unit

QUIET = {"progress": False}


def attention_of(plain):
    """The first attention layer, and the rotary embedding beside it."""
    core = plain.model if hasattr(plain, "model") else plain.gpt_neox
    layer = core.layers[0]
    return getattr(layer, "self_attn", None) or layer.attention, core.rotary_emb


def score_differences(plain, inputs):
    """``score(last, first) − score(last, last)`` of every head, by transformers' own softmax."""
    attention, rotary = attention_of(plain)
    position = torch.arange(inputs.shape[1])[None]
    with torch.no_grad():
        embeddings = rotary(inputs, position)
        _, pattern = attention(inputs, position_embeddings=embeddings, attention_mask=None)[:2]
    logs = pattern[0, :, -1].log()
    return (logs[:, 0] - logs[:, -1]).numpy()


@pytest.mark.parametrize(
    ("family", "kind", "distance"),
    [
        ("llama", "QK", 7),
        *(
            pytest.param(family, "QK", 7, marks=pytest.mark.slow)
            for family in ("mistral", "phi", "phi3", "gpt_neox")
        ),
        pytest.param("llama", "QK", 1, marks=pytest.mark.slow),
        pytest.param("llama", "W_Q", 5, marks=pytest.mark.slow),
        ("phi", "W_K", 5),
    ],
)
def test_scores_of_all_components_add_up_to_that_of_transformers(
    tiny, tiny_folder, family, kind, distance
):
    model = tiny(family)
    plain = AutoModelForCausalLM.from_pretrained(
        tiny_folder(family), dtype=torch.float64, attn_implementation="eager"
    ).eval()
    for name, parameter in plain.named_parameters():  # components are of the weights alone
        if name.endswith("bias") and "layernorm" not in name:
            parameter.data.zero_()
    spectra = el.decompose(model, basis="qk_ov" if kind == "QK" else "svd", **QUIET)
    spectrum = spectra[f"blocks.0.{kind}"]
    w_q = el.weight_matrices(model, ["W_Q"], [0])[0]
    tokens = unit(gain_before(model, w_q)(model.W_E.detach().double()))
    vocabulary = [str(model.tokenizer.decode([t])) for t in range(len(tokens))]
    a, b = 11, 23  # query and key; what stands between them does not matter
    inputs = tokens[[b, *range(30, 29 + distance), a]][None]
    expected = score_differences(plain, inputs)

    def total(key, at):
        """The share of every component in the score of the two tokens, read out."""
        found = 0.0
        for index in range(spectrum.sigma.shape[1]):
            read = el.readout(model, spectra, 0, kind, 0, index, top=len(tokens) ** 2, distance=at)
            pairs = read.pairs[read.pairs["through"] == 0]
            hit = (pairs["query"] == vocabulary[a]) & (pairs["key"] == vocabulary[key])
            found += float(pairs.loc[hit, "score"].sum())
        return found

    assert len(set(vocabulary)) == len(vocabulary)
    scale, own = spectrum.site.width**-0.5, total(a, 0)
    assert (total(b, distance) - own) * scale == pytest.approx(expected[0], rel=1e-6)
    assert abs((total(b, 0) - own) * scale - expected[0]) > 1e-4  # the distance matters


def test_turns_are_orthogonal_and_add_up(tiny):
    model = tiny("gemma3")
    like = torch.zeros(1, 8, dtype=torch.float64)
    for layer in (0, 1):
        one, two, three = (turns(model, layer, d, like) for d in (2, 3, 5))
        torch.testing.assert_close(one @ two, three)
        torch.testing.assert_close(one @ one.T, torch.eye(8, dtype=torch.float64))
        assert not torch.allclose(one, torch.eye(8, dtype=torch.float64))


def test_without_rotary_embeddings_distance_changes_nothing(tiny, tmp_path):
    model = tiny("gpt2")
    spectra = el.decompose(model, basis="qk_ov", **QUIET)
    near, far = (el.readout(model, spectra, 1, "QK", 0, 0, distance=d) for d in (0, 9))
    np.testing.assert_array_equal(near.pairs["score"], far.pairs["score"])
    far.save(tmp_path / "readout.json")
    assert el.Readout.load(tmp_path / "readout.json").distance == 9
    assert "key 9 tokens before" in far._repr_html_()


def test_the_key_that_is_read_turns_with_the_distance(tiny):
    model = tiny("llama")
    spectra = el.decompose(model, basis="qk_ov", **QUIET)
    near, far = (el.readout(model, spectra, 1, "QK", 0, 0, distance=d).reads for d in (0, 4))
    same = near["side"] == "query"
    assert near[same].equals(far[same])
    assert not near[~same].equals(far[~same])


def test_what_cannot_be_read_is_refused(tiny):
    spectra = el.decompose(tiny("llama"), basis="qk_ov", **QUIET)
    with pytest.raises(ValueError, match="distance=32"):
        el.readout(tiny("llama"), spectra, 0, "QK", 0, 0, distance=32)
    with pytest.raises(ValueError, match="distance=-1"):
        el.readout(tiny("llama"), spectra, 0, "QK", 0, 0, distance=-1)
    model = tiny("gptj")
    with pytest.raises(ValueError, match="only distance=0"):
        el.readout(model, el.decompose(model, basis="qk_ov", **QUIET), 0, "QK", 0, 0, distance=3)
