"""Tiny random models with the real configurations of many families, and data to run them on."""

from collections.abc import Iterable

import pytest
import torch
import transformers as tf
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

from eigenlens.architectures.tiny_models import enlarge

VOCAB = 64
_WIDTHS = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
_GROUPED = {**_WIDTHS, "num_key_value_heads": 2}

CONFIGS = {
    "gpt2": lambda: tf.GPT2Config(vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=3, n_positions=32),
    "phi": lambda: tf.PhiConfig(**_WIDTHS),
    "phi3": lambda: tf.Phi3Config(**_GROUPED, pad_token_id=0),
    "llama": lambda: tf.LlamaConfig(**_GROUPED),
    "gemma2": lambda: tf.Gemma2Config(**_GROUPED, head_dim=8),
    "gemma3": lambda: tf.Gemma3TextConfig(**(_WIDTHS | {"num_key_value_heads": 1}), head_dim=8),
    "qwen3": lambda: tf.Qwen3Config(**_GROUPED, head_dim=8),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**_WIDTHS),
    "opt": lambda: tf.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        ffn_dim=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        word_embed_proj_dim=32,
    ),
    "bloom": lambda: tf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
    "gptj": lambda: tf.GPTJConfig(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=32, rotary_dim=4
    ),
    "mistral": lambda: tf.MistralConfig(**_GROUPED, sliding_window=None),
    "falcon": lambda: tf.FalconConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        multi_query=True,
    ),
    "mixtral": lambda: tf.MixtralConfig(**_GROUPED, num_local_experts=2),
    "qwen2_moe": lambda: tf.Qwen2MoeConfig(
        **_GROUPED,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
    ),
    "jamba": lambda: tf.JambaConfig(  # layer 0: state space and MLP; layer 1: attention and experts
        **_GROUPED,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "mamba": lambda: tf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2),
}
PARTLY = ("mixtral", "qwen2_moe", "jamba")  # experts, or a state space, beside what is dense
REFUSED = (*PARTLY, "mamba")
FAMILIES = tuple(name for name in CONFIGS if name not in REFUSED)
# One of each kind: learned positions, parallel blocks, grouped queries, norms on both sides.
TYPICAL = ("gpt2", "phi", "llama", "gemma3")


def in_families(families: Iterable[str] = FAMILIES) -> pytest.MarkDecorator:
    """Once in each family; in those that are like others, as a slow test."""
    return pytest.mark.parametrize(
        "family",
        [
            pytest.param(name, marks=() if name in TYPICAL else pytest.mark.slow)
            for name in families
        ],
    )


def word_tokenizer() -> tf.PreTrainedTokenizerFast:
    """Whole words as tokens: the numbers 0 to 56 and the signs."""
    words = ["<pad>", "<s>", "</s>", "+", "x", "?", "=", *map(str, range(VOCAB - 7))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def write_tiny_model(family: str, path) -> None:
    """Write a random model with large enough weights for its outputs to differ, and a tokenizer."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
    enlarge(model)
    model.save_pretrained(path)
    word_tokenizer().save_pretrained(path)


def dataset(rows: list[tuple[str, str]]) -> Dataset:
    """Prompts and answers as a data set without candidates."""
    return Dataset.from_dict(
        {
            "prompt": [prompt for prompt, _ in rows],
            "answer": [answer for _, answer in rows],
            "candidates": [[] for _ in rows],
        }
    )


EQUAL = dataset(
    [(f"{a} + {b} =", f" {a + b} 3") for a, b in [(1, 2), (9, 4), (7, 7), (3, 30), (5, 11), (8, 2)]]
)
MIXED = dataset(
    [
        ("1 + 2 =", " 3"),
        ("9 x 4 + 1 =", " 37 2 5"),
        ("7 + 7 + 7 + 7 =", " 28"),
        ("3 x 9 =", " 27 1"),
        ("x 5 + 6 x 2 =", " 17"),
    ]
)
