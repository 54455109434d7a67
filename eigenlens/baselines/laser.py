"""Rank reduction of whole matrices: LASER, and the choice of matrices by ∂L/∂σ.

LASER (Sharma et al., 2023, arXiv 2312.13558) puts the truncated SVD of one whole weight matrix in
its place and tries every layer, matrix and rank on the data. Heads are not separated, and nothing
is added for what is taken away.

The gradient of the loss by a singular value, ``∂L/∂σ_i = u_iᵀ (∂L/∂W) v_i``, tells from one
backward pass where that may help (arXiv 2510.20800): cutting all σ_i beyond rank k changes the loss
by ``−Σ_{i>k} σ_i ∂L/∂σ_i`` to first order. Only the matrices where some rank of the grid promises
the largest fall are then tried. Of that paper's further steps, clustering rows before the
factorisation is not done here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import scipy.linalg
import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.baselines.baseline import Baseline, Search
from eigenlens.baselines.edits import WeightEdit
from eigenlens.decomposition import working_dtype
from eigenlens.matrices import WeightMatrix, weight_matrices
from eigenlens.metrics import answer_logits, answer_loss, precise
from eigenlens.tasks.batches import make_batches
from eigenlens.weights import requiring_grad

KEEP = (0.9, 0.5, 0.2, 0.1, 0.05, 0.01)


@dataclass(frozen=True)
class Factors:
    """The SVD of one whole matrix: ``u`` is ``[all_in, rank]``, ``vh`` is ``[rank, all_out]``."""

    u: Float[Tensor, "all_in rank"]
    sigma: Float[Tensor, " rank"]
    vh: Float[Tensor, "rank all_out"]

    @classmethod
    def of(cls, matrix: WeightMatrix) -> "Factors":
        """Decompose all heads of ``matrix`` together, in at least float32.

        Where LAPACK's divide-and-conquer driver does not converge, its QR driver is asked.
        """
        weight = matrix.flat_weight.detach().to(working_dtype(matrix))
        try:
            return cls(*torch.linalg.svd(weight, full_matrices=False))
        except torch.linalg.LinAlgError:
            array = weight.cpu().double().numpy()
            parts = scipy.linalg.svd(array, full_matrices=False, lapack_driver="gesvd")
            return cls(*(torch.from_numpy(part).to(weight) for part in parts))

    def truncated(self, rank: int) -> Float[Tensor, "all_in all_out"]:
        """The nearest matrix of this rank."""
        return (self.u[:, :rank] * self.sigma[:rank]) @ self.vh[:rank]


@dataclass(frozen=True)
class TruncationEdit(WeightEdit):
    """Puts truncated SVDs in place of whole matrices.

    ``settings["ranks"]`` holds the rank of each matrix by name, ``settings["removed"]`` the number
    of singular values cut.
    """

    factors: Mapping[str, Factors] = field(default_factory=dict, repr=False, compare=False)

    @property
    def parameters_changed(self) -> int:
        """Singular values set to zero."""
        return self.settings["removed"]

    def changes(self, model: TransformerBridge) -> Iterator[tuple[Tensor, Tensor]]:
        """Each matrix with its truncation."""
        for matrix in weight_matrices(model):
            if matrix.name in self.settings["ranks"]:
                factors = self.factors.get(matrix.name) or Factors.of(matrix)
                rank = self.settings["ranks"][matrix.name]
                yield matrix.flat_weight, factors.truncated(rank)


def kept_rank(factors: Factors, keep: float) -> int:
    """This share of the singular values, and at least one."""
    return max(1, round(keep * len(factors.sigma)))


def truncation(matrix: WeightMatrix, factors: Factors, keep: float) -> TruncationEdit:
    """Keep this share of the singular values of ``matrix``."""
    rank = kept_rank(factors, keep)
    settings = {"ranks": {matrix.name: rank}, "removed": len(factors.sigma) - rank}
    return TruncationEdit(settings=settings, factors={matrix.name: factors})


def _check_keep(keep: tuple[float, ...]) -> None:
    outside = [share for share in keep if not 0 < share < 1]
    if outside or not keep:
        raise ValueError(f"keep={keep}: shares of singular values must lie between 0 and 1.")


@dataclass(frozen=True)
class Laser(Baseline):
    """Every layer, matrix and rank on validation; the best single reduction wins.

    Attributes:
        keep: shares of singular values to keep.
        matrices, layers: kinds and blocks to try; default all.
    """

    keep: tuple[float, ...] = KEEP
    matrices: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    name: str = "LASER"

    def __post_init__(self) -> None:
        _check_keep(self.keep)

    def parts(self, model: TransformerBridge) -> Sequence[Baseline]:
        """One for each block."""
        layers = sorted({m.layer for m in weight_matrices(model, self.matrices, self.layers)})
        return [replace(self, layers=(layer,)) for layer in layers]

    def find(self, search: Search) -> None:
        """One candidate per matrix and rank."""
        for matrix in weight_matrices(search.model, self.matrices, self.layers):
            consider(search, matrix, Factors.of(matrix), self.keep)


@dataclass(frozen=True)
class GradientLaser(Baseline):
    """Rank reduction of the matrices that ∂L/∂σ points at.

    Attributes:
        keep: shares of singular values to keep.
        n_matrices: matrices to try.
        n_examples: training examples that the gradient is taken on, at most.
        matrices, layers: kinds and blocks to choose from; default all.
    """

    keep: tuple[float, ...] = KEEP
    n_matrices: int = 5
    n_examples: int = 100
    matrices: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    name: str = "LASER, matrices by ∂L/∂σ"

    def __post_init__(self) -> None:
        _check_keep(self.keep)

    def find(self, search: Search) -> None:
        """One candidate per rank of each matrix that the gradient points at."""
        train = search.task.train
        data = train.select(range(min(self.n_examples, len(train))))
        matrices = list(weight_matrices(search.model, self.matrices, self.layers))
        gradients = weight_gradients(search.model, matrices, data, search.batch_size)
        promised: list[tuple[float, int, Factors]] = []
        for matrix, gradient in zip(matrices, gradients, strict=True):
            factors = Factors.of(matrix)
            change = predicted_changes(factors, gradient)
            best = min(float(change[kept_rank(factors, share)]) for share in self.keep)
            promised.append((best, len(promised), factors))
        for _, row, factors in sorted(promised, key=lambda p: p[:2])[: self.n_matrices]:
            consider(search, matrices[row], factors, self.keep)


def consider(
    search: Search, matrix: WeightMatrix, factors: Factors, keep: tuple[float, ...]
) -> None:
    """Measure the truncations of one matrix."""
    for share in keep:
        edit = truncation(matrix, factors, share)
        search.consider(
            edit,
            layer=matrix.layer,
            matrix=matrix.kind,
            keep=share,
            rank=edit.settings["ranks"][matrix.name],
        )


def weight_gradients(
    model: TransformerBridge, matrices: list[WeightMatrix], data: Dataset, batch_size: int = 50
) -> list[Float[Tensor, "all_in all_out"]]:
    """Gradient of the mean loss over ``data`` by each whole matrix, in at least float32."""
    weights = [matrix.module.get_parameter("weight") for matrix in matrices]
    dtypes = [working_dtype(matrix) for matrix in matrices]
    total = [torch.zeros_like(w, dtype=d) for w, d in zip(weights, dtypes, strict=True)]
    with requiring_grad(weights):
        for batch in make_batches(data, model, batch_size):
            with torch.enable_grad():
                loss = answer_loss(precise(answer_logits(model, batch)), batch).sum() / len(data)
            for sum_, part in zip(total, torch.autograd.grad(loss, weights), strict=True):
                sum_ += part
    return [m.flat(gradient) for m, gradient in zip(matrices, total, strict=True)]


def predicted_changes(
    factors: Factors, gradient: Float[Tensor, "all_in all_out"]
) -> Float[Tensor, " ranks"]:
    """First-order change of the loss, in nats, by cutting to rank 0, 1, …, full rank."""
    by_sigma = (factors.u.T @ gradient.to(factors.u) * factors.vh).sum(1)
    effects = torch.cat([-factors.sigma * by_sigma, by_sigma.new_zeros(1)])
    return effects.flip(0).cumsum(0).flip(0)
