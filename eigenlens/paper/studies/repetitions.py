"""Accuracies of cells that were measured several times: over seeds, and over draws of one seed.

Draws of one seed share its test examples, and splits of different seeds may. The column ``prompts``
of a table tells which.
"""

from dataclasses import dataclass
from itertools import chain
from zlib import crc32

import pandas as pd
from datasets import Dataset

from eigenlens.paper.studies.result import share
from eigenlens.statistics import Interval, repeated_interval


def prompts_column(data: Dataset) -> str:
    """What tells the examples of a row from those of another: a checksum of each prompt."""
    return " ".join(f"{crc32(prompt.encode()):08x}" for prompt in data["prompt"][:])


def prompts_of(row: pd.Series) -> list[str]:
    """An identity of each example of a row; all rows share theirs where nothing tells them."""
    told = row.get("prompts")
    return told.split() if isinstance(told, str) else [str(i) for i in range(int(row["n"]))]


@dataclass(frozen=True)
class Accuracy:
    """What a cell reached.

    Attributes:
        mean: over seeds, and draws of each.
        interval: of a further seed (of one seed: a further draw; of one of each: example).
        seeds: accuracy of each draw of each seed.
    """

    mean: float
    interval: Interval
    seeds: tuple[tuple[float, ...], ...]

    def __str__(self) -> str:
        return share(self.mean, *self.interval)

    @property
    def each(self) -> str:
        """Percentages by seed, of several draws the lowest to the highest: "82 / 44 to 60"."""
        return " / ".join(
            f"{min(draws):.0%}" if len(draws) == 1 else f"{min(draws):.0%} to {max(draws):.0%}"
            for draws in self.seeds
        ).replace("%", "")


def accuracy(part: pd.DataFrame, right: str = "right", n: str = "n") -> Accuracy:
    """The accuracy of one method on one task.

    Args:
        part: a row per seed and draw, with the columns ``seed``, perhaps ``draw`` and ``prompts``,
            and those of the names that follow.
        right: column of the number of right examples.
        n: column of the number of examples.
    """
    part = part.assign(right=part[right].astype(int), n=part[n].astype(int))
    seeds = [own for _, own in part.groupby("seed", sort=False)]
    firsts = [own.iloc[0] for own in seeds]
    distinct = len(set(chain.from_iterable(map(prompts_of, firsts))))
    repeated = part  # draws of one seed
    if len(seeds) > 1:
        means = [own["right"].mean() for own in seeds]
        repeated = pd.DataFrame({"right": means, "n": [row["n"] for row in firsts]})
    return Accuracy(
        mean=float(repeated["right"].sum() / repeated["n"].sum()),
        interval=repeated_interval(repeated["right"].tolist(), repeated["n"].tolist(), distinct),
        seeds=tuple(tuple((own["right"] / own["n"]).tolist()) for own in seeds),
    )
