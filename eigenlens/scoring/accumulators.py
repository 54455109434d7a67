"""Running sums from which the scores of one matrix follow, whatever the number of examples.

With an activation ``h`` and its gradient ``g = ∂L/∂h`` at position t of example b, the first-order
effect of freezing component i is ``Σ_t (c̄_t − c_bt) s_bt`` with the coordinate ``c = h · r_i`` and
the slope ``s = w_i · g``. Summed over examples this is

    ``Σ_t c̄_t (w_i · Σ_b g_bt) − r_iᵀ (Σ_bt h_bt g_btᵀ) w_iᵀ``

where all components share the sums in brackets. So :class:`ActivationSums` keeps ``Σ h`` and
``Σ g`` per position, :class:`CrossSums` ``Σ h gᵀ``, projected once at the end, or, where there is
no room for it, its projections batch by batch. What depends on single examples (standard errors,
worst cases) needs the means first and is summed by :class:`EffectSums`.

Rows of per-position sums are those of :class:`eigenlens.position_means.Positions`.
Sums of two shards merge into those of both: that is the whole of data-parallel scoring.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

from eigenlens.spectra import Spectrum

Activation = Float[Tensor, "batch pos head width"]


@dataclass
class Sums:
    """Sums over examples, field by field; of ``worst`` the largest is kept."""

    def merge(self, other: "Sums") -> None:
        """Take in the sums over other examples, which must be of the same kind and shape.

        Raises:
            TypeError: they are of another kind, or kept in another form.
        """
        mine, others = self._kept(), other._kept()
        if type(self) is not type(other) or mine.keys() != others.keys():
            raise TypeError(
                f"{type(self).__name__} of {', '.join(mine)} cannot take in "
                f"{type(other).__name__} of {', '.join(others)}."
            )
        for name, sum_ in mine.items():
            more = others[name].to(sum_.device)
            if name == "worst":
                torch.maximum(sum_, more, out=sum_)
            else:
                sum_ += more

    def _kept(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


# What a pass over some examples found: sums by what they are of, and by matrix.
Collected = dict[str, dict[str, Sums]]


def merged(parts: Iterable[Collected]) -> Collected:
    """The sums over all examples from those over parts of them, of which there is at least one."""
    rest = iter(parts)
    whole = next(rest)
    for part in rest:
        for what, sums in whole.items():
            for name, one in sums.items():
                one.merge(part[what][name])
    return whole


@dataclass
class ComponentSums(Sums):
    """One number of each component: ``Σ_b e_b``."""

    total: Float[Tensor, "head k"]


@dataclass
class ActivationSums(Sums):
    """Sum of an activation, or of its gradient, per position: ``Σ_b h_bt``."""

    total: Float[Tensor, "row head width"]

    @classmethod
    def zeros(cls, spectrum: Spectrum, n_rows: int) -> "ActivationSums":
        """Empty sums for ``n_rows`` rows of positions."""
        shape = (n_rows, spectrum.site.n_heads, spectrum.site.width)
        return cls(torch.zeros(shape, dtype=spectrum.dtype, device=spectrum.device))

    def update(self, rows: Int[Tensor, " column"], h: Activation) -> None:
        """Add a batch whose columns belong to ``rows``; padding must be zero."""
        self.total.index_add_(0, rows.to(h.device), h.sum(0).to(self.total.dtype))


@dataclass
class CrossSums(Sums):
    """``Σ_bt h_bt g_btᵀ``, head by head, or its projections on the components.

    Attributes:
        products: the sum, where there is room for it.
        projected: ``Σ_bt c_bt s_bt``, where there is not.
    """

    products: Float[Tensor, "head width width"] | None
    projected: Float[Tensor, "head k"] | None

    @classmethod
    def zeros(cls, spectrum: Spectrum, *, whole: bool) -> "CrossSums":
        """Empty sums; ``whole`` keeps the products."""
        site = spectrum.site
        whole = whole and spectrum.read is not None
        shape = (site.n_heads, site.width, site.width) if whole else tuple(spectrum.sigma.shape)
        zero = torch.zeros(shape, dtype=spectrum.dtype, device=spectrum.device)
        return cls(zero, None) if whole else cls(None, zero)

    def update(self, spectrum: Spectrum, h: Activation, g: Activation) -> None:
        """Add a batch; padding must be zero."""
        h, g = h.to(spectrum.dtype), g.to(spectrum.dtype)
        if self.products is None:
            assert self.projected is not None
            self.projected += (spectrum.coordinates(h) * spectrum.slopes(g)).sum((0, 1))
        elif len(self.products) == 1:
            self.products[0].addmm_(
                rearrange(h, "b p 1 x -> x (b p)"), rearrange(g, "b p 1 y -> (b p) y")
            )
        else:
            self.products.baddbmm_(
                rearrange(h, "b p head x -> head x (b p)"),
                rearrange(g, "b p head y -> head (b p) y"),
            )

    def on(self, spectrum: Spectrum) -> Float[Tensor, "head k"]:
        """``Σ_bt c_bt s_bt`` of every component."""
        if self.products is None:
            assert self.projected is not None
            return self.projected
        assert spectrum.read is not None
        assert spectrum.write is not None
        return einsum(
            spectrum.read.mT @ self.products, spectrum.write, "head k x, head k x -> head k"
        )


@dataclass
class EffectSums(Sums):
    """Sums over examples of single effects ``e_b = Σ_t (c̄_t − c_bt) s_bt``, in nats.

    Attributes:
        total: ``Σ_b e_b``.
        square: ``Σ_b e_b²``.
        margin: ``Σ_b`` of the :func:`margin_effect` of each example.
        margin_square: ``Σ_b`` of its square.
        position_square: ``Σ_bt e_bt²`` of the effects at single positions.
        worst: largest ``(c̄_t − c_bt) s_bt`` over examples and the positions that vary.

    The last two are kept only where single positions are asked for.
    """

    total: Float[Tensor, "head k"]
    square: Float[Tensor, "head k"]
    margin: Float[Tensor, "head k"]
    margin_square: Float[Tensor, "head k"]
    position_square: Float[Tensor, "head k"] | None = None
    worst: Float[Tensor, "head k"] | None = None

    @classmethod
    def zeros(cls, spectrum: Spectrum, *, by_position: bool) -> "EffectSums":
        """Empty sums."""
        zero = torch.zeros(spectrum.sigma.shape, dtype=spectrum.dtype, device=spectrum.device)
        total, square, margin, margin_square = (zero.clone() for _ in range(4))
        sums = cls(total, square, margin, margin_square)
        if by_position:
            sums.position_square, sums.worst = zero, torch.full_like(zero, -torch.inf)
        return sums

    def update(
        self,
        effect: Float[Tensor, "batch pos head k"],
        varies: Bool[Tensor, "batch pos"],
        loss: Float[Tensor, " batch"],
    ) -> None:
        """Add a batch of effects; padding must be zero, and is not among what ``varies``."""
        example = reduce(effect, "batch pos head k -> batch head k", "sum")
        self.total += example.sum(0)
        self.square += example.square().sum(0)
        margin = margin_effect(example, loss.to(example.device))
        self.margin += margin.sum(0)
        self.margin_square += margin.square().sum(0)
        if self.worst is not None and self.position_square is not None:
            self.position_square += effect.square().sum((0, 1))
            outside = ~varies.to(effect.device)[..., None, None]
            here = effect.masked_fill(outside, -torch.inf)
            self.worst = torch.maximum(self.worst, here.amax((0, 1)))


def spread(total: Tensor, square: Tensor, n_examples: int) -> Tensor:
    """Standard deviation over examples (``n − 1`` below) from a sum and that of squares."""
    variance = (square - total.square() / n_examples).clamp_min(0) / max(1, n_examples - 1)
    return variance.sqrt()


def margin_effect(
    effect: Float[Tensor, "batch ..."], loss: Float[Tensor, " batch"]
) -> Float[Tensor, "batch ..."]:
    """Change of a negative log-likelihood if freezing moves the answer's log-odds linearly.

    An example of loss L has the log-odds ``m = log p − log(1 − p)``, ``p = e^−L``. Its first-order
    effect e moves them by ``−δ`` with ``δ = e / (1 − p)``, and the loss changes by exactly
    ``log(p + (1 − p) e^δ)``: bounded below by −L, straight where the answer is wrong, curved where
    it is in the balance. Where the loss is too small for log-odds to be told
    (:func:`eigenlens.metrics.answer_loss` gives it to its own rounding), it is the effect itself.
    """
    loss = loss.to(effect.dtype).reshape(-1, *[1] * (effect.ndim - 1))
    told = loss > 1e-30
    wrong = torch.where(told, -torch.expm1(-loss), 1)  # 1 − p
    delta = effect / wrong
    # The first form loses nothing of small changes, the second does not overflow.
    small = torch.log1p(wrong * torch.expm1(delta.clamp(-1, 1)))
    large = torch.logaddexp(-loss, wrong.log() + delta)
    return torch.where(told, torch.where(delta.abs() < 1, small, large), effect)
