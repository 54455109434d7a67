"""Eigenpruning as a method of peft, against the same edit attached by hooks."""

import subprocess
import sys

import pytest
import torch
import transformers as tf
from peft import PeftModel
from test_attach import LONG, TOKENS, generate, left_padded, plain
from test_freezing import frozen_half
from test_take_home import attached, attenuated
from tiny_models import _WIDTHS, in_families

import eigenlens as el
from eigenlens.matrices import UnsupportedModelError
from eigenlens.peft import get_eigenpruned_model, to_peft
from eigenlens.positions import prompt_ends_at


def predicted(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@in_families()
def test_a_folder_loads_into_a_plain_base(tiny, tiny_folder, tmp_path, family):
    model, frozen = plain(tiny_folder(family)), frozen_half(tiny(family), fraction=0.4)
    to_peft(model, frozen, tmp_path)
    wrapped = PeftModel.from_pretrained(plain(tiny_folder(family)), tmp_path).eval()
    torch.testing.assert_close(predicted(wrapped), attached(model, frozen), rtol=1e-9, atol=1e-9)
    tokens, mask = left_padded()
    with el.attach(model, frozen):
        wanted = generate(model, tokens, mask, num_beams=2)
    assert torch.equal(generate(wrapped, tokens, mask, num_beams=2), wanted)
    with wrapped.disable_adapter():
        assert torch.equal(predicted(wrapped), predicted(model))
    wrapped.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(plain(tiny_folder(family)), tmp_path / "again").eval()
    assert torch.equal(predicted(again), predicted(wrapped))
    assert torch.equal(predicted(wrapped.unload()), predicted(model))


def test_adapters_take_turns(tiny, tiny_folder):
    model = plain(tiny_folder("llama"))
    bridge = tiny("llama")
    first, second = frozen_half(bridge, fraction=0.2), attenuated(bridge, ["W_in", "W_Q"])
    wanted = [attached(model, frozen) for frozen in (first, second)]
    untouched = predicted(model)
    wrapped = get_eigenpruned_model(model, first)
    to_other = get_eigenpruned_model(plain(tiny_folder("llama")), second, "other")
    wrapped.add_adapter("other", to_other.peft_config["other"])
    state = {k: v for k, v in to_other.state_dict().items() if "eigenprune_" in k}
    wrapped.load_state_dict(state, strict=False)
    for name, logits in zip(("default", "other"), wanted, strict=True):
        wrapped.set_adapter(name)
        torch.testing.assert_close(predicted(wrapped), logits, rtol=1e-9, atol=1e-9)
    with pytest.warns(UserWarning, match="Adapter other was active which is now deleted"):
        wrapped.delete_adapter("other")
    wrapped.set_adapter("default")
    torch.testing.assert_close(predicted(wrapped), wanted[0], rtol=1e-9, atol=1e-9)
    base = wrapped.unload()
    assert torch.equal(predicted(base), untouched)
    assert "generate" not in vars(base)
    assert not base._forward_pre_hooks


@in_families(["llama", "gpt2", "gpt_neox", "falcon"])
def test_merging_shared_means_is_exact(tiny, tiny_folder, tmp_path, family):
    model, frozen = plain(tiny_folder(family)), attenuated(tiny(family))
    wanted, untouched = attached(model, frozen), predicted(model)
    wrapped = get_eigenpruned_model(model, frozen)
    wrapped.merge_adapter()
    torch.testing.assert_close(predicted(wrapped), wanted, rtol=1e-9, atol=1e-9)
    wrapped.unmerge_adapter()
    torch.testing.assert_close(predicted(wrapped), wanted, rtol=1e-9, atol=1e-9)
    with wrapped.disable_adapter():
        assert torch.equal(predicted(wrapped), untouched)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(predicted(merged), wanted, rtol=1e-9, atol=1e-9)
    merged.save_pretrained(tmp_path)
    assert torch.equal(predicted(plain(tmp_path)), predicted(merged))


def test_what_cannot_be_merged_is_refused_with_a_reason(tiny, tiny_folder):
    by_position = get_eigenpruned_model(plain(tiny_folder("llama")), frozen_half(tiny("llama")))
    before = predicted(by_position)
    with pytest.raises(ValueError, match="means by position"):
        by_position.merge_and_unload()
    assert torch.equal(predicted(by_position), before)
    no_bias = get_eigenpruned_model(plain(tiny_folder("mistral")), attenuated(tiny("mistral")))
    with pytest.raises(UnsupportedModelError, match="which a MistralForCausalLM cannot have"):
        no_bias.merge_and_unload()


def test_a_prompt_with_its_answer(tiny, tiny_folder):
    bridge = tiny("llama")
    frozen = frozen_half(bridge)
    wrapped = get_eigenpruned_model(plain(tiny_folder("llama")), frozen)
    with torch.no_grad(), el.freeze(bridge, frozen), prompt_ends_at(bridge, 4):
        wanted = bridge(LONG)
    with prompt_ends_at(wrapped.get_base_model(), 4), torch.no_grad():
        found = wrapped(input_ids=LONG).logits
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_other_bases_are_refused_and_rounded_ones_are_not(tiny, tiny_folder, tmp_path):
    to_peft(plain(tiny_folder("llama")), frozen_half(tiny("llama")), tmp_path)
    other = plain(tiny_folder("llama"))
    other.model.layers[1].mlp.up_proj.weight.data[0, 0] += 0.01
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj holds other weights"):
        PeftModel.from_pretrained(other, tmp_path)
    wide = tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**_WIDTHS | {"hidden_size": 64}))
    with pytest.raises(ValueError, match=r"x 64 in the base model and \d+ x 32 in the adapter"):
        PeftModel.from_pretrained(wide, tmp_path)
    with pytest.raises(ValueError, match=r"The base model has no model\.layers"):
        PeftModel.from_pretrained(plain(tiny_folder("gpt2")), tmp_path)
    half = PeftModel.from_pretrained(plain(tiny_folder("llama"), torch.bfloat16), tmp_path)
    assert half(input_ids=LONG).logits.isfinite().all()


@pytest.mark.slow
def test_peft_alone_says_what_to_import(tiny, tiny_folder, tmp_path):
    to_peft(plain(tiny_folder("llama")), frozen_half(tiny("llama")), tmp_path)
    assert "import eigenlens.peft" in (tmp_path / "README.md").read_text()
    code = f"import peft; peft.PeftConfig.from_pretrained({str(tmp_path)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "INSTALL EIGENLENS AND IMPORT EIGENLENS.PEFT FIRST" in run.stderr.splitlines()[-1]
