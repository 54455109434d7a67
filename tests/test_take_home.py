"""Edits under shared means as weights and as LoRA adapters, against the same edits attached."""

import json
import subprocess
import sys

import gguf
import numpy as np
import peft
import pytest
import torch
import transformers as tf
from test_attach import LONG, TOKENS, generate, plain
from test_freezing import frozen_half
from tiny_models import (
    _WIDTHS,
    CONFIGS,
    EQUAL,
    FAMILIES,
    MIXED,
    VOCAB,
    in_families,
    word_tokenizer,
    write_tiny_model,
)

import eigenlens as el
from eigenlens.export.low_rank import low_rank_changes
from eigenlens.matrices import UnsupportedModelError
from eigenlens.metrics import answer_logits
from eigenlens.peft import to_peft
from eigenlens.positions import prompt_ends_at
from eigenlens.tasks import make_batches

WITHOUT_BIASES = ("phi3", "mistral")
# The maps that can have one, of families where some cannot.
BAKED = {
    "gemma2": ["W_Q", "W_K", "W_V", "W_O"],
    "gemma3": ["W_Q", "W_K", "W_V", "W_O"],
    "qwen3": ["W_Q", "W_K", "W_V", "W_O"],
    "gptj": ["W_in", "W_out"],
}


def attenuated(model, matrices=None):
    spectra = el.decompose(model, matrices, progress=False)
    scores = el.score(model, spectra, MIXED, reference="shared", progress=False)
    return el.FrozenSet.from_scores(scores, np.arange(0, len(scores), 3), 0.8)


def attached(model, frozen):
    with torch.no_grad(), el.attach(model, frozen):
        return model(TOKENS).logits


def answers(model, batches):
    """What a plain model, or one of peft, chooses at the answer's positions of each example."""
    chosen = {}
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    for batch in batches:
        mask = batch.attention_mask.long()
        where = (mask.cumsum(1) - 1).clamp_min(0)
        with torch.no_grad(), prompt_ends_at(base, batch.n_prompt):
            out = model(input_ids=batch.tokens, attention_mask=mask, position_ids=where)
        best = out.logits[:, batch.n_prompt - 1 :].argmax(-1)
        for row, index in enumerate(batch.indices):
            chosen[index] = best[row][batch.answer_mask[row]].tolist()
    return [chosen[index] for index in range(len(chosen))]


def bridge_answers(bridge, frozen, batches):
    """The same on a bridge with the edit."""
    chosen = {}
    for batch in batches:
        with torch.no_grad(), el.freeze(bridge, frozen):
            best = answer_logits(bridge, batch).argmax(-1)
        for row, index in enumerate(batch.indices):
            chosen[index] = best[row][batch.answer_mask[row]].tolist()
    return [chosen[index] for index in range(len(chosen))]


def check_same_answers_everywhere(load, bridge, frozen, data, folder):
    """Bridge, hooks and peft under means by position; weights and LoRA besides, under shared ones.

    ``load`` makes the plain model anew, from its own folder or a given one.
    """
    batches = make_batches(data, bridge, 5)
    base = load()
    to_peft(base, frozen, folder / "peft")
    ways = {"peft": peft.PeftModel.from_pretrained(load(), folder / "peft").eval()}
    with el.attach(base, frozen):
        found = {"attached": answers(base, batches)}
    found |= {way: answers(model, batches) for way, model in ways.items()}
    wanted = bridge_answers(bridge, frozen, batches)
    assert wanted != answers(base, batches)
    assert found == dict.fromkeys(found, wanted)
    shared = frozen.shared()
    el.bake(base, shared, folder / "baked")
    el.to_lora(base, shared, folder / "lora")
    models = [load(folder / "baked"), peft.PeftModel.from_pretrained(load(), folder / "lora")]
    wanted = bridge_answers(bridge, shared, batches)
    assert [answers(model.eval(), batches) for model in models] == [wanted, wanted]


@in_families(["llama", "gpt2", "gpt_neox"])
def test_an_edit_gives_the_same_answers_wherever_it_lives(tiny, tiny_folder, tmp_path, family):
    source = tiny_folder(family)
    check_same_answers_everywhere(
        lambda folder=source: plain(folder),
        tiny(family),
        frozen_half(tiny(family), MIXED),
        MIXED,
        tmp_path,
    )


@in_families([name for name in FAMILIES if name not in WITHOUT_BIASES])
def test_a_baked_folder_predicts_the_same(tiny, tiny_folder, tmp_path, family):
    matrices = BAKED.get(family)
    model = plain(tiny_folder(family))
    frozen = attenuated(tiny(family), matrices)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    el.bake(model, frozen, tmp_path)
    baked = plain(tmp_path)
    with torch.no_grad():
        found, before = baked(TOKENS).logits, model(TOKENS).logits
    torch.testing.assert_close(found, attached(model, frozen), rtol=1e-9, atol=1e-9)
    assert (found - before).abs().max() > 1e-3
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert baked.config.dtype == torch.float64
    assert torch.equal(generate(baked, LONG), generate_attached(model, frozen))


def generate_attached(model, frozen):
    with el.attach(model, frozen):
        return generate(model, LONG)


def test_other_maps_that_get_a_bias_keep_zeros_and_names_are_ggufs(tiny, tiny_folder, tmp_path):
    frozen = attenuated(tiny("llama"), ["W_Q", "W_in"])
    el.bake(plain(tiny_folder("llama")), frozen, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["attention_bias"]
    assert config["mlp_bias"]
    baked = plain(tmp_path)
    for layer in baked.model.layers:
        assert not layer.self_attn.o_proj.bias.any()
        assert not layer.mlp.down_proj.bias.any()
        assert layer.self_attn.q_proj.bias.any()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, value in baked.state_dict().items():
        assert names.get_name(name, try_suffixes=(".weight", ".bias")), name
        assert value.dtype == torch.float64


def test_a_baked_folder_becomes_a_gguf_file(tmp_path, monkeypatch):
    """Every tensor by llama.cpp's name and in float32; read back, it predicts the same."""
    config = tf.Qwen2Config(**_WIDTHS | {"num_key_value_heads": 2, "rms_norm_eps": 1e-6})
    monkeypatch.setitem(CONFIGS, "qwen2", lambda: config)
    write_tiny_model("qwen2", tmp_path / "base")
    bridge = el.load_model(tmp_path / "base", device="cpu")
    frozen = attenuated(bridge, ["W_Q", "W_K", "W_V"])
    model = plain(tmp_path / "base", torch.float32)
    el.bake(model, frozen, tmp_path / "baked")
    baked = plain(tmp_path / "baked", torch.float32)
    writer = gguf.GGUFWriter(tmp_path / "baked.gguf", "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(VOCAB)
    words = [word_tokenizer().convert_ids_to_tokens(i) for i in range(VOCAB)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([1] * VOCAB)
    writer.add_token_merges([f"{words[7]} {words[8]}"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, value in baked.state_dict().items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs, name
        assert value.dtype == torch.float32
        writer.add_tensor(theirs, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    again = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="baked.gguf", dtype=torch.float32
    )
    with torch.no_grad():
        found = again.eval()(TOKENS).logits
    torch.testing.assert_close(found, attached(model, frozen), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_baked_is_refused_with_a_way_out(tiny, tiny_folder, tmp_path):
    model = plain(tiny_folder("gemma2"))
    with pytest.raises(ValueError, match=r"means by position: give frozen\.shared\(\)"):
        el.bake(model, frozen_half(tiny("gemma2")), tmp_path / "baked")
    with pytest.raises(ValueError, match="LoRA adapter has one bias for all positions"):
        el.to_lora(model, frozen_half(tiny("gemma2")), tmp_path / "baked")
    with pytest.raises(UnsupportedModelError, match=r"bias in .*gate_proj.*with to_lora instead"):
        el.bake(model, attenuated(tiny("gemma2")), tmp_path / "baked")
    assert not (tmp_path / "baked").exists()


def test_without_a_mean_no_bias_is_needed(tiny, tiny_folder, tmp_path):
    """Under the reference zero, a family without biases is plain weights."""
    bridge, model = tiny("mistral"), plain(tiny_folder("mistral"))
    scores = el.score(
        bridge, el.decompose(bridge, progress=False), MIXED, reference="zero", progress=False
    )
    frozen = el.select(scores, 0.3).shared()
    el.bake(model, frozen, tmp_path)
    with torch.no_grad():
        found = plain(tmp_path)(TOKENS).logits
    torch.testing.assert_close(found, attached(model, frozen), rtol=1e-9, atol=1e-9)
    el.to_lora(model, frozen, tmp_path / "lora")
    wanted = attached(model, frozen)
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "lora").merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(TOKENS).logits, wanted, rtol=1e-9, atol=1e-9)


def test_the_model_card_tells_what_was_measured(tiny, tiny_folder, tmp_path):
    bridge = tiny("gpt2")
    frozen = attenuated(bridge)
    before = el.evaluate(bridge, EQUAL)
    with el.freeze(bridge, frozen):
        after = el.evaluate(bridge, EQUAL)
    model = plain(tiny_folder("gpt2"))
    el.bake(
        model, frozen, tmp_path, tokenizer=bridge.tokenizer, before=before, after=after
    )  # fmt: skip
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"{after.loss:.3f}" in card
    assert f"{before.loss:.3f}" in card
    assert f"{len(frozen):,} of {frozen.n_candidates:,} components" in card
    again = el.evaluate(el.load_model(tmp_path, dtype=torch.float64, device="cpu"), EQUAL)
    assert again.examples["predicted"].equals(after.examples["predicted"])


def test_removal_is_exactly_of_rank_k(tiny, tiny_folder):
    """What is left of a matrix has LAPACK's singular values of the components that stay."""
    bridge, model = tiny("llama"), plain(tiny_folder("llama"))
    frozen = frozen_half(bridge, fraction=0.4)
    changes = low_rank_changes(model, frozen)
    for kind, name in (("W_in", "up_proj"), ("W_gate", "gate_proj"), ("W_out", "down_proj")):
        c = frozen.components
        gone = c["index"][(c.layer == 1) & (c.matrix == kind)].tolist()
        change = changes[f"model.layers.1.mlp.{name}"]
        weight = model.get_submodule(f"model.layers.1.mlp.{name}").weight.T
        assert torch.linalg.matrix_rank(change.weight) == len(gone) > 0
        sigma = torch.linalg.svdvals(weight)
        sigma[gone] = 0
        found = torch.linalg.svdvals(weight + change.weight)
        torch.testing.assert_close(found, sigma.sort(descending=True).values, rtol=0, atol=1e-12)


WITHOUT_EIGENLENS = """
import sys, warnings
sys.modules["eigenlens"] = None
warnings.simplefilter("ignore")
import torch, transformers, peft
base, *folders = sys.argv[1:-1]
tokens = torch.tensor(eval(sys.argv[-1]))
for folder in folders:
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{base}/{folder}", dtype="float64")
    model = peft.PeftModel.from_pretrained(model, f"{base}/{folder}-lora").eval()
    with torch.no_grad():
        torch.save(model(tokens).logits, f"{base}/{folder}.pt")
"""


@pytest.mark.slow
def test_lora_adapters_load_where_eigenlens_is_not(tiny, tiny_folder, tmp_path):
    for family in FAMILIES:
        (tmp_path / family).symlink_to(tiny_folder(family))
        el.to_lora(
            plain(tiny_folder(family)), attenuated(tiny(family)), tmp_path / f"{family}-lora"
        )
    command = [sys.executable, "-c", WITHOUT_EIGENLENS, tmp_path, *FAMILIES, str(TOKENS.tolist())]
    subprocess.run(command, check=True, cwd=tmp_path)
    for family in FAMILIES:
        found = torch.load(tmp_path / f"{family}.pt")
        wanted = attached(plain(tiny_folder(family)), attenuated(tiny(family)))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
