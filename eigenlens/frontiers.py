"""What a task gains under edits against what other text loses: the frontier of the two.

Every edit is tried at several strengths, from the whole of it down to nothing, on the validation
split and on known text. The frontier are those that no other beats in both respects; one of them is
chosen, the most accurate within a bound on the harm. Only what is on the frontier is measured on
the test split and on text that nothing else saw.

Harm is the rise of the loss on text, in nats per token of the answers. Source of rewinding an edit
by its strength: PEFT-Arena (arXiv 2605.28819).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
from datasets import Dataset
from jaxtyping import Bool
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.evaluation import evaluate, preference
from eigenlens.files import load_table, save_table
from eigenlens.freezing import freeze
from eigenlens.frozen_set import FrozenSet
from eigenlens.provenance import Provenance, keeping_weights
from eigenlens.tasks import Task

STRENGTHS = (1.0, 0.8, 0.6, 0.4, 0.2)
_MEASURED = ("accuracy", "loss", "harm")


@dataclass(frozen=True)
class Frontier:
    """Edits by accuracy and harm.

    Attributes:
        table: one row per edit and strength, and a first one for no edit: ``edit, strength,
            components``, then ``accuracy, loss, harm`` on validation, ``on_frontier`` and
            ``chosen``, and ``test_accuracy, test_loss, test_harm`` of what is on the frontier (NaN
            elsewhere). Losses in nats per answer, harm in nats per token of text.
        bound: most harm of what may be chosen.
        provenance: model and versions.
    """

    table: pd.DataFrame
    bound: float
    provenance: Provenance

    @property
    def chosen(self) -> pd.Series:
        """The row of the most accurate edit within the bound, on validation."""
        return self.table[self.table["chosen"]].iloc[0]

    def show(self) -> pd.DataFrame:
        """What is on the frontier, least harm first."""
        return self.table[self.table["on_frontier"]].sort_values("harm", ignore_index=True)

    def _repr_html_(self) -> str:
        note = f"Frontier; harm in nats per token, bound {self.bound:g}."
        return f"<p>{note}</p>{self.show().to_html(index=False)}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one parquet file."""
        metadata = {"bound": self.bound, "provenance": self.provenance.model_dump()}
        save_table(path, "frontier", self.table, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Frontier":
        """Read back what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            FileFormatError: the file is truncated or foreign.
        """
        table, metadata = load_table(path, "frontier")
        return cls(table, metadata["bound"], Provenance(**metadata["provenance"]))


@keeping_weights
def frontier(
    model: TransformerBridge,
    edits: Mapping[str, FrozenSet],
    task: Task,
    text: Dataset,
    unseen: Dataset,
    *,
    strengths: Sequence[float] = STRENGTHS,
    bound: float = 0.05,
    batch_size: int = 50,
    progress: bool = True,
) -> Frontier:
    """Measure edits at several strengths, and choose one.

    Args:
        model: unedited, in eval mode.
        edits: by name, such as results of :func:`eigenlens.learned` under several prices.
        task: its validation split chooses, its test split reports.
        text: passages that choose (:func:`eigenlens.own_text`, ``wikitext``).
        unseen: passages that report.
        strengths: that every edit is scaled by, in (0, 1].
        bound: most nats per token that text may lose under the edit that is chosen.
        batch_size: examples per pass.
        progress: show a progress bar.

    Raises:
        ValueError: no edits, strengths out of range, a bound below zero; data that do not fit.
        WrongModelError: an edit of other weights.
    """
    if not edits or bound < 0 or not all(0 < strength <= 1 for strength in strengths):
        raise ValueError(
            f"{len(edits)} edits, strengths {tuple(strengths)}, bound {bound}: give one edit at "
            "least, strengths above 0 and up to 1, and a bound of 0 or more."
        )
    points = {("none", 0.0): next(iter(edits.values())).scaled(0.0)} | {
        (name, strength): frozen.scaled(strength)
        for name, frozen in edits.items()
        for strength in strengths
    }
    measured = partial(evaluate, model, batch_size=batch_size, choices=False, progress=False)
    base, base_unseen = (measured(data).token_loss for data in (text, unseen))

    def measure(frozen: FrozenSet, data: Dataset, passages: Dataset, was: float) -> list[float]:
        with freeze(model, frozen):
            found, harm = measured(data), measured(passages).token_loss - was
        return [found.accuracy, found.loss, harm]

    bar = tqdm(points.items(), desc="frontier", disable=not progress)
    rows = [
        [*place, len(frozen), *measure(frozen, task.validation, text, base)]
        for place, frozen in bar
    ]
    table = pd.DataFrame(rows, columns=["edit", "strength", "components", *_MEASURED])
    table = table.assign(on_frontier=on_frontier(table), chosen=False)
    allowed = [row for row in table.index if row == 0 or table.loc[row, "harm"] <= bound]
    by = ["accuracy", "loss", "components"]
    ranks = [preference(*values) for values in table[by].itertuples(index=False)]
    best = max(allowed, key=lambda row: ranks[row])
    table.loc[best, "chosen"] = True
    shown = table["on_frontier"] | table["chosen"]
    for row, frozen in zip(table.index, points.values(), strict=True):
        if shown[row]:
            found = measure(frozen, task.test, unseen, base_unseen)
            table.loc[row, [f"test_{name}" for name in _MEASURED]] = found
    return Frontier(table, bound, Provenance.of(model))


def on_frontier(table: pd.DataFrame) -> Bool[np.ndarray, " row"]:
    """Rows that no other beats: none is as good in both respects, and better in one."""
    accuracy, harm = table["accuracy"].to_numpy(), table["harm"].to_numpy()
    as_good = (accuracy >= accuracy[:, None]) & (harm <= harm[:, None])
    better = (accuracy > accuracy[:, None]) | (harm < harm[:, None])
    beaten: Bool[np.ndarray, " row"] = np.any(as_good & better, axis=1)
    return ~beaten
