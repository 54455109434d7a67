"""A model whose every component has a gate, and the gradient of the loss by all gates at once.

Inside ``with Gates(model, base)`` each decomposed map runs in its own singular basis,
``y_t = Σ_i lerp(a_t,i, ā_t,i, z_i) v_i + b`` with ``a = σ_i (x · u_i)``: z = 0 is the model as it
is, z = 1 freezes component i and what lies between attenuates it. The gradient by gate i,
``Σ_t (ā_t − a_t) (v_i · ∂L/∂y_t)``, is the first-order score of component i under all other gates,
and it falls out of the backward pass: both of its factors are computed there anyway. So one step
costs 2 (d_in + d_out) r products per token and map, where a training step costs 3 d_in d_out.

Memory: the directions scaled by σ once more, and one activation per component and token of a batch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.metrics import Metric, answer_logits, answer_loss, precise
from eigenlens.positions import PositionTracker, attach_tracker
from eigenlens.scoring.scores import Scores
from eigenlens.spectra import Spectrum
from eigenlens.tasks.batches import Batch


class Gates:
    """Runs a model with a gate on every component; a context manager.

    Attributes:
        model: the gated model.
        z: the gates of :meth:`gradient`, in the order of ``base.components``; all zero at first.
    """

    def __init__(self, model: TransformerBridge, base: Scores) -> None:
        """Gate the components of ``base``.

        Args:
            model: the model that ``base`` was scored on.
            base: gives the components, their directions and the means that replace them.

        Raises:
            ValueError: ``base`` was loaded from a file and has no directions.
        """
        spectra = list(base.require_spectra().values())
        self.model = model
        self._sizes = [s.sigma.numel() for s in spectra]
        means = torch.tensor(base.mean_activation).split(self._sizes)
        weight = base.count / max(1, base.count.sum())
        self._maps = [
            _GatedMap(s, mean, torch.tensor(weight), base.positions.start, base.bucketed)
            for s, mean in zip(spectra, means, strict=True)
        ]
        self.z: Float[Tensor, " component"] = torch.zeros(
            len(base), dtype=spectra[0].sigma.dtype, device=spectra[0].sigma.device
        )
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> "Gates":
        try:
            tracker, release = attach_tracker(self.model)
            self._undo.append(release)
            for gated in self._maps:
                self._undo.append(gated.attach(tracker))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()
        for gated in self._maps:
            gated.gate = None

    def set(self, z: Float[Tensor, " component"]) -> None:
        """Use the gates ``z`` in the forward passes to come."""
        for gated, part in zip(self._maps, z.split(self._sizes), strict=True):
            gated.gate = part

    def gradient(
        self, batch: Batch, metric: Metric = answer_loss
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, " component"]]:
        """The metric of each example under :attr:`z`, and the gradient of its sum by every gate."""
        with torch.enable_grad():
            z = self.z.detach().requires_grad_()
            self.set(z)
            values = metric(precise(answer_logits(self.model, batch)), batch)
            (slope,) = torch.autograd.grad(values.sum(), z)
        return values.detach(), slope


class _GatedMap:
    """One map in its singular basis. Stands in for the forward pass of its module."""

    def __init__(
        self,
        spectrum: Spectrum,
        mean: Float[Tensor, "component pos"],
        weight: Float[Tensor, " pos"],
        first: int,
        bucketed: bool,
    ) -> None:
        self._matrix = matrix = spectrum.matrix
        self._vh = spectrum.vh
        scaled = spectrum.u * spectrum.sigma[:, None, :]
        self._scaled = scaled
        if matrix.head_axis != "in":  # one product for all heads, since they share their input
            self._scaled = rearrange(scaled, "head d_in rank -> d_in (head rank)").contiguous()
        mean = mean.to(scaled)
        weight = weight.to(scaled)
        fallback = mean @ weight
        mean = torch.where(weight > 0, mean, fallback[:, None])
        table = torch.cat([mean, fallback[:, None]], dim=1)  # the last row: positions never seen
        self._means = rearrange(table, "(head rank) row -> row head rank", head=matrix.n_heads)
        self._first = first
        self._bucketed = bucketed
        self.gate: Tensor | None = None

    def attach(self, tracker: PositionTracker) -> Callable[[], None]:
        module = self._matrix.module
        before = vars(module).get("forward")  # some bridges have set one of their own
        module.forward = partial(self._forward, tracker)

        def detach() -> None:
            del module.forward
            if before is not None:
                module.forward = before

        return detach

    def _forward(
        self, tracker: PositionTracker, flat: Float[Tensor, "*batch_pos all_in"]
    ) -> Float[Tensor, "*batch_pos all_out"]:
        assert self.gate is not None
        # OPT hands its MLP all tokens of a batch in one row.
        x = flat.view(-1, tracker.positions.shape[-1], flat.shape[-1])
        gate = self.gate.view(self._matrix.n_heads, -1)
        a = self._read(x.to(self._scaled.dtype))
        mean = self._means[self._rows(tracker.positions)]
        y = self._write(torch.lerp(a, mean.expand_as(a), gate.expand_as(a)))
        bias = self._matrix.bias
        y = (y if bias is None else y + bias).to(flat.dtype)
        return y.view(*flat.shape[:-1], -1)

    def _read(self, x: Float[Tensor, "batch pos all_in"]) -> Float[Tensor, "batch pos head rank"]:
        heads = self._matrix.n_heads
        if self._matrix.head_axis == "in":
            x = rearrange(x, "batch pos (head d_in) -> batch pos head d_in", head=heads)
            return einsum(
                x, self._scaled, "batch pos head d_in, head d_in rank -> batch pos head rank"
            )
        return rearrange(
            x @ self._scaled, "batch pos (head rank) -> batch pos head rank", head=heads
        )

    def _write(self, a: Float[Tensor, "batch pos head rank"]) -> Float[Tensor, "batch pos all_out"]:
        if self._matrix.head_axis == "out":
            y = einsum(a, self._vh, "batch pos head rank, head rank d_out -> batch pos head d_out")
            return rearrange(y, "batch pos head d_out -> batch pos (head d_out)")
        return a.flatten(2) @ rearrange(self._vh, "head rank d_out -> (head rank) d_out")

    def _rows(self, positions: Int[Tensor, "*batch pos"]) -> Int[Tensor, "*batch pos"]:
        last = len(self._means) - 1
        row = positions - self._first
        if self._bucketed:  # the first row is for all positions before it, too
            row = row.clamp_min(0)
        return row.masked_fill((row < 0) | (row >= last), last)


@contextmanager
def faster_products() -> Iterator[None]:
    """Let float32 matrix products run in bfloat16 inside, where the processor has units for it.

    For searching only: on a CPU with AMX a step takes half the time, and its noise (0.2 % of a
    product) is far below that of a minibatch. What is reported is measured outside.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
