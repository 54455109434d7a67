"""A forward pass whose graph is cut at the output of every map.

Each map's output becomes a leaf of the graph. So the input of a map depends on earlier maps by
direct paths only — the residual stream and the norm, the attention pattern, the activation
function — and never through another map's weights. Autograd through this graph is what one map
sees of another, on every architecture that the bridge opens.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.circuits.nodes import EMBED
from eigenlens.matrices import WeightMatrix
from eigenlens.metrics import Metric, answer_logits, precise
from eigenlens.tasks.batches import Batch

Norm = Literal["frozen", "full"]
EMBED_HOOK = "blocks.0.hook_in"
Hooks = list[tuple[str, Callable[..., Any]]]


@dataclass(frozen=True)
class CutGraph:
    """One batch through the model, cut at every map.

    Attributes:
        leaves: output of every map, and the ``embed`` that enters the first block.
        inputs: input of every map, as a function of earlier leaves.
        logits: at the answer positions, as a function of the leaves.
    """

    leaves: dict[str, Tensor]
    inputs: dict[str, Tensor]
    logits: Tensor

    def pull(
        self, output: Tensor, cotangent: Tensor | None, wanted: Iterable[str]
    ) -> dict[str, Float[Tensor, "batch pos width"]]:
        """Gradient of ``cotangent · output`` by the leaves that it reaches directly."""
        names = list(wanted)
        found = torch.autograd.grad(
            output,
            [self.leaves[name] for name in names],
            cotangent,
            retain_graph=True,
            allow_unused=True,
        )
        return {n: g.flatten(2) for n, g in zip(names, found, strict=True) if g is not None}


def cut_graph(
    model: TransformerBridge, matrices: Iterable[WeightMatrix], batch: Batch, norm: Norm
) -> CutGraph:
    """Run ``batch`` and keep the cut graph.

    Args:
        model: in eval mode.
        matrices: all maps of the model: where one is left out, paths go through it.
        batch: examples.
        norm: ``"frozen"`` takes the scale of every norm as the number it is in this run;
            ``"full"`` differentiates it, too.
    """
    leaves: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}

    def cut(name: str, value: Tensor, hook: Any) -> Tensor:
        leaves[name] = value.detach().requires_grad_()
        return leaves[name]

    def keep(name: str, value: Tensor, hook: Any) -> None:
        inputs[name] = value

    hooks: Hooks = [(EMBED_HOOK, partial(cut, EMBED))]
    for matrix in matrices:
        hooks.append((matrix.hook_in, partial(keep, matrix.name)))
        hooks.append((matrix.hook_out, partial(cut, matrix.name)))
    if norm == "frozen":
        hooks += [(name, lambda value, hook: value.detach()) for name in scale_hooks(model)]
    with torch.enable_grad(), editing_norms(), model.hooks(fwd_hooks=hooks):
        logits = answer_logits(model, batch)
    return CutGraph(leaves, inputs, logits)


def scale_hooks(model: TransformerBridge) -> list[str]:
    """Hooks of the scale of every norm."""
    return [name for name in model.hook_dict if name.endswith(".hook_scale")]


@contextmanager
def editing_norms() -> Iterator[None]:
    """Without the bridge's warning that an edited scale costs a rounding error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="A forward hook edited hook_scale")
        yield


@dataclass(frozen=True)
class RunGradients:
    """Inputs, outputs and output gradients of every map in the real, uncut run.

    Attributes:
        inputs: ``x`` of each map, heads side by side.
        outputs: ``y`` of each map, heads side by side.
        gradients: ``∂metric/∂y`` of each map, and of the ``embed`` that enters the first block.
    """

    inputs: dict[str, Float[Tensor, "batch pos _"]]
    outputs: dict[str, Float[Tensor, "batch pos _"]]
    gradients: dict[str, Float[Tensor, "batch pos _"]]


def run_gradients(
    model: TransformerBridge, matrices: Iterable[WeightMatrix], batch: Batch, metric: Metric
) -> RunGradients:
    """One forward and one backward pass of the summed metric, all inputs and gradients kept."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def start(value: Tensor, hook: Any) -> Tensor:
        outputs[EMBED] = value.detach().requires_grad_()
        return outputs[EMBED]

    def keep(name: str, value: Tensor, hook: Any) -> None:
        inputs[name] = value

    def pass_on(name: str, value: Tensor, hook: Any) -> Tensor:
        # Handed back so that the model goes on with this very tensor: a hook may see a
        # rearranged copy, which is not in the graph otherwise.
        outputs[name] = value
        return value

    hooks: Hooks = [(EMBED_HOOK, start)]
    for matrix in matrices:
        hooks.append((matrix.hook_in, partial(keep, matrix.name)))
        hooks.append((matrix.hook_out, partial(pass_on, matrix.name)))
    with torch.enable_grad(), model.hooks(fwd_hooks=hooks):
        total = metric(precise(answer_logits(model, batch)), batch).sum()
        found = torch.autograd.grad(total, list(outputs.values()))
    gradients = dict(zip(outputs, found, strict=True))
    return RunGradients(
        *(
            {name: value.detach().flatten(2) for name, value in part.items()}
            for part in (inputs, outputs, gradients)
        )
    )
