"""What rotary embeddings do to the score between a query and a key at a distance.

A query at position d is turned by ``R_d`` and a key at position 0 by ``R_0``, so that their score
is ``(q R_d) · (k R_0) = q (R_d R_0ᵀ) · k``: the distance alone matters. The turns are those of the
model's own rotary embedding, read off where its attention is called, with the function of its
family in transformers.
"""

import sys
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from eigenlens.passes import attention_calls


def turns(
    model: TransformerBridge, layer: int, distance: int, like: Float[Tensor, "_ width"]
) -> Float[Tensor, "width width"]:
    """``R_d R_0ᵀ``: takes queries, as rows, to where keys at this distance meet them.

    The identity at distance 0, and for models that do not turn queries and keys.

    Args:
        model: gives the turns.
        layer: of the attention; some families have other turns in some layers.
        distance: tokens that the key stands before the query.
        like: rows of the head's width, in whose type and place the turns are needed.

    Raises:
        ValueError: a distance that is negative or longer than the context; a model that turns
            queries and keys inside its attention, where the turns cannot be read off.
    """
    if not 0 <= distance < model.cfg.n_ctx:
        raise ValueError(
            f"distance={distance}: the key stands 0 to {model.cfg.n_ctx - 1} tokens before the "
            "query in this model's context."
        )
    identity = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
    if distance == 0:
        return identity
    given = _position_embeddings(model, layer, distance + 1)
    if given is None:
        if getattr(model.cfg, "positional_embedding_type", None) == "rotary":
            raise ValueError(
                f"distance={distance}: {type(model.original_model).__name__} turns queries and "
                "keys inside its attention, so only distance=0 can be read."
            )
        return identity
    cos, sin = (part.to(like) for part in given)
    last, first = (_turned(model, layer, identity, cos[:1, [p]], sin[:1, [p]]) for p in (-1, 0))
    return last @ first.T


def _position_embeddings(
    model: TransformerBridge, layer: int, n_pos: int
) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines that the attention of a layer is called with."""
    tokens = torch.zeros(1, n_pos, dtype=torch.int64, device=model.cfg.device)
    run = partial(model, tokens, use_cache=False)
    _, kwargs = attention_calls(model, [layer], run)[layer]
    found = kwargs.get("position_embeddings")
    return found if isinstance(found, tuple) else None


def _turned(
    model: TransformerBridge,
    layer: int,
    rows: Float[Tensor, "n width"],
    cos: Float[Tensor, "1 1 turned"],
    sin: Float[Tensor, "1 1 turned"],
) -> Float[Tensor, "n width"]:
    """Rows as queries at one position; what lies beyond the turned part stays."""
    attention = model.blocks[layer].attn.original_component
    family = sys.modules[type(attention).__module__]
    apply = getattr(family, "apply_rotary_pos_emb", apply_rotary_pos_emb)
    width = cos.shape[-1]
    part = rows[None, :, None, :width]  # batch, head, pos, width
    turned = apply(part, part, cos, sin)[0][0, :, 0]
    return torch.cat([turned, rows[:, width:]], dim=-1)
