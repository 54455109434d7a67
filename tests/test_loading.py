"""What must not load: weights that are not there, damaged files, and models of another kind."""

import json
import shutil

import pytest
import safetensors
import safetensors.torch
import torch
import transformers as tf
from tiny_models import CONFIGS, MIXED, word_tokenizer

import eigenlens as el
from eigenlens.blocks import UnsupportedModelError
from eigenlens.files import FileFormatError
from eigenlens.models import UnknownModelError, loading
from eigenlens.models.checks import check_causal

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of a tiny Llama, to be damaged."""
    return shutil.copytree(tiny_folder("llama"), tmp_path / "model")


def rewrite(folder, change):
    """Write what ``change`` makes of the tensors of a folder."""
    path = folder / "model.safetensors"
    tensors = change(safetensors.torch.load_file(path))
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def prefixed(prefix):
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("prefix", "writer"),
    [
        ("_orig_mod.", "torch.compile"),
        ("module.", "DataParallel"),
        ("base_model.model.", "peft"),
        ("_orig_mod.module.", ""),
        ("student.", ""),
    ],
)
def test_a_prefix_of_tensor_names_is_named(folder, prefix, writer):
    rewrite(folder, prefixed(prefix))
    with pytest.raises(FileFormatError, match=r"21 missing .*21 unknown") as caught:
        el.load_model(folder, device="cpu")
    assert f"begin with '{prefix}'" in str(caught.value)
    assert writer in str(caught.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: {k: v for k, v in t.items() if k != UP}, rf"1 missing \({UP}\)"),
        (lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"}, r"lm_head\.weight"),
        (lambda t: t | {"v_head.summary.weight": torch.ones(3)}, r"1 unknown \(v_head\.summary"),
        (lambda t: t | {UP: torch.ones(4, 32)}, rf"{UP} is \(4, 32\) in place of \(40, 32\)"),
        (lambda t: {k: v for k, v in t.items() if "layers.1" not in k}, "9 missing .* and 4 more"),
    ],
    ids=["a weight missing", "no head", "a weight too many", "another shape", "a layer missing"],
)
def test_weights_that_are_not_the_models_are_named(folder, change, told):
    rewrite(folder, change)
    with pytest.raises(FileFormatError, match=told):
        el.load_model(folder, device="cpu")


def test_what_is_rightly_absent_or_of_no_use_is_no_fault(tiny_folder, tmp_path):
    """Tied heads are not stored, and old versions of transformers stored masks."""
    folder = shutil.copytree(tiny_folder("gptj"), tmp_path / "model")
    rewrite(folder, lambda t: t | {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4)})
    rewrite(folder, lambda t: t | {"transformer.h.0.attn.masked_bias": torch.ones(1)})
    tokens = torch.tensor([[5, 6, 7]])
    old, new = (el.load_model(f, device="cpu") for f in (folder, tiny_folder("gptj")))
    assert torch.equal(old(tokens), new(tokens))
    names = safetensors.torch.load_file(tiny_folder("gpt2") / "model.safetensors")
    assert "lm_head.weight" not in names
    el.load_model(tiny_folder("gpt2"), device="cpu")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", r"is empty \(0 bytes\): download"),
        (POINTER, r"is a Git LFS pointer, not the file itself: run `git lfs pull`"),
        (None, r"is truncated or no safetensors file"),
        (b"<html>not found</html>", r"is truncated or no safetensors file"),
    ],
    ids=["empty", "pointer", "truncated", "a web page"],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_damaged_weight_files_are_named(folder, content, told, sharded):
    file = folder / "model.safetensors"
    if sharded:
        tf.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(
            folder, max_shard_size="20KB"
        )
        file.unlink(missing_ok=True)
        file = sorted(folder.glob("model-*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    with pytest.raises(FileFormatError, match=rf"{file.name} {told}"):
        el.load_model(folder, device="cpu")


def test_shards_load_and_a_missing_one_is_named(folder):
    whole = el.load_model(folder, device="cpu")
    tf.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    tokens = torch.tensor([[5, 6, 7]])
    assert torch.equal(el.load_model(folder, device="cpu")(tokens), whole(tokens))
    shards[0].unlink()
    with pytest.raises(FileFormatError, match=rf"{shards[0].name} is not in .*index.json lists it"):
        el.load_model(folder, device="cpu")
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(FileFormatError, match=r"index\.json holds no JSON object"):
        el.load_model(folder, device="cpu")
    for names in ("[1]", '{"w": 5}', '{"w": ["a"]}', "null", "{" * 99_999):
        (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {names}}}')
        with pytest.raises(FileFormatError, match=r"index\.json is truncated or no"):
            el.load_model(folder, device="cpu")
    for name in ("x" * 5000, "\0", ""):
        content = json.dumps({"weight_map": {"w": name}})
        (folder / "model.safetensors.index.json").write_text(content)
        with pytest.raises(FileFormatError, match=r"is not in .*index\.json lists it"):
            el.load_model(folder, device="cpu")


def test_a_damaged_file_in_the_cache_of_the_hub_is_named(folder, monkeypatch):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])

    def broken(*args):
        with safetensors.safe_open(file, framework="pt"):
            raise AssertionError("it is whole")

    monkeypatch.setattr(loading, "_from_files", broken)
    monkeypatch.setattr(loading, "try_to_load_from_cache", lambda *a: str(folder / "config.json"))
    with pytest.raises(FileFormatError, match=rf"{file} is truncated"):
        el.load_model("some/model")


def test_a_pointer_of_another_file(folder):
    (folder / "tokenizer.json").write_bytes(POINTER)
    with pytest.raises(FileFormatError, match=r"tokenizer\.json is a Git LFS pointer"):
        el.load_model(folder, device="cpu")


def test_a_folder_without_weights_or_tokenizer_and_a_file_of_weights(folder):
    with pytest.raises(UnknownModelError, match=r"model\.safetensors is a file.*name the folder"):
        el.load_model(folder / "model.safetensors")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(FileFormatError, match=r"tokenizer.*load_model\(name, tokenizer\)"):
        el.load_model(folder, device="cpu")
    assert el.load_model(folder, word_tokenizer(), device="cpu").to_single_token("7") == 14
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileFormatError, match=rf"Cannot read the model in {folder}.*safetensors"):
        el.load_model(folder, word_tokenizer(), device="cpu")


def test_a_local_folder_is_never_taken_for_a_model_of_the_hub(tiny_folder, tmp_path, monkeypatch):
    """TransformerLens has names of its own for models of the Hub, such as gpt2."""
    shutil.copytree(tiny_folder("llama"), tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    model = el.load_model("gpt2", device="cpu")
    assert type(model.original_model).__name__ == "LlamaForCausalLM"
    assert model.cfg.model_name == "gpt2"


BERT = tf.BertConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=40,
    max_position_embeddings=32,
)


def saved(model, path):
    model.save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_that_sees_later_tokens_is_refused(tmp_path, dtype):
    path = saved(tf.BertForMaskedLM(BERT), tmp_path)
    with pytest.raises(UnsupportedModelError, match="BertForMaskedLM is not causal"):
        el.load_model(path, dtype=dtype, device="cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_same_class_of_model_with_a_causal_mask_is_not(tmp_path, dtype):
    config = tf.BertConfig(**(BERT.to_dict() | {"is_decoder": True}))
    path = saved(tf.BertLMHeadModel(config), tmp_path)
    el.load_model(path, dtype=dtype, device="cpu")


def test_a_causal_class_that_was_made_bidirectional_is_refused():
    model = tf.LlamaForCausalLM(CONFIGS["llama"]())
    model.config.is_causal = False
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    forward = model.model.forward
    free = torch.zeros(1, 1, 5, 5)
    model.model.forward = lambda *args, **kwargs: forward(
        *args, **kwargs | {"attention_mask": free}
    )
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM is not causal"):
        el.load_model(model, word_tokenizer())


def test_encoder_decoders_and_models_without_logits_are_refused(tmp_path):
    t5 = tf.T5Config(vocab_size=64, d_model=32, num_layers=2, num_heads=4, d_ff=40, d_kv=8)
    with pytest.raises(UnsupportedModelError, match="T5ForConditionalGeneration is an encoder-dec"):
        el.load_model(saved(tf.T5ForConditionalGeneration(t5), tmp_path / "t5"))
    with pytest.raises(UnsupportedModelError, match="LlamaModel does not turn tokens into logits"):
        el.load_model(tf.LlamaModel(CONFIGS["llama"]()), word_tokenizer())
    xlnet = tf.XLNetConfig(vocab_size=64, d_model=32, n_layer=1, n_head=4, d_inner=40)
    with pytest.raises(UnsupportedModelError, match="no bridge for XLNetLMHeadModel"):
        el.load_model(tf.XLNetLMHeadModel(xlnet), word_tokenizer())


def test_the_check_of_causality_knows_chance_short_contexts_and_small_vocabularies():
    tokens, noise = torch.tensor([[1, 2, 0]]), iter([0.0, 0.01, 0.02])
    check_causal(lambda t: t[..., None].cumsum(1) + next(noise), tokens, 3, "noisy")
    seen = lambda t: t[..., None].flip(1).cumsum(1).flip(1).float()  # noqa: E731
    check_causal(seen, tokens[:, :1], 3, "one position")
    check_causal(seen, torch.zeros(1, 3, dtype=torch.int64), 1, "one token")
    with pytest.raises(UnsupportedModelError, match="two tokens is not causal"):
        check_causal(seen, torch.tensor([[0, 1]]), 2, "two tokens")


@pytest.mark.parametrize("family", ["mixtral", "mamba"])
def test_causal_models_of_other_kinds_pass(tiny_folder, family):
    el.load_model(tiny_folder(family), device="cpu")


@pytest.mark.parametrize(("vocab", "context"), [(2, 32), (64, 2), (64, 1)])
def test_models_of_few_tokens_and_short_context_load(vocab, context):
    config = tf.GPT2Config(vocab_size=vocab, n_embd=8, n_layer=1, n_head=2, n_positions=context)
    el.load_model(tf.GPT2LMHeadModel(config), word_tokenizer())


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps", "xpu"])
def test_devices_that_are_not_here_are_told_before_loading(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if torch.get_device_module(device).is_available():
        pytest.skip("it is here")
    with pytest.raises(ValueError, match=f"The device '{device}' is not there.*have 0"):
        el.load_model("no/such-model", device=device)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "meta", "npu", ""])
def test_unknown_devices_are_told_before_loading(device):
    with pytest.raises(ValueError, match=f"Unknown device '{device}'; use cpu, cuda"):
        el.load_model("no/such-model", device=device)


@pytest.mark.parametrize("family", ["OlmoConfig", "Olmo2Config", "Olmo3Config", "LlamaConfig"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotation_in_float32_does_not_break_half_precision(family, dtype, tmp_path):
    config = getattr(tf, family)(**CONFIGS["llama"]().to_diff_dict() | {"model_type": None})
    torch.manual_seed(0)
    plain = tf.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    tokens = torch.randint(3, 60, (2, 7))
    with torch.no_grad():
        wanted = plain.eval()(tokens).logits
        model = el.load_model(saved(plain, tmp_path), dtype=dtype, device="cpu")
        torch.testing.assert_close(model(tokens, use_cache=False), wanted)
        torch.testing.assert_close(model(tokens, use_cache=True), wanted)
    exact = el.load_model(tmp_path, device="cpu")
    assert el.evaluate(model, MIXED).loss == pytest.approx(el.evaluate(exact, MIXED).loss, rel=0.01)


FALCON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize("multi_query", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_falcon_with_grouped_heads_is_refused_or_right(heads, multi_query):
    config = tf.FalconConfig(
        **FALCON, new_decoder_architecture=True, num_kv_heads=heads, multi_query=multi_query
    )
    plain, tokens = tf.FalconForCausalLM(config).eval(), torch.randint(3, 60, (2, 7))
    if heads > 1:
        with pytest.raises(
            UnsupportedModelError, match=rf"Falcon .* {heads} key/value heads is not"
        ):
            el.load_model(plain, word_tokenizer())
        return
    with torch.no_grad():
        wanted = plain(tokens).logits
        torch.testing.assert_close(el.load_model(plain, word_tokenizer())(tokens), wanted)


def test_a_configuration_that_the_bridge_computes_otherwise_is_refused(folder):
    """Whatever the reason: the logits of the bridge must be those of transformers."""
    model = tf.AutoModelForCausalLM.from_pretrained(folder)

    class Doubled(type(model.model.layers[0].self_attn)):
        def forward(self, *args, **kwargs):
            out, pattern = super().forward(*args, **kwargs)
            return 2 * out, pattern

    for layer in model.model.layers:
        layer.self_attn.__class__ = Doubled
    with pytest.raises(UnsupportedModelError, match="computes other logits for LlamaForCausalLM"):
        el.load_model(model, word_tokenizer())


def test_logits_that_overflow_are_told(folder):
    rewrite(folder, lambda t: t | {"lm_head.weight": t["lm_head.weight"] * 6e4})
    el.load_model(folder, device="cpu")
    with pytest.raises(ValueError, match=r"not finite in torch\.float16: load it as float32"):
        el.load_model(folder, device="cpu", dtype="float16")


def test_an_index_of_another_model_is_no_excuse(folder):
    """An index that leaves out what the folder needs."""
    tf.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    gone = index["weight_map"][UP]
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != gone}
    path.write_text(json.dumps(index))
    with pytest.raises(FileFormatError, match=rf"missing .*{UP}"):
        el.load_model(folder, device="cpu")
