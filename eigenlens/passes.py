"""Passes over a batch that hand out activations, and their gradients, at chosen sites.

Every layer may live on a device of its own: what is handed out is where its layer is.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from eigenlens.bridges import TransformerBridge
from eigenlens.matrices import Site
from eigenlens.metrics import Metric, answer_logits, not_a_number, precise
from eigenlens.tasks.batches import Batch

Activation = Float[Tensor, "batch pos head width"]
Handler = Callable[[Site, Activation], None]
GradHandler = Callable[[Site, Activation, Activation, Float[Tensor, " batch"]], None]


class FiniteCheck:
    """Remembers which examples were finite, and asks once: no device is waited for in between."""

    def __init__(self) -> None:
        self._seen: list[tuple[str, list[int], Bool[Tensor, " batch"]]] = []

    def add(self, what: str, values: Tensor, batch: Batch) -> None:
        """Note which rows of ``values`` hold a NaN or an infinite value."""
        finite = torch.isfinite(values.flatten(1).sum(1) if values.ndim > 1 else values)
        self._seen.append((what, batch.indices, finite))

    def check(self) -> None:
        """Raise ``ValueError`` for the first example that was not finite."""
        if not self._seen or bool(torch.cat([finite for *_, finite in self._seen]).all()):
            return
        for what, indices, finite in self._seen:
            for index, fine in zip(indices, finite.tolist(), strict=True):
                if not fine:
                    raise not_a_number(what, index)


def record(
    model: TransformerBridge,
    sites: Sequence[Site],
    batch: Batch,
    handle: Handler,
    finite: FiniteCheck,
) -> None:
    """Run ``batch`` forward and hand every site's activation to ``handle(site, h)``."""

    def see(site: Site, value: Tensor, hook: Any) -> None:
        handle(site, site.split(value, batch.tokens.shape[1]))

    hooks = [(site.hook, partial(see, site)) for site in sites]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        finite.add("logits", answer_logits(model, batch), batch)


def activations(
    model: TransformerBridge, sites: Sequence[Site], batch: Batch, finite: FiniteCheck
) -> dict[str, Activation]:
    """Every site's activation in a forward pass of ``batch``, by its name."""
    held: dict[str, Activation] = {}

    def keep(site: Site, h: Activation) -> None:
        held[site.name] = h

    record(model, sites, batch, keep, finite)
    return held


def attention_calls(
    model: TransformerBridge, layers: Iterable[int], run: Callable[[], object]
) -> dict[int, tuple[tuple[Any, ...], dict[str, Any]]]:
    """What the attention of each of these layers is called with inside ``run()``: args, kwargs."""
    seen: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def see(layer: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[layer] = args, kwargs

    with ExitStack() as stack, torch.no_grad():
        for layer in layers:
            hook = partial(see, layer)
            attention = model.blocks[layer].attn
            handle = attention.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        run()
    return seen


def forward_backward(
    model: TransformerBridge,
    sites: Sequence[Site],
    batch: Batch,
    metric: Metric,
    handle: GradHandler,
    finite: FiniteCheck,
    hooks: Sequence[tuple[str, Callable[..., Any]]] = (),
) -> Float[Tensor, " batch"]:
    """One forward and one backward pass of the summed metric.

    Every site's activation and gradient go to ``handle(site, h, ∂metric/∂h, metric)`` as the
    backward pass reaches it. No gradient of a weight is computed, and nothing below the first site
    is differentiated. Where the metric does not reach a site, nothing is handed out.

    Args:
        model: in eval mode.
        sites: activations to hand out.
        batch: what to run.
        metric: a number per example.
        handle: takes them.
        finite: remembers which examples were finite.
        hooks: edits of the pass by hook name, made before anything is handed out.

    Returns:
        The metric of each example.
    """
    n_pos = batch.tokens.shape[1]
    held: dict[str, Tensor] = {}
    leaves: list[Tensor] = []
    values: list[Tensor] = []

    def start(value: Tensor, hook: Any) -> Tensor:
        leaves.append(value.detach().requires_grad_())
        return leaves[-1]

    def keep(site: Site, value: Tensor, hook: Any) -> None:
        # No copy: W_in and W_gate hold one input between them.
        held[site.name] = value.detach()

    def consume(site: Site, grad: Tensor, hook: Any) -> None:
        h = site.split(held.pop(site.name), n_pos)
        handle(site, h, site.split(grad.detach(), n_pos), values[-1])

    first = min(site.layer for site in sites)
    fwd: list[tuple[str, Callable[..., Any]]] = [*hooks, (f"blocks.{first}.hook_in", start)]
    fwd += [(site.hook, partial(keep, site)) for site in sites]
    bwd = [(site.hook, partial(consume, site)) for site in sites]
    with torch.enable_grad(), model.hooks(fwd_hooks=fwd, bwd_hooks=bwd):
        metrics = metric(precise(answer_logits(model, batch)), batch)
        finite.add("metric", metrics.detach(), batch)
        values.append(metrics.detach())
        # grad() of the leaf, not backward(): weights that require gradients get none.
        torch.autograd.grad(metrics.sum(), leaves)
    return values[-1]


def without_padding(values: Tensor, batch: Batch) -> Tensor:
    """Zeros at padding; ``values`` is ``[batch, pos, …]``."""
    if not batch.is_padded:
        return values
    return torch.where(widened(batch.attention_mask, values), values, 0)


def widened(mask: Bool[Tensor, "batch pos"], like: Tensor) -> Tensor:
    """A mask that broadcasts over what ``like`` has behind its positions, where that is."""
    return mask.to(like.device).view(*mask.shape, *[1] * (like.ndim - 2))
