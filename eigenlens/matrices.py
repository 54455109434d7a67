"""The linear maps of a transformer: the one place that knows hook names and weight layouts.

Every map is ``y = x W + b`` with ``x: [batch, pos, d_in]``. ``W_Q``, ``W_K``, ``W_V`` and ``W_O``
are blocks of heads (with grouped-query attention ``W_K`` and ``W_V`` have the key/value heads);
``W_in``, ``W_gate`` and ``W_out`` are single maps, listed with one head.

Components are coordinates of one activation of a map, on its *small side* (:class:`Site`): the
output of ``W_Q``, ``W_K`` and ``W_V``, where their heads are apart, the input of ``W_O`` for the
same reason, and of an MLP map whichever of the two is narrower.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import pandas as pd
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers.pytorch_utils import Conv1D

from eigenlens.inputs import check_model

MATRIX_KINDS = ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out")
MLP_KINDS = MATRIX_KINDS[4:]  # single maps, without heads
JOINT_KINDS = ("QK", "OV")  # W_Q W_Kᵀ and W_V W_O
KINDS = (*MATRIX_KINDS, *JOINT_KINDS)
Side = Literal["in", "out"]

_MODULES = {
    "W_Q": "attn.q",
    "W_K": "attn.k",
    "W_V": "attn.v",
    "W_O": "attn.o",
    "W_in": "mlp.in",
    "W_gate": "mlp.gate",
    "W_out": "mlp.out",
}
_HEAD_AXIS: dict[str, Side] = {"W_Q": "out", "W_K": "out", "W_V": "out", "W_O": "in"}


class UnsupportedModelError(ValueError):
    """The model has a block without dense attention and MLP matrices."""


@dataclass(frozen=True)
class Site:
    """The activation, cut into heads, that components of one kind are coordinates of.

    Attributes:
        layer: index of the block.
        kind: one of :data:`KINDS`. ``QK`` lives in the space of queries, the output of ``W_Q``;
            ``OV`` in the space of ``z``, the input of ``W_O``.
        n_heads: heads of the activation (1 for MLP maps).
        side: whether it is the input or the output of its map.
        width: of one head.
        far_width: of one head on the other side of its map.
    """

    layer: int
    kind: str
    n_heads: int
    side: Side
    width: int
    far_width: int

    @property
    def name(self) -> str:
        """``blocks.{layer}.{kind}``."""
        return f"blocks.{self.layer}.{self.kind}"

    @property
    def matrix(self) -> str:
        """Kind of the map whose input or output it is."""
        return {"QK": "W_Q", "OV": "W_O"}.get(self.kind, self.kind)

    @property
    def map_name(self) -> str:
        """``blocks.{layer}.{matrix}``: the name of that map."""
        return f"blocks.{self.layer}.{self.matrix}"

    @property
    def hook(self) -> str:
        """Hook of the activation."""
        return f"blocks.{self.layer}.{_MODULES[self.matrix]}.hook_{self.side}"

    def split(self, value: Tensor, n_pos: int) -> Float[Tensor, "batch pos head width"]:
        """What the hook sees, whose layout depends on the family, as heads."""
        return value.reshape(-1, n_pos, self.n_heads, self.width)

    def find(self, model: TransformerBridge) -> "WeightMatrix":
        """The map in the model at hand.

        Raises:
            ValueError: the model has no such map, or one of another shape.
        """
        matrix = map_of(model, self.layer, self.matrix)
        here, own = matrix.site_on(self.side), self.n_heads * self.width
        if here.n_heads * here.width != own:
            raise ValueError(
                f"{self.hook} is {here.n_heads * here.width} wide here, not {own}: "
                "this belongs to another model."
            )
        return matrix


@dataclass(frozen=True)
class WeightMatrix:
    """One linear map of one block.

    Attributes:
        layer: index of the block.
        kind: one of :data:`MATRIX_KINDS`.
        n_heads: heads of this map (key/value heads for ``W_K`` and ``W_V``; 1 for MLP maps).
        head_axis: whether the heads divide the output (``W_Q``, ``W_K``, ``W_V``), the input
            (``W_O``), or nothing.
        d_in, d_out: input and output width of one head.
        module: the ``nn.Linear`` or ``Conv1D`` that the model runs.
    """

    layer: int
    kind: str
    n_heads: int
    head_axis: Side | None
    d_in: int
    d_out: int
    module: nn.Module = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """``blocks.{layer}.{kind}``."""
        return f"blocks.{self.layer}.{self.kind}"

    @property
    def hook_in(self) -> str:
        """Hook of the input that the weight really multiplies."""
        return f"blocks.{self.layer}.{_MODULES[self.kind]}.hook_in"

    @property
    def hook_out(self) -> str:
        """Hook of the output, bias included."""
        return f"blocks.{self.layer}.{_MODULES[self.kind]}.hook_out"

    @property
    def rank(self) -> int:
        """Components per head."""
        return min(self.d_in, self.d_out)

    def width(self, side: Side) -> int:
        """Width of one head's input or output."""
        return self.d_in if side == "in" else self.d_out

    @property
    def side(self) -> Side:
        """The small side: where heads are apart, else where the map is narrower."""
        return self.head_axis or ("in" if self.d_in <= self.d_out else "out")

    @property
    def site(self) -> Site:
        """The activation that this map's components are coordinates of."""
        return self.site_on(self.side)

    def site_on(self, side: Side) -> Site:
        """The input or the output as the activation of coordinates.

        On the side that its heads share it is one head.
        """
        far: Side = "in" if side == "out" else "out"
        heads = self.n_heads if side == self.head_axis else 1
        return Site(self.layer, self.kind, heads, side, self.width(side), self.width(far))

    @property
    def flat_weight(self) -> Float[Tensor, "all_in all_out"]:
        """All heads side by side, ``x @ W`` orientation: a view that writes through."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return self.flat(weight)

    def flat(self, stored: Float[Tensor, "rows columns"]) -> Float[Tensor, "all_in all_out"]:
        """What has the layout of the parameter, such as its gradient, as ``x @ W`` needs it."""
        return stored if isinstance(self.module, Conv1D) else stored.T

    @property
    def weight(self) -> Float[Tensor, "head d_in d_out"]:
        """The weight of each head, ``x @ W`` orientation: a view of the parameter."""
        return split_heads(self.flat_weight, self.n_heads, self.head_axis)

    @property
    def bias(self) -> Float[Tensor, " all_out"] | None:
        """The bias of the whole map, or ``None``."""
        bias = getattr(self.module, "bias", None)
        return bias if isinstance(bias, Tensor) else None


def split_heads(
    flat: Float[Tensor, "all_in all_out"], n_heads: int, head_axis: Side | None
) -> Float[Tensor, "head d_in d_out"]:
    """Split a flat ``[d_in, d_out]`` map into its heads."""
    if head_axis == "in":
        return rearrange(flat, "(head d_in) d_out -> head d_in d_out", head=n_heads)
    return rearrange(flat, "d_in (head d_out) -> head d_in d_out", head=n_heads)


def join_heads(
    weight: Float[Tensor, "head d_in d_out"], head_axis: Side | None
) -> Float[Tensor, "all_in all_out"]:
    """Put heads side by side again: the inverse of :func:`split_heads`."""
    if head_axis == "in":
        return rearrange(weight, "head d_in d_out -> (head d_in) d_out")
    return rearrange(weight, "head d_in d_out -> d_in (head d_out)")


class WeightMatrices(tuple[WeightMatrix, ...]):
    """The maps of a model in order; shows as a table in a notebook."""

    def to_pandas(self) -> pd.DataFrame:
        """One row per map: name, layer, matrix, heads, shape of one head, hook names."""
        return pd.DataFrame(
            [
                {
                    "name": m.name,
                    "layer": m.layer,
                    "matrix": m.kind,
                    "heads": m.n_heads,
                    "d_in": m.d_in,
                    "d_out": m.d_out,
                    "hook_in": m.hook_in,
                    "hook_out": m.hook_out,
                }
                for m in self
            ]
        )

    def _repr_html_(self) -> str:
        return self.to_pandas().to_html(index=False)


def weight_matrices(
    model: TransformerBridge,
    matrices: Iterable[str] | None = None,
    layers: Iterable[int] | None = None,
) -> WeightMatrices:
    """List the linear maps of ``model``.

    Args:
        model: any ``TransformerBridge`` whose blocks have dense attention and a dense MLP.
        matrices: kinds to list (default: all that the model has).
        layers: blocks to list (default: all).

    Raises:
        ValueError: no bridge; an unknown matrix kind or layer, or a kind that the model does not
            have.
        UnsupportedModelError: a mixture-of-experts or state-space block; names layer and kind.
    """
    check_model(model)
    kinds = checked_kinds(matrices)
    if not hasattr(model, "blocks"):
        raise UnsupportedModelError(
            f"{type(model.original_model).__name__} has no stack of transformer blocks."
        )
    wanted = _checked_layers(layers, len(model.blocks))
    found = [
        matrix
        for layer in wanted
        for matrix in _block_matrices(model, layer)
        if kinds is None or matrix.kind in kinds
    ]
    missing = [kind for kind in kinds or () if kind not in {m.kind for m in found}]
    if missing:
        raise ValueError(f"This model has no {', '.join(missing)}: its blocks hold no such map.")
    return WeightMatrices(found)


def map_of(model: TransformerBridge, layer: int, kind: str) -> WeightMatrix:
    """One linear map of the model.

    Raises:
        ValueError: the model has no such kind or layer.
    """
    return weight_matrices(model, [kind], [layer])[0]


def checked_kinds(
    matrices: Iterable[str] | None, known: tuple[str, ...] = MATRIX_KINDS
) -> tuple[str, ...] | None:
    """The kinds that are named, ``None`` for all; an unknown one raises ``ValueError``."""
    if matrices is None:
        return None
    kinds = (matrices,) if isinstance(matrices, str) else tuple(matrices)
    unknown = [kind for kind in kinds if kind not in known]
    if unknown or not kinds:
        raise ValueError(
            f"Unknown matrix kind {', '.join(map(repr, unknown)) or '(none)'}; "
            f"choose from {', '.join(known)}."
        )
    return kinds


def _checked_layers(layers: Iterable[int] | None, n_layers: int) -> list[int]:
    if layers is None:
        return list(range(n_layers))
    wanted = sorted(set(layers))
    unknown = [layer for layer in wanted if not 0 <= layer < n_layers]
    if unknown or not wanted:
        raise ValueError(
            f"Unknown layer {', '.join(map(str, unknown)) or '(none)'}; "
            f"this model has layers 0 to {n_layers - 1}."
        )
    return wanted


def _block_matrices(model: TransformerBridge, layer: int) -> Iterator[WeightMatrix]:
    block = model.blocks[layer]
    n_heads, d_head = model.cfg.n_heads, model.cfg.d_head
    for kind, path in _MODULES.items():
        part, name = path.split(".")
        linear = _linear(getattr(block, part, None), name)
        if linear is None:
            if kind == "W_gate" or (part == "mlp" and not hasattr(block, "mlp")):
                continue  # an MLP without a gate, a block without an MLP
            raise _unsupported(model, layer, kind, part)
        flat_in, flat_out = linear.weight.shape
        if not isinstance(linear, Conv1D):
            flat_in, flat_out = flat_out, flat_in
        axis = _HEAD_AXIS.get(kind)
        split = {"in": flat_in, "out": flat_out}.get(axis or "", 0)
        heads = split // d_head if split else 1
        if split % d_head or (kind in ("W_Q", "W_O") and heads != n_heads):
            raise UnsupportedModelError(
                f"{kind} of layer {layer} is {flat_in} x {flat_out}, which does not divide into "
                f"{n_heads} heads of {d_head}: this attention is not supported."
            )
        yield WeightMatrix(
            layer=layer,
            kind=kind,
            n_heads=heads,
            head_axis=axis,
            d_in=flat_in // heads if axis == "in" else flat_in,
            d_out=flat_out // heads if axis == "out" else flat_out,
            module=linear,
        )


def _linear(part: nn.Module | None, name: str) -> nn.Linear | Conv1D | None:
    bridge = getattr(part, name, None)
    linear = getattr(bridge, "original_component", None)
    return linear if isinstance(linear, nn.Linear | Conv1D) else None


def _unsupported(
    model: TransformerBridge, layer: int, kind: str, part: str
) -> UnsupportedModelError:
    block = model.blocks[layer]
    inner = next(
        (
            getattr(child, "original_component", None) or child
            for child in (getattr(block, part, None), getattr(block, "mixer", None))
            if child is not None
        ),
        getattr(block, "original_component", None) or block,
    )
    return UnsupportedModelError(
        f"Layer {layer} has no dense {kind}: its {part} is a {type(inner).__name__}. "
        "eigenlens decomposes dense attention and MLP matrices only; "
        "mixture-of-experts and state-space blocks are not supported."
    )
