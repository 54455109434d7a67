"""The means that take an activation's place, position by position: rows, counts, fallback.

Positions are counted from the end of the prompt: …, −2, −1 for prompt tokens, 0, 1, … for answer
tokens. :class:`Positions` says which of them have a row of their own in sums over the data, and
:class:`PositionMeans` what the means there are. A position without data has the mean over all
positions. With *shared* means no position has one of its own: one mean serves all.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from eigenlens.tasks.batches import Batch

_Numbers = Float[np.ndarray, "component position"]


@dataclass(frozen=True)
class Positions:
    """Rows of per-position sums: one for each position from ``start`` to ``stop``, one for others.

    Attributes:
        start, stop: the positions with a row of their own; none where they are equal.
        bucketed: whether the first of them stands for all earlier ones, too.
    """

    start: int = 0
    stop: int = 0
    bucketed: bool = False

    @classmethod
    def of(cls, batches: Sequence[Batch], n_positions: int | None = None) -> "Positions":
        """All positions that occur; with ``n_positions`` at most one more of the prompt than these.

        Raises:
            ValueError: a negative ``n_positions``.
        """
        if n_positions is not None and n_positions < 0:
            raise ValueError(f"n_positions={n_positions} is negative.")
        first = min(batch.positions.start for batch in batches)
        start = first if n_positions is None else max(first, -n_positions - 1)
        stop = max(batch.positions.stop for batch in batches)
        return cls(start, stop, bucketed=n_positions is not None and start < -n_positions)

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def range(self) -> range:
        """The positions with a row of their own."""
        return range(self.start, self.stop)

    @property
    def n_positions(self) -> int | None:
        """How many of the last prompt positions have a row of their own; ``None``: all."""
        return -self.start - 1 if self.bucketed else None

    def rows(self, positions: Int[Tensor, "*batch pos"]) -> Int[Tensor, "*batch pos"]:
        """Row of each position; ``len(self)`` is that of positions without one of their own."""
        row = positions - self.start
        if self.bucketed:
            row = row.clamp_min(0)
        return row.masked_fill((row < 0) | (row >= len(self)), len(self))

    def of_batch(self, batch: Batch) -> Int[Tensor, " column"]:
        """Row of each column of a batch."""
        here = batch.positions
        return self.rows(torch.arange(here.start, here.stop, device=batch.tokens.device))

    def count(self, batches: Iterable[Batch]) -> Int[Tensor, " row"]:
        """Tokens that are really there, by row."""
        total: Tensor | None = None
        for batch in batches:
            mask = batch.attention_mask
            if total is None:
                total = torch.zeros(len(self) + 1, dtype=torch.int64, device=mask.device)
            total.index_add_(0, self.of_batch(batch), mask.sum(0))
        assert total is not None
        return total


@dataclass(frozen=True)
class PositionMeans:
    """Mean coordinates of components.

    Attributes:
        positions: those with means of their own.
        count: calibration tokens at each of them.
        values: ``[component, position]``, in units of the coordinate.
        fallback: ``[component]``: the mean over positions, for all others.
    """

    positions: Positions
    count: Int[np.ndarray, " position"]
    values: Float[np.ndarray, "component position"]
    fallback: Float[np.ndarray, " component"]

    @classmethod
    def from_sums(
        cls,
        positions: Positions,
        total: Float[Tensor, "row component"],
        count: Int[Tensor, " row"],
    ) -> "PositionMeans":
        """Means from sums over the rows of ``positions``, the last row for the rest."""
        count = count.to(total.device)
        number = count[:, None].clamp_min(1).to(total)
        fallback = total.sum(0) / count.sum().clamp_min(1)
        values = (total / number)[:-1].T.contiguous()
        return cls(
            positions, count[:-1].cpu().numpy(), values.cpu().numpy(), fallback.cpu().numpy()
        )

    @classmethod
    def constant(cls, value: Float[np.ndarray, " component"]) -> "PositionMeans":
        """One value per component at all positions."""
        return cls(Positions(), np.zeros(0, np.int64), value[:, None][:, :0], value)

    def __len__(self) -> int:
        return len(self.fallback)

    def __getitem__(self, rows: np.ndarray | slice) -> "PositionMeans":
        """The means of these components."""
        return replace(self, values=self.values[rows], fallback=self.fallback[rows])

    @property
    def is_shared(self) -> bool:
        """Whether one mean serves all positions, so that the edit can be written into weights."""
        return len(self.positions) == 0

    def shared(self) -> "PositionMeans":
        """The mean over all positions at each of them."""
        return self.constant(self.fallback)

    def shifted(self, shift: Float[np.ndarray, " component"]) -> "PositionMeans":
        """Each component's means moved by the same at all positions."""
        by = shift.astype(self.fallback.dtype)
        return replace(self, values=self.values + by[:, None], fallback=self.fallback + by)

    def table(self) -> Float[np.ndarray, "component row"]:
        """The value at every row of ``positions``, the last one for positions without their own."""
        seen = np.where(self.count > 0, self.values, self.fallback[:, None])
        return np.concatenate([seen, self.fallback[:, None]], axis=1)

    def at(self, positions: range) -> Float[np.ndarray, "component position"]:
        """What freezing puts in place at these positions."""
        rows = self.positions.rows(torch.arange(positions.start, positions.stop))
        return self.table()[:, rows.numpy()]

    def arrays(self) -> dict[str, np.ndarray]:
        """What a file must hold, beside :meth:`header`."""
        return {"mean": self.values, "fallback": self.fallback, "count": self.count}

    def header(self) -> dict[str, Any]:
        """What a file must hold, beside :meth:`arrays`."""
        p = self.positions
        return {"positions": [p.start, p.stop], "bucketed": p.bucketed}

    @classmethod
    def read(cls, arrays: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> "PositionMeans":
        """Put together what :meth:`arrays` and :meth:`header` gave.

        Raises:
            KeyError: something is missing.
        """
        start, stop = header["positions"]
        positions = Positions(start, stop, bucketed=header["bucketed"])
        return cls(positions, arrays["count"], arrays["mean"], arrays["fallback"])
