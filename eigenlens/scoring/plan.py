"""What a scoring run reads, and in how many parts.

The batches do not depend on the number of shards, which get whole ones: what a batch gives is then
the same to the last bit wherever it is run, and only the order of summation differs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from datasets import Dataset

from eigenlens.bridges import TransformerBridge
from eigenlens.position_means import PositionMeans, Positions
from eigenlens.tasks.batches import Batch, make_batches
from eigenlens.tasks.pairs import paired

N_POSITIONS = 128  # of a prompt's last ones have a mean of their own, where nothing else is said


@dataclass(frozen=True)
class Plan:
    """The examples of a scoring run, or of a part of it, and their references.

    Attributes:
        batches: the examples.
        reference: what takes the place of coordinates.
        positions: rows of the means.
        means: what freezing puts in place, where that is known.
        pairs: the counterparts of ``batches``, where the reference is ``pair``.
        rolls: by how many rows each batch is rolled, where the reference is ``resample``.
    """

    batches: list[Batch]
    reference: str
    positions: Positions
    means: PositionMeans | None = None
    pairs: list[Batch] | None = None
    rolls: list[int] | None = None

    @classmethod
    def of(
        cls,
        data: Dataset,
        model: TransformerBridge,
        reference: str,
        means: PositionMeans | None,
        *,
        batch_size: int,
        n_positions: int | None,
        seed: int,
    ) -> "Plan":
        """Tokenise ``data``; the arguments are those of :func:`eigenlens.score`.

        Raises:
            ValueError: what :func:`eigenlens.score` says of the data and of ``n_positions``.
        """
        resampled = reference == "resample"
        batches = make_batches(data, model, batch_size, smallest=2 if resampled else 1)
        pairs = paired(batches, data, model) if reference == "pair" else None
        positions = Positions.of(batches, N_POSITIONS if n_positions is None else n_positions)
        if means is not None:
            positions = means.positions
        elif reference in ("shared", "zero"):
            positions = Positions()
        rolls = _rolls(batches, seed) if resampled else None
        return cls(batches, reference, positions, means, pairs, rolls)

    @property
    def n_examples(self) -> int:
        """How many examples there are."""
        return sum(map(len, self.batches))

    def parts(self, count: int) -> list["Plan"]:
        """The batches dealt out in order, at least one for each part; fewer parts where need be."""
        numbers = np.array_split(np.arange(len(self.batches)), min(count, len(self.batches)))
        return [
            replace(
                self,
                batches=[self.batches[i] for i in own],
                pairs=None if self.pairs is None else [self.pairs[i] for i in own],
                rolls=None if self.rolls is None else [self.rolls[i] for i in own],
            )
            for own in numbers
        ]


def _rolls(batches: Sequence[Batch], seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(torch.randint(1, len(batch), (), generator=generator)) for batch in batches]
