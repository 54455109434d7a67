"""The linear maps of a transformer: the one place that knows hook names and weight layouts.

Every map is ``y = x W + b`` with ``x: [batch, pos, d_in]``. ``W_Q``, ``W_K``, ``W_V`` and ``W_O``
are blocks of heads (with grouped-query attention ``W_K`` and ``W_V`` have the key/value heads);
``W_in``, ``W_gate`` and ``W_out`` are single maps, listed with one head.

Components are coordinates of one activation of a map, on its *small side* (:class:`Site`): the
output of ``W_Q``, ``W_K`` and ``W_V``, where their heads are apart, the input of ``W_O`` for the
same reason, and of an MLP map whichever of the two is narrower.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import pandas as pd
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eigenlens.blocks import (
    LeftOut,
    UnsupportedModelError,
    check_whole,
    head_width,
    left_out,
    left_out_lines,
    linear_maps,
)
from eigenlens.bridges import TransformerBridge
from eigenlens.inputs import check_model

MATRIX_KINDS = ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out")
MLP_KINDS = MATRIX_KINDS[4:]  # single maps, without heads
JOINT = {"QK": ("W_Q", "W_K"), "OV": ("W_V", "W_O")}  # W_Q W_Kᵀ and W_V W_O
JOINT_KINDS = tuple(JOINT)
KINDS = (*MATRIX_KINDS, *JOINT_KINDS)
Side = Literal["in", "out"]

_HEAD_AXIS: dict[str, Side] = {"W_Q": "out", "W_K": "out", "W_V": "out", "W_O": "in"}


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
        path: of the map within the bridge's block, such as ``attn.q``.
    """

    layer: int
    kind: str
    n_heads: int
    side: Side
    width: int
    far_width: int
    path: str

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
        return f"blocks.{self.layer}.{self.path}.hook_{self.side}"

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
        path: of the map within the bridge's block, such as ``attn.q``.
        module: the ``nn.Linear`` or ``Conv1D`` that the model runs.
    """

    layer: int
    kind: str
    n_heads: int
    head_axis: Side | None
    d_in: int
    d_out: int
    path: str
    module: nn.Module = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """``blocks.{layer}.{kind}``."""
        return f"blocks.{self.layer}.{self.kind}"

    @property
    def hook_in(self) -> str:
        """Hook of the input that the weight really multiplies."""
        return f"blocks.{self.layer}.{self.path}.hook_in"

    @property
    def hook_out(self) -> str:
        """Hook of the output, bias included."""
        return f"blocks.{self.layer}.{self.path}.hook_out"

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
        widths = self.width(side), self.width(far)
        return Site(self.layer, self.kind, heads, side, *widths, self.path)

    @property
    def parameter(self) -> Tensor:
        """The weight as the module stores it."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def flat_weight(self) -> Float[Tensor, "all_in all_out"]:
        """All heads side by side, ``x @ W`` orientation: a view that writes through."""
        return self.flat(self.parameter)

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
    """The maps of a model in order; shows as a table in a notebook.

    Attributes:
        left_out: what else the blocks hold: weights of two and more dimensions that are no map of
            this kind of list, whichever ``matrices`` were asked for.
    """

    left_out: tuple[LeftOut, ...] = ()

    def to_pandas(self) -> pd.DataFrame:
        """One row per map: name, layer, matrix, heads, shape of one head, hook names.

        What is left out follows, with its class as ``matrix``, and the reason.
        """
        rows: list[dict[str, object]] = [
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
        rows += [
            {"name": part.name, "layer": part.layer, "matrix": part.kind, "left out": part.reason}
            for part in self.left_out
        ]
        return pd.DataFrame(rows).astype(dict.fromkeys(("heads", "d_in", "d_out"), "Int64"))

    def __repr__(self) -> str:
        return "\n".join([f"{len(self)} maps", *map(str, self), *left_out_lines(self.left_out)])

    def _repr_html_(self) -> str:
        return self.to_pandas().to_html(index=False, na_rep="")


def weight_matrices(
    model: TransformerBridge,
    matrices: Iterable[str] | None = None,
    layers: Iterable[int] | None = None,
    *,
    skip_unsupported: bool = False,
) -> WeightMatrices:
    """List the linear maps of ``model``.

    Args:
        model: any ``TransformerBridge`` whose blocks have dense attention and a dense MLP.
        matrices: kinds to list (default: all that the model has).
        layers: blocks to list (default: all).
        skip_unsupported: list what there is where blocks lack dense attention or a dense MLP:
            attention beside experts, experts that all tokens pass, the dense blocks of hybrids.

    Raises:
        ValueError: no bridge; an unknown matrix kind or layer, or a kind that the model does not
            have.
        UnsupportedModelError: a mixture-of-experts or state-space block, unless these are skipped;
            names layer and kind. A model without any dense map.
    """
    check_model(model)
    kinds = checked_kinds(matrices)
    if not hasattr(model, "blocks"):
        raise UnsupportedModelError(
            f"{type(model.original_model).__name__} has no stack of transformer blocks."
        )
    found: list[WeightMatrix] = []
    rest: list[LeftOut] = []
    for layer in _checked_layers(layers, len(model.blocks)):
        maps, refused = _block_maps(model, layer)
        found += [m for kind, m in maps.items() if kinds is None or kind in kinds]
        listed = {kind: m.module for kind, m in maps.items()}
        parts = list(left_out(model.blocks[layer], layer, listed, refused))
        if not skip_unsupported:
            check_whole(model.blocks[layer], layer, kinds or MATRIX_KINDS, refused, parts)
        rest += parts
    if not found and kinds is None:
        raise UnsupportedModelError(
            f"{type(model.original_model).__name__} has no dense attention or MLP that the "
            "bridge has hooks on. " + " ".join(left_out_lines(rest))
        )
    missing = [kind for kind in kinds or () if kind not in {m.kind for m in found}]
    if missing:
        raise ValueError(f"This model has no {', '.join(missing)}: its blocks hold no such map.")
    listing = WeightMatrices(found)
    listing.left_out = tuple(rest)
    return listing


def map_of(model: TransformerBridge, layer: int, kind: str) -> WeightMatrix:
    """One linear map of the model.

    Raises:
        ValueError: the model has no such kind or layer.
    """
    return weight_matrices(model, [kind], [layer], skip_unsupported=True)[0]


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


def _block_maps(
    model: TransformerBridge, layer: int
) -> tuple[dict[str, WeightMatrix], dict[str, str]]:
    """The maps of a block by kind, and why it has not the others."""
    block = model.blocks[layer]
    found = linear_maps(block)
    maps: dict[str, WeightMatrix] = {}
    refused: dict[str, str] = {}
    for kind in MATRIX_KINDS:
        if kind not in found:
            if kind != "W_gate":  # an MLP may do without
                refused[kind] = "there is no such map"
            continue
        path, linear = found[kind]
        flat_in, flat_out = linear.weight.shape
        if not isinstance(linear, Conv1D):
            flat_in, flat_out = flat_out, flat_in
        axis = _HEAD_AXIS.get(kind)
        heads = 1
        if axis is not None:
            width = head_width(block, kind) or model.cfg.d_head
            heads, rest = divmod(flat_in if axis == "in" else flat_out, width)
            if rest or (kind in ("W_Q", "W_O") and heads != model.cfg.n_heads):
                refused[kind] = (
                    f"{flat_in} x {flat_out} does not divide into {model.cfg.n_heads} heads of "
                    f"{width}"
                )
                continue
        maps[kind] = WeightMatrix(
            layer=layer,
            kind=kind,
            n_heads=heads,
            head_axis=axis,
            d_in=flat_in // heads if axis == "in" else flat_in,
            d_out=flat_out // heads if axis == "out" else flat_out,
            path=path,
            module=linear,
        )
    return maps, refused
