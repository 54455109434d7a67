"""Freezing: make the effect of chosen components independent of the input.

Component i of a map ``y = x W + b`` is frozen with strength z by
``y'_t = y_t + z (x̄_t − x_t) E_i``: its input-dependent part is taken away and its mean at
position t is added as a bias. z = 1 freezes, 0 < z < 1 attenuates. Positions are counted from the
end of the prompt; a position that calibration never saw gets the mean over positions.

A constant added to every key shifts all attention scores of a query alike and cancels in the
softmax unless keys are rotated: without rotary embeddings, freezing components of ``W_K`` equals
deleting them wherever the mean does not depend on the position.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.files import FileFormatError, load_tensors, save_tensors
from eigenlens.matrices import MATRIX_KINDS, WeightMatrix
from eigenlens.positions import PositionTracker, attach_tracker
from eigenlens.provenance import Provenance, model_fingerprint
from eigenlens.scoring.scores import COMPONENT, Scores
from eigenlens.spectra import Spectra, Spectrum, decompose


class WrongModelError(ValueError):
    """A FrozenSet was made for a model with other weights."""


@dataclass(frozen=True)
class FrozenSet:
    """Components to freeze, with the mean activations that take their place.

    Attributes:
        components: one row each: ``layer, matrix, head, index, strength``; strength in (0, 1].
        mean_activation: ``[component, position]``, in units of the map's output.
        fallback: ``[component]``, for positions that calibration never saw.
        positions: the positions of the columns, counted from the end of the prompt.
        count: calibration tokens per position.
        n_candidates: how many components were chosen from.
        provenance: model, task, seed and versions.
        bucketed: whether the first position stands for all earlier ones, too.
        spectra: the directions (not saved: they follow from the weights).
    """

    components: pd.DataFrame
    mean_activation: np.ndarray
    fallback: np.ndarray
    positions: range
    count: np.ndarray
    n_candidates: int
    provenance: Provenance
    bucketed: bool = False
    spectra: Spectra | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        strength = self.components["strength"]
        if len(strength) and not ((strength > 0) & (strength <= 1)).all():
            raise ValueError("Every strength must lie in (0, 1]; leave out what is not frozen.")
        if self.components.duplicated(COMPONENT).any():
            raise ValueError("A component is listed twice.")

    def __len__(self) -> int:
        return len(self.components)

    @classmethod
    def from_scores(
        cls, scores: Scores, rows: np.ndarray, strength: np.ndarray | float = 1.0
    ) -> "FrozenSet":
        """Freeze the components in these ``rows`` of ``scores.components``."""
        mean = scores.mean_activation[rows]
        weight = scores.count / max(1, scores.count.sum())
        return cls(
            components=scores.components[COMPONENT]
            .iloc[rows]
            .assign(strength=strength)
            .reset_index(drop=True),
            mean_activation=mean,
            fallback=mean @ weight.astype(mean.dtype),
            positions=scores.positions,
            count=scores.count,
            n_candidates=len(scores),
            provenance=scores.provenance,
            bucketed=scores.bucketed,
            spectra=scores.spectra,
        )

    @property
    def fraction(self) -> float:
        """Share of the components chosen from that is frozen."""
        return len(self) / self.n_candidates

    @property
    def edit(self) -> str:
        """What becomes of the components: ``frozen``, ``attenuated`` if any strength is below 1."""
        return "frozen" if (self.components["strength"] == 1).all() else "attenuated"

    def to_pandas(self) -> pd.DataFrame:
        """Columns ``layer, matrix, head, index, strength``."""
        return self.components.copy()

    def _repr_html_(self) -> str:
        by_matrix = self.components.pivot_table(
            index="layer", columns="matrix", values="index", aggfunc="count", fill_value=0
        )
        note = (
            f"{len(self):,} of {self.n_candidates:,} components {self.edit} ({self.fraction:.2%})"
        )
        return f"<p>{note}; how many per layer and matrix:</p>{by_matrix.to_html()}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file."""
        c = self.components
        tensors = {
            "layer": torch.tensor(c["layer"].to_numpy(np.int32)),
            "matrix": torch.tensor([MATRIX_KINDS.index(kind) for kind in c["matrix"]]).int(),
            "head": torch.tensor(c["head"].to_numpy(np.int32)),
            "index": torch.tensor(c["index"].to_numpy(np.int32)),
            "strength": torch.tensor(c["strength"].to_numpy(np.float64)),
            "mean_activation": torch.tensor(self.mean_activation),
            "fallback": torch.tensor(self.fallback),
            "count": torch.tensor(self.count),
        }
        metadata = {
            "positions": [self.positions.start, self.positions.stop],
            "n_candidates": self.n_candidates,
            "bucketed": self.bucketed,
            "provenance": self.provenance.model_dump(),
        }
        save_tensors(path, "frozen set", tensors, metadata)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: TransformerBridge | None = None
    ) -> "FrozenSet":
        """Read back what :meth:`save` wrote.

        Args:
            path: the file.
            model: refuse the file unless it belongs to these weights.

        Raises:
            FileNotFoundError: there is no such file.
            FileFormatError: the file is truncated or foreign.
            WrongModelError: it belongs to a model with other weights.
        """
        tensors, metadata = load_tensors(path, "frozen set")
        try:
            components = pd.DataFrame(
                {
                    "layer": tensors["layer"].long().numpy(),
                    "matrix": [MATRIX_KINDS[kind] for kind in tensors["matrix"].tolist()],
                    "head": tensors["head"].long().numpy(),
                    "index": tensors["index"].long().numpy(),
                    "strength": tensors["strength"].numpy(),
                }
            )
            frozen = cls(
                components=components,
                mean_activation=tensors["mean_activation"].numpy(),
                fallback=tensors["fallback"].numpy(),
                positions=range(*metadata["positions"]),
                count=tensors["count"].numpy(),
                n_candidates=metadata["n_candidates"],
                provenance=Provenance(**metadata["provenance"]),
                bucketed=metadata.get("bucketed", False),
            )
        except KeyError as error:
            raise FileFormatError(f"{path} lacks {error}.") from error
        if model is not None:
            frozen.check_model(model)
        return frozen

    def check_model(self, model: TransformerBridge) -> None:
        """Raise :class:`WrongModelError` unless this set belongs to the weights of ``model``."""
        made_for = self.provenance.model_fingerprint
        found = model_fingerprint(model)
        if made_for != found:
            raise WrongModelError(
                f"This FrozenSet was made for {self.provenance.model!r} with the fingerprint "
                f"{made_for[:8]}…, but the model at hand has {found[:8]}…: "
                "other weights or another dtype. Score and select on this model."
            )


class Freeze:
    """An edit of a model through hooks: on inside ``with``, or from ``apply()`` to ``undo()``.

    With ``bias_only`` the means are added but nothing is taken away: a control that tells how much
    of an effect is the bias.
    """

    def __init__(
        self, model: TransformerBridge, frozen: FrozenSet, *, bias_only: bool = False
    ) -> None:
        self._model = model
        self._edits = _edits(model, frozen)
        if bias_only:
            for edit in self._edits:
                edit.inputs = torch.zeros_like(edit.inputs)
        self._undo: list[Callable[[], None]] = []

    def apply(self) -> "Freeze":
        """Put the hooks on; they survive ``model.reset_hooks()``."""
        if self._undo:
            raise RuntimeError("This edit is applied already; call undo() first.")
        try:
            if self._edits:
                tracker, release = attach_tracker(self._model)
                self._undo.append(release)
            for edit in self._edits:
                self._undo += edit.attach(self._model, tracker)
        except BaseException:
            self.undo()
            raise
        return self

    def undo(self) -> None:
        """Take the hooks off; the model is as it was, bit for bit."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> "Freeze":
        return self.apply()

    def __exit__(self, *_: object) -> None:
        self.undo()


def freeze(model: TransformerBridge, frozen: FrozenSet, *, permanent: bool = False) -> Freeze:
    """Freeze components of a model.

    ``with freeze(model, frozen): …`` edits the model inside the block and restores it afterwards,
    also after an exception. With ``permanent=True`` the edit is on at once and stays until
    ``undo()`` of the returned object.

    Args:
        model: the model that ``frozen`` was made for.
        frozen: components, strengths and mean activations.
        permanent: apply now.

    Raises:
        WrongModelError: ``frozen`` belongs to other weights.
    """
    frozen.check_model(model)
    edit = Freeze(model, frozen)
    return edit.apply() if permanent else edit


@dataclass
class _MatrixEdit:
    """The correction of one matrix: ``y ← y − (x A) B + bias[position]``.

    ``inputs`` is A or, where cheaper, A B with ``outputs`` left out. The last row of ``bias`` is
    for positions outside ``positions`` or without calibration data; with ``bucketed``, the first is
    for all positions before it, too.
    """

    matrix: WeightMatrix
    inputs: Float[Tensor, "all_in k"]
    outputs: Float[Tensor, "k all_out"] | None
    bias: Float[Tensor, "rows all_out"]
    first: int
    rows: Int[Tensor, " rows"]
    bucketed: bool
    x: Tensor | None = None

    def attach(
        self, model: TransformerBridge, tracker: PositionTracker
    ) -> list[Callable[[], None]]:
        hooks: list[tuple[str, Callable[..., Any]]] = [
            (self.matrix.hook_in, self._keep),
            (self.matrix.hook_out, partial(self._correct, tracker)),
        ]
        return [_add_hook(model.hook_dict[name], hook) for name, hook in hooks]

    def _keep(self, value: Tensor, hook: Any) -> None:
        self.x = value

    def _correct(self, tracker: PositionTracker, value: Tensor, hook: Any) -> Tensor:
        assert self.x is not None
        x = self.x.flatten(2).to(self.inputs.dtype)
        self.x = None
        removed = x @ self.inputs
        if self.outputs is not None:
            removed = removed @ self.outputs
        added = self.bias[self._rows(tracker.positions)]
        return value + (added - removed).to(value.dtype).view_as(value)

    def _rows(self, positions: Int[Tensor, "*batch pos"]) -> Int[Tensor, "*batch pos"]:
        last = len(self.rows) - 1
        row = positions - self.first
        if self.bucketed:
            row = row.clamp_min(0)
        outside = (row < 0) | (row >= last)
        return self.rows[row.masked_fill(outside, last)]


def _add_hook(point: HookPoint, hook: Callable[..., Any]) -> Callable[[], None]:
    handle = point.add_hook(hook, is_permanent=True)

    def remove() -> None:
        handle.hook.remove()
        point.fwd_hooks.remove(handle)

    return remove


def _edits(model: TransformerBridge, frozen: FrozenSet) -> list[_MatrixEdit]:
    if not len(frozen):
        return []
    table = frozen.components
    spectra = frozen.spectra
    if spectra is None:
        spectra = decompose(
            model, sorted(set(table["matrix"])), sorted(set(table["layer"])), progress=False
        )
    names = "blocks." + table["layer"].astype(str) + "." + table["matrix"]
    return [
        _matrix_edit(spectra[name], frozen, np.flatnonzero(names == name))
        for name in dict.fromkeys(names)
    ]


def _matrix_edit(spectrum: Spectrum, frozen: FrozenSet, rows: np.ndarray) -> _MatrixEdit:
    weight = spectrum.matrix.flat_weight
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    as_tensor = partial(torch.tensor, dtype=dtype, device=weight.device)
    chosen = frozen.components.iloc[rows]
    head, index = chosen["head"].to_numpy(), chosen["index"].to_numpy()
    strength = as_tensor(chosen["strength"].to_list())
    reads, writes = flat_directions(spectrum, head, index)
    reads, writes = reads.to(dtype), writes.to(dtype)
    mean = np.concatenate([frozen.mean_activation[rows], frozen.fallback[rows, None]], axis=1)
    bias = (as_tensor(mean).T * strength) @ writes
    inputs, outputs = reads * strength, writes
    dense = sum(weight.shape) * len(rows) >= weight.numel()
    seen = torch.as_tensor(np.append(frozen.count > 0, True), device=weight.device)
    last = len(frozen.positions)
    table = torch.arange(last + 1, device=weight.device)
    return _MatrixEdit(
        matrix=spectrum.matrix,
        inputs=inputs @ outputs if dense else inputs,
        outputs=None if dense else outputs,
        bias=bias,
        first=frozen.positions.start,
        rows=torch.where(seen, table, last),
        bucketed=frozen.bucketed,
    )


def flat_directions(
    spectrum: Spectrum, head: np.ndarray, index: np.ndarray
) -> tuple[Float[Tensor, "all_in k"], Float[Tensor, "k all_out"]]:
    """``σ_i u_i`` as columns and ``v_i`` as rows in the space of all heads side by side."""
    matrix = spectrum.matrix
    heads = torch.tensor(head, device=spectrum.u.device)
    indices = torch.tensor(index, device=spectrum.u.device)
    reads = (spectrum.u[heads, :, indices] * spectrum.sigma[heads, indices, None]).T
    writes = spectrum.vh[heads, indices]
    if matrix.head_axis == "in":
        reads = _in_block_of(reads.T, heads, matrix.n_heads).T
    if matrix.head_axis == "out":
        writes = _in_block_of(writes, heads, matrix.n_heads)
    return reads, writes


def _in_block_of(
    vectors: Float[Tensor, "k width"], heads: Int[Tensor, " k"], n_heads: int
) -> Float[Tensor, "k all_width"]:
    wide = vectors.new_zeros(len(vectors), n_heads, vectors.shape[1])
    wide[torch.arange(len(vectors), device=vectors.device), heads] = vectors
    return wide.flatten(1)
