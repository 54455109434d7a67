"""Where a block of the bridge holds its linear maps, and what it holds beside them.

A feed-forward of one matrix after the other is found under the names that TransformerLens gives it:
alone, as a dense layer between layers of experts, or as the experts that all tokens pass. Experts
that are chosen token by token are the slices of one 3-D parameter, multiplied within one function
of transformers: no hook sees the input or the output gradient of a single expert, so that there is
nothing to score it by.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import nn
from transformers.pytorch_utils import Conv1D

Linear: TypeAlias = nn.Linear | Conv1D

ATTENTION = {"W_Q": "attn.q", "W_K": "attn.k", "W_V": "attn.v", "W_O": "attn.o"}
_FEED_FORWARD = {"W_in": "in", "W_gate": "gate", "W_out": "out"}
_FEED_FORWARDS = ("mlp.", "mlp.dense_", "mlp.shared_expert.", "mlp.shared_experts.", "shared_mlp.")
_JOINT = (("W_Q", "W_K", "W_V"), ("W_gate", "W_in"))  # often stored as one matrix
_PLAIN = ("Linear", "Conv1D", "Conv1d")  # classes that say nothing
_EXPERTS = "the bridge hands out no inputs and output gradients of single experts"
_INSIDE = "_original_component."  # what wrapping adds to the names of transformers


class UnsupportedModelError(ValueError):
    """The model, or a block of it, has no dense attention and MLP matrices."""


@dataclass(frozen=True)
class LeftOut:
    """Weights of a block that are no map of the list.

    Attributes:
        layer: index of the block.
        module: its name within the block of transformers, such as ``mlp.experts``.
        kind: class of the module.
        reason: why it is left out.
    """

    layer: int
    module: str
    kind: str
    reason: str

    @property
    def name(self) -> str:
        """``blocks.{layer}.{module}``."""
        return f"blocks.{self.layer}.{self.module}"


def linear_maps(block: nn.Module) -> dict[str, tuple[str, Linear]]:
    """Path within the bridge's block, and module, of each kind of map that the block has."""
    paths = dict(ATTENTION)
    for part in _FEED_FORWARDS:
        if _linear(block, f"{part}in") and _linear(block, f"{part}out"):
            paths |= {kind: part + name for kind, name in _FEED_FORWARD.items()}
            break
    found = {kind: (path, _linear(block, path)) for kind, path in paths.items()}
    return {kind: (path, linear) for kind, (path, linear) in found.items() if linear is not None}


def _linear(block: nn.Module, path: str) -> Linear | None:
    bridge: nn.Module | None = block
    for name in path.split("."):
        bridge = getattr(bridge, name, None)
    linear = getattr(bridge, "original_component", None)
    return linear if isinstance(linear, nn.Linear | Conv1D) else None


def left_out(
    block: nn.Module, layer: int, listed: Mapping[str, Linear], refused: Mapping[str, str]
) -> Iterator[LeftOut]:
    """The modules of a block whose matrices are not listed, in its order.

    Args:
        block: of the bridge.
        layer: its index.
        listed: module of each kind that is.
        refused: why, of the kinds that the block has and that cannot be listed.
    """
    own = getattr(block, "original_component", None) or block
    known = {id(linear.weight) for linear in listed.values()}
    why = {
        id(linear.weight): refused[kind]
        for kind, (_, linear) in linear_maps(block).items()
        if kind in refused
    }
    joint = {sum(listed[kind].weight.numel() for kind in kinds) for kinds in _joined(listed)}
    seen: set[str] = set()
    for full, parameter in own.named_parameters():
        wrapped, _, leaf = full.rpartition(".")
        name = f"{wrapped}.".replace(_INSIDE, "").rstrip(".") or leaf
        if parameter.ndim < 2 or id(parameter) in known or name in seen:
            continue
        if parameter.ndim == 2 and parameter.numel() in joint:
            continue  # the listed maps are views or copies of its parts
        seen.add(name)
        module = own.get_submodule(wrapped)
        module = getattr(module, "original_component", None) or module
        reason = why.get(id(parameter)) or _reason(parameter, full)
        yield LeftOut(layer, name, type(module).__name__, reason)


def _joined(listed: Iterable[str]) -> list[tuple[str, ...]]:
    return [kinds for kinds in _JOINT if set(kinds) <= set(listed)]


def _reason(parameter: nn.Parameter, name: str) -> str:
    if parameter.ndim == 3 and "expert" in name:
        return _EXPERTS
    if not name.rpartition(".")[0].endswith(_INSIDE.rstrip(".")):
        return "the bridge has no hooks on it"
    return "none of W_Q … W_out"


def head_width(block: nn.Module, kind: str) -> int | None:
    """Width of a head as the block's own attention states it, if it does.

    Some models have layers of several widths, or values that are narrower than queries.
    """
    attention = getattr(getattr(block, "attn", None), "original_component", None)
    own = getattr(attention, "head_dim", None)
    if kind in ("W_V", "W_O"):
        own = getattr(attention, "v_head_dim", own)
    return own if isinstance(own, int) and own > 0 else None


def check_whole(
    block: nn.Module,
    layer: int,
    kinds: Iterable[str],
    refused: Mapping[str, str],
    rest: Iterable[LeftOut],
) -> None:
    """Raise ``UnsupportedModelError`` for the first of these kinds that is refused.

    A block without any feed-forward lacks none; one that has experts besides is no dense MLP.
    """
    experts = next((part for part in rest if part.reason == _EXPERTS), None)
    if set(kinds).isdisjoint(_FEED_FORWARD):
        experts = None
    if experts:
        refused = {**refused, "W_in": f"it has {experts.module} ({experts.kind})"}
    for kind in refused:
        part = "attn" if kind in ATTENTION else "mlp"
        alone = part == "mlp" and not hasattr(block, "mlp") and not experts
        if alone or (kind not in kinds and not (experts and kind == "W_in")):
            continue
        children = (getattr(block, name, None) for name in (part, "mixer"))
        inner = next((child for child in children if child is not None), block)
        inner = getattr(inner, "original_component", None) or inner
        raise UnsupportedModelError(
            f"Layer {layer} has no dense {kind}: its {part} is a {type(inner).__name__} "
            f"({refused[kind]}). eigenlens decomposes dense attention and MLP matrices only; "
            "weight_matrices, decompose and EigenpruneConfig leave out what is not dense with "
            "skip_unsupported=True (--skip-unsupported)."
        )


def left_out_lines(left: Iterable[LeftOut]) -> tuple[str, ...]:
    """One sentence per reason and group of layers, which names the modules."""
    layers: dict[tuple[str, str], list[int]] = {}
    for part in left:
        what = part.module if part.kind in _PLAIN else f"{part.module} ({part.kind})"
        layers.setdefault((what, part.reason), []).append(part.layer)
    names: dict[tuple[str, str], list[str]] = {}
    for (what, reason), there in layers.items():
        names.setdefault((", ".join(map(str, there)), reason), []).append(what)
    return tuple(
        f"Left out of layer{'s' if ',' in there else ''} {there}: {', '.join(what)}: {reason}."
        for (there, reason), what in names.items()
    )
