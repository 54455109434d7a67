"""Models in memory: of transformers, of peft, and bridges that TransformerLens made itself."""

import sys

import pytest
import torch
import transformers as tf
from tiny_models import CONFIGS, MIXED, in_families, word_tokenizer
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

import eigenlens as el

TOKENS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))


def plain_model(family, dtype=torch.float32):
    torch.manual_seed(0)
    config = CONFIGS[family]()
    return tf.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")


def logits(model):
    with torch.no_grad():
        found = model(TOKENS)
    return getattr(found, "logits", found)


@in_families()
def test_the_given_weights_are_used(family):
    plain = plain_model(family).eval()
    wanted = logits(plain)
    model = el.load_model(plain.train(), word_tokenizer())
    torch.testing.assert_close(logits(model), wanted)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert (model.cfg.device, model.cfg.dtype) == ("cpu", torch.float32)
    assert el.evaluate(model, MIXED).provenance.model == type(plain).__name__


@in_families(["gpt2", "llama", "falcon", "phi3"])
def test_a_model_in_memory_and_the_same_one_from_a_folder(family, tiny_folder, tmp_path):
    """Hooks, types and numbers are those of a folder; attention was not eager before."""
    plain = tf.AutoModelForCausalLM.from_pretrained(tiny_folder(family))
    assert plain.config._attn_implementation == "sdpa"
    one = el.load_model(plain, word_tokenizer())
    two = el.load_model(tiny_folder(family), device="cpu")
    assert set(one.hook_dict) == set(two.hook_dict)
    (_, left), (_, right) = one.run_with_cache(TOKENS), two.run_with_cache(TOKENS)
    assert set(left) == set(right)
    pattern = "blocks.1.attn.hook_pattern"
    torch.testing.assert_close(left[pattern], right[pattern])
    assert el.evaluate(one, MIXED).examples.equals(el.evaluate(two, MIXED).examples)


def test_the_type_stays_or_is_the_wanted_one():
    assert el.load_model(plain_model("llama", torch.bfloat16), word_tokenizer()).cfg.dtype == (
        torch.bfloat16
    )
    plain = plain_model("llama").eval()
    wanted = logits(plain)
    model = el.load_model(plain, word_tokenizer(), dtype="bfloat16", device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.rotary_emb.original_component.inv_freq.dtype == torch.float32
    torch.testing.assert_close(logits(model).float(), wanted, atol=0.01, rtol=0.1)


def test_a_subclass_keeps_its_own_pass():
    class Louder(tf.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            found = super().forward(*args, **kwargs)
            found.logits = 2 * found.logits
            return found

    config = CONFIGS["llama"]()
    config.architectures = ["SomethingElse"]
    plain = Louder(config).eval()
    wanted = logits(plain)
    torch.testing.assert_close(logits(el.load_model(plain, word_tokenizer())), wanted)


def test_what_is_no_model_or_lacks_something_is_told():
    with pytest.raises(ValueError, match=r"needs its tokenizer: load_model\(model, tokenizer\)"):
        el.load_model(plain_model("llama"))
    with pytest.raises(ValueError, match=r"A Linear is no model of transformers"):
        el.load_model(torch.nn.Linear(2, 2), word_tokenizer())
    plain = plain_model("llama")
    el.load_model(plain, word_tokenizer())
    with pytest.raises(ValueError, match=r"belongs to a TransformerBridge already: give that"):
        el.load_model(plain, word_tokenizer())
    empty = plain_model("llama")
    empty.lm_head.weight = torch.nn.Parameter(torch.empty(64, 32, device="meta"))
    with pytest.raises(ValueError, match=r"not loaded: lm_head\.weight is on the meta device"):
        el.load_model(empty, word_tokenizer())
    broken = plain_model("llama")
    broken.lm_head.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"NaN or infinite values: lm_head\.weight"):
        el.load_model(broken, word_tokenizer())


def test_the_given_tokenizer_is_used_and_stays_as_it_is(tiny_folder):
    """TransformerLens would read the one that lies at ``name_or_path`` in its place."""
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny_folder("llama"))
    tokenizer.add_tokens(["seven"])
    tokenizer.pad_token = None
    before = dict(tokenizer.init_kwargs)
    for model in (
        el.load_model(plain_model("llama"), tokenizer),
        el.load_model(tiny_folder("llama"), tokenizer, device="cpu"),
    ):
        assert model.tokenizer.convert_tokens_to_ids("seven") == 64
        assert model.tokenizer.init_kwargs == before
        assert model.tokenizer.pad_token is not None
        assert model.cfg.d_vocab == 64
    assert tokenizer.pad_token is None
    assert tokenizer.init_kwargs == before


def lora_model(family="llama"):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj", "up_proj"]
    )
    return peft.get_peft_model(plain_model(family), config).eval()


def test_peft_models_are_refused_or_merged():
    wrapped = lora_model()
    wanted = logits(wrapped)
    with pytest.raises(ValueError, match=r"PeftModelForCausalLM .*merge_and_unload\(\) first"):
        el.load_model(wrapped, word_tokenizer())
    model = el.load_model(wrapped, word_tokenizer(), merge_adapter=True)
    torch.testing.assert_close(logits(model), wanted)
    merged = lora_model().merge_and_unload()
    with pytest.raises(ValueError, match="LlamaForCausalLM holds no peft adapter to merge"):
        el.load_model(merged, word_tokenizer(), merge_adapter=True)
    torch.testing.assert_close(logits(el.load_model(merged, word_tokenizer())), wanted)


def test_adapters_that_cannot_be_merged_are_told():
    peft = pytest.importorskip("peft")
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    injected = plain_model("llama")
    injected.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    for model in (peft.get_peft_model(plain_model("llama"), prompt), injected):
        with pytest.raises(ValueError, match=rf"in this {type(model).__name__} cannot be merged"):
            el.load_model(model, word_tokenizer(), merge_adapter=True)


@pytest.fixture
def adapter(tmp_path):
    """A folder of an adapter and one of its base model, and the logits of both together."""
    plain_model("llama").save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    wrapped = lora_model()
    wrapped.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    wrapped.save_pretrained(tmp_path / "adapter")
    return tmp_path, logits(wrapped)


def test_a_folder_of_an_adapter_is_merged_when_asked(adapter):
    folder, wanted = adapter
    with pytest.raises(ValueError, match=r"adapter_config\.json belongs to a peft.*merge_adapter"):
        el.load_model(folder / "adapter")
    model = el.load_model(folder / "adapter", merge_adapter=True, device="cpu")
    torch.testing.assert_close(logits(model), wanted)
    assert model.cfg.model_name == str(folder / "adapter")
    with pytest.raises(ValueError, match=r"holds no adapter_config\.json"):
        el.load_model(folder / "base", merge_adapter=True)


def test_an_adapter_beside_its_base_model(adapter):
    folder, wanted = adapter
    for file in (folder / "adapter").glob("adapter_*"):
        file.rename(folder / "base" / file.name)
    with pytest.raises(ValueError, match=r"base/adapter_config\.json .*beside a base model"):
        el.load_model(folder / "base")
    model = el.load_model(folder / "base", merge_adapter=True, dtype="float32", device="cpu")
    torch.testing.assert_close(logits(model), wanted)


def test_adapters_that_are_damaged_or_do_not_fit_are_told(adapter):
    import safetensors.torch

    folder, _ = adapter
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"

    def load(change):
        safetensors.torch.save_file(change(dict(tensors)), path)
        return el.load_model(folder / "adapter", merge_adapter=True, device="cpu")

    load(lambda t: t)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.lora_B"):
        load(lambda t: {k: v for k, v in t.items() if k != name})
    with pytest.raises(ValueError, match=r"layers\.9\.up_proj"):
        load(lambda t: t | {"base_model.model.model.layers.9.up_proj.lora_B.weight": t[name] + 1})
    with pytest.raises(ValueError, match=r"does not fit its base model .*size mismatch"):
        load(lambda t: t | {name: torch.ones(3, 8)})
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is truncated"):
        el.load_model(folder / "adapter", merge_adapter=True)
    safetensors.torch.save_file(tensors, path)
    (folder / "base" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"base/model\.safetensors is empty"):
        el.load_model(folder / "adapter", merge_adapter=True)


def test_adapters_whose_base_model_is_not_there_are_told(adapter):
    folder, _ = adapter
    config = folder / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(folder / "base"), str(folder / "gone")))
    with pytest.raises(ValueError, match=rf"Cannot read the model in .*{folder / 'gone'}"):
        el.load_model(folder / "adapter", merge_adapter=True)
    config.write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match=r"adapter_config\.json names no base model"):
        el.load_model(folder / "adapter", merge_adapter=True)


def test_without_peft_the_package_is_named(adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'eigenlens\[peft\]'"):
        el.load_model(adapter[0] / "adapter", merge_adapter=True)


@in_families(["gpt2", "phi", "gemma2", "bloom"])
def test_a_bridge_of_boot_transformers_is_made_ready(family, tiny_folder):
    bridge = TransformerBridge.boot_transformers(str(tiny_folder(family)), device="cpu").train()
    model = el.load_model(bridge)
    assert model is bridge
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    ours = el.load_model(tiny_folder(family), device="cpu")
    assert model.cfg.default_prepend_bos is ours.cfg.default_prepend_bos is False
    one, two = el.evaluate(model, MIXED), el.evaluate(ours, MIXED)
    assert one.examples.equals(two.examples)
    with pytest.raises(ValueError, match="keeps the type of its weights"):
        el.load_model(bridge, dtype="bfloat16")


def native(**options):
    config = TransformerBridgeConfig(
        d_model=32,
        n_layers=2,
        n_heads=4,
        d_head=8,
        n_ctx=32,
        d_vocab=70,
        act_fn="gelu",
        seed=0,
        architecture="TransformerLensNative",
        **options,
    )
    return TransformerBridge.boot_native(config, dtype=torch.float32)


@pytest.mark.parametrize(
    "options", [{}, {"gated_mlp": True, "positional_embedding_type": "rotary"}, {"attn_only": True}]
)
def test_a_bridge_of_boot_native_is_made_ready(options):
    with pytest.raises(ValueError, match=r"no tokenizer: load_model\(bridge, tokenizer\)"):
        el.load_model(native(**options))
    model = el.load_model(native(**options), word_tokenizer(), dtype="float32", device="cpu")
    assert (model.cfg.d_vocab, model.cfg.d_vocab_out) == (70, 70)
    assert model.cfg.model_name == "native"
    assert model.cfg.default_prepend_bos is False
    alone, together = (el.evaluate(model, MIXED, batch_size=size) for size in (1, 5))
    assert alone.examples.loss.to_numpy() == pytest.approx(together.examples.loss.to_numpy())
    if "attn_only" not in options:
        assert len(el.decompose(model, progress=False)) > 0


def test_a_bridge_that_sees_later_tokens_is_refused():
    bridge = native(attention_dir="bidirectional")
    with pytest.raises(ValueError, match="NativeModel is not causal"):
        el.load_model(bridge, word_tokenizer())
