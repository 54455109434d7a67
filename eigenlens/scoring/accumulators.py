"""Running sums from which the scores of one matrix follow, whatever the number of examples.

With inputs ``x`` and output gradients ``g = ∂L/∂y`` at position t of example b, the first-order
effect of freezing component i is ``Σ_t (ā_t − a_bt) g_bt`` with ``a = σ_i (x · u_i)`` and
``g = v_i · ∂L/∂y``. Summed over examples this is

    ``Σ_t ā_t (v_i · Σ_b ∂L/∂y_bt) − σ_i u_iᵀ (Σ_bt x_bt (∂L/∂y_bt)ᵀ) v_i``

where all components of a matrix share the sums in brackets. So :class:`InputMeans` keeps ``Σ x``
per position, :class:`CrossMoments` ``Σ g`` per position and ``Σ x gᵀ``, and everything is projected
once at the end. What depends on single examples (standard errors, worst cases) needs the means
first and is summed by :class:`EffectMoments`.

Positions are rows of these sums; they are counted from the end of the prompt. Several columns of a
batch may share a row.
Sums of two shards add: that is the whole of data-parallel scoring.
"""

from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

from eigenlens.matrices import split_heads
from eigenlens.spectra import Spectrum

S = TypeVar("S", bound="_Sums")


@dataclass
class _Sums:
    """Adds field by field; of ``worst`` the larger is kept."""

    def __add__(self: S, other: S) -> S:
        merged = {}
        for f in fields(self):
            one, two = getattr(self, f.name), getattr(other, f.name)
            merged[f.name] = torch.maximum(one, two) if f.name == "worst" else one + two
        return type(self)(**merged)


@dataclass
class InputMeans(_Sums):
    """Sum of the inputs of one matrix per position: ``Σ_b x_bt``."""

    total: Float[Tensor, "pos all_in"]

    @classmethod
    def zeros(cls, spectrum: Spectrum, n_pos: int) -> "InputMeans":
        """Empty sums for ``n_pos`` positions."""
        return cls(spectrum.u.new_zeros(n_pos, spectrum.matrix.flat_weight.shape[0]))

    def update(self, rows: Int[Tensor, " column"], x: Float[Tensor, "batch column all_in"]) -> None:
        """Add a batch whose columns belong to ``rows``; padding must be zero."""
        self.total.index_add_(0, rows, x.sum(0))

    def means(self, count: Int[Tensor, " pos"]) -> Float[Tensor, "pos all_in"]:
        """Mean input per position; zero where a position was never seen."""
        return self.total / count[:, None].clamp_min(1).to(self.total)


@dataclass
class CrossMoments(_Sums):
    """Sums of output gradients and of their products with inputs for one matrix.

    Attributes:
        g: ``Σ_b g_bt``, nats per output unit.
        xg: ``Σ_bt x_bt g_btᵀ``.
    """

    g: Float[Tensor, "pos all_out"]
    xg: Float[Tensor, "all_in all_out"]

    @classmethod
    def zeros(cls, spectrum: Spectrum, n_pos: int) -> "CrossMoments":
        """Empty sums for ``n_pos`` positions."""
        shape = spectrum.matrix.flat_weight.shape
        return cls(spectrum.u.new_zeros(n_pos, shape[1]), spectrum.u.new_zeros(shape))

    def update(
        self,
        rows: Int[Tensor, " column"],
        x: Float[Tensor, "batch column all_in"],
        g: Float[Tensor, "batch column all_out"],
    ) -> None:
        """Add a batch whose columns belong to ``rows``; padding must be zero."""
        self.g.index_add_(0, rows, g.sum(0))
        self.xg.addmm_(rearrange(x, "b p d -> d (b p)"), rearrange(g, "b p d -> (b p) d"))

    def effects(
        self, spectrum: Spectrum, n_examples: int, means: Float[Tensor, "pos head rank"] | None
    ) -> Float[Tensor, "head rank"]:
        """Mean first-order effect of freezing each component, in nats.

        Args:
            spectrum: directions to project on.
            n_examples: number of examples summed.
            means: mean projected activations for the mean reference; ``None`` for references that
                were taken off ``x`` before (resample) or are zero.
        """
        matrix = spectrum.matrix
        products = split_heads(self.xg, matrix.n_heads, matrix.head_axis)
        projected = (spectrum.u.transpose(-1, -2) @ products * spectrum.vh).sum(-1)
        total = -spectrum.sigma * projected
        if means is not None:
            total = total + (means * spectrum.writes(self.g)).sum(0)
        return total / n_examples


@dataclass
class EffectMoments(_Sums):
    """Sums over examples of single effects ``e_b = Σ_t (ā_t − a_bt) g_bt``.

    Attributes:
        total: ``Σ_b e_b``, nats.
        square: ``Σ_b e_b²``.
        position_square: ``Σ_bt e_bt²`` of the effects at single positions.
        margin: ``Σ_b`` of the :func:`margin_effect` of each example, nats.
        worst: largest ``(ā_t − a_bt) g_bt`` over examples and the positions that vary.
    """

    total: Float[Tensor, "head rank"]
    square: Float[Tensor, "head rank"]
    position_square: Float[Tensor, "head rank"]
    margin: Float[Tensor, "head rank"]
    worst: Float[Tensor, "head rank"]

    @classmethod
    def zeros(cls, spectrum: Spectrum) -> "EffectMoments":
        """Empty sums."""
        zero = torch.zeros_like(spectrum.sigma)
        margin = zero.to(torch.float64, copy=True)
        return cls(zero, zero.clone(), zero.clone(), margin, torch.full_like(zero, -torch.inf))

    def update(
        self,
        effect: Float[Tensor, "batch pos head rank"],
        varies: Bool[Tensor, "batch pos"],
        loss: Float[Tensor, " batch"],
    ) -> None:
        """Add a batch of effects; padding must be zero, and is not among what ``varies``."""
        example = reduce(effect, "batch pos head rank -> batch head rank", "sum")
        self.total += example.sum(0)
        self.square += example.square().sum(0)
        self.position_square += effect.square().sum((0, 1))
        self.margin += margin_effect(example, loss).sum(0)
        candidates = effect[varies]
        if len(candidates):
            self.worst = torch.maximum(self.worst, candidates.amax(0))

    def std(self, n_examples: int) -> Float[Tensor, "head rank"]:
        """Standard deviation of the effect over examples (``n − 1`` in the denominator)."""
        spread = self.square - self.total.square() / n_examples
        return (spread.clamp_min(0) / max(1, n_examples - 1)).sqrt()


def margin_effect(
    effect: Float[Tensor, "batch head rank"], loss: Float[Tensor, " batch"]
) -> Float[Tensor, "batch head rank"]:
    """Change of a negative log-likelihood if freezing moves the answer's log-odds linearly.

    An example of loss L has the log-odds ``m = log p − log(1 − p)``, ``p = e^−L``. Its first-order
    effect e moves them by ``−e / (1 − p)``, and the loss is exactly ``log(1 + e^−m)``: bounded
    below by zero, straight where the answer is wrong, curved where it is in the balance.
    """
    loss = loss.double().clamp_min(1e-12)[:, None, None]
    wrong = -torch.expm1(-loss)  # 1 − p
    odds = -loss - wrong.log() - effect.double() / wrong
    return torch.nn.functional.softplus(-odds) - loss
