"""A tiny random model of any architecture of transformers, with its real configuration class."""

import dataclasses
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

MOST_PARAMETERS = 10_000_000
VOCABULARY = 384  # more than the tokenizer of arith-tiny knows; the last ones are special tokens
_LAST = VOCABULARY - 1

_WIDTHS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "n_positions": 32,
    "max_seq_len": 32,
    # the stream
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "embed_dim": 32,
    "word_embed_proj_dim": 32,
    "out_hidden_size": 32,
    "projector_hidden_size": 32,
    "attention_hidden_size": 32,
    "lru_width": 32,
    # layers
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "depth": 2,
    # heads
    "num_attention_heads": 4,
    "attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    # feed-forward
    "intermediate_size": 40,
    "intermediate_size_mlp": 40,
    "ffn_dim": 40,
    "ffn_hidden_size": 40,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "moe_k": 2,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    # latent attention
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "index_n_heads": 2,
    "index_head_dim": 8,
    # state space and linear attention
    "mamba_num_heads": 4,
    "mamba_n_heads": 4,
    "n_mamba_heads": 4,
    "mamba_head_dim": 8,
    "mamba_d_head": 16,
    "mamba_d_ssm": 64,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "state_size": 8,
    "n_groups": 1,
    "mamba_n_groups": 1,
    "mamba_ngroups": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    # images and sounds, which are not run
    "num_position_embeddings": 16,
    "image_size": 28,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "vision_output_dim": 32,
    "codebook_size": 16,
    "base_channels": 32,
    # special tokens
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_token_id": _LAST,
    "image_token_index": _LAST,
    "video_token_id": _LAST - 1,
    "audio_token_id": _LAST - 2,
    "audio_token_index": _LAST - 2,
    "vision_start_token_id": _LAST - 3,
    "vision_end_token_id": _LAST - 4,
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
# What the table of widths cannot know: names of their own, and patterns of layers.
_OWN: dict[str, dict[str, Any]] = {
    "BambaConfig": {"attn_layer_indices": [1]},
    "BertConfig": {"is_decoder": True},
    "Emu3Config": {"vocabulary_map": {"<image>": _LAST}},
    "Florence2VisionConfig": {
        "depths": [1],
        "embed_dim": [32],
        "num_heads": [4],
        "num_groups": [4],
        "patch_size": [7],
        "patch_stride": [4],
        "patch_padding": [3],
        "patch_prenorm": [False],
    },
    # The last two layers take keys and values of the first two.
    "Gemma4TextConfig": {
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
    },
    "Gemma4UnifiedTextConfig": {"global_head_dim": 16},
    "Glm4vTextConfig": {"rope_parameters": _MROPE},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "GraniteMoeHybridConfig": {
        "layer_types": ["linear_attention", "full_attention"],
        "position_embedding_type": "rope",
    },
    "JambaConfig": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "Lfm2Config": {"layer_types": ["conv", "full_attention"]},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "Mamba2Config": {"num_heads": 8},
    "Qwen2AudioEncoderConfig": {
        "encoder_attention_heads": 4,
        "encoder_layers": 2,
        "encoder_ffn_dim": 40,
    },
    "Qwen2_5_VLTextConfig": {"rope_parameters": _MROPE},
    "RecurrentGemmaConfig": {"num_hidden_layers": 3},
    "Zamba2Config": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"]},
}


class NotBootable(Exception):
    """No model of this architecture can be made here; says why."""


def tiny_model(architecture: str) -> PreTrainedModel:
    """Random weights in float64, large enough for outputs to differ.

    Raises:
        NotBootable: transformers has no such class, or makes no small model of it.
    """
    names = {name.lower(): name for name in dir(transformers)}
    if architecture.lower() not in names:
        raise NotBootable("transformers has no such class: its code comes with the checkpoint")
    found = getattr(transformers, names[architecture.lower()])
    # Under the name that TransformerLens knows it by, as a checkpoint would give it.
    model_class: Any = type(architecture, (found,), {})
    try:
        config = tiny_config(model_class.config_class)
        with torch.device("meta"):
            size = sum(p.numel() for p in model_class._from_config(config).parameters())
        if size > MOST_PARAMETERS:
            raise NotBootable(f"its smallest configuration here has {size:,} parameters")
        torch.manual_seed(0)
        model = model_class._from_config(
            config,
            dtype=torch.float64,
            attn_implementation="eager",
            experts_implementation="eager",
        )
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        sentence = " ".join(str(error).split()).partition(". ")[0]
        raise NotBootable(f"{type(error).__name__}: {sentence}") from error
    assert isinstance(model, PreTrainedModel)
    model.double().eval()  # some parts stay in float32 whatever the type
    enlarge(model)
    return model


def tiny_config(kind: type[PretrainedConfig]) -> PretrainedConfig:
    """The smallest useful configuration of this class, with two layers or one of each type."""
    names = {field.name for field in dataclasses.fields(kind)}
    values = {name: value for name, value in _WIDTHS.items() if name in names}
    own = _OWN.get(kind.__name__, {})
    try:
        default: Any = kind()
    except (TypeError, ValueError, AttributeError):
        default = None
    for name in kind.sub_configs:
        if name in names and (part := getattr(default, name, None)) is not None:
            values[name] = tiny_config(type(part))
    if "qk_rope_head_dim" in names:  # latent attention: rotated parts, one key for each query
        values |= {"head_dim": _WIDTHS["qk_rope_head_dim"], "num_key_value_heads": 4}
        values = {name: value for name, value in values.items() if name in names}
    types = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    listed = next((n for n in ("layer_types", "layers_block_type") if n in names), None)
    if len(types) > 1 and listed:
        values |= {listed: types, "num_hidden_layers": len(types)}
    return kind(**values | own)


def enlarge(model: nn.Module) -> None:
    """Random weights that are large enough for the outputs of two inputs to differ."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
        elif parameter.ndim >= 2:
            parameter.data = torch.randn_like(parameter) * 0.8 / parameter.shape[-1] ** 0.5
