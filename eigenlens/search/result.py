"""What a search returns, and the file that lets it go on after a kill."""

import html
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.evaluation import Evaluation, evaluate, preference
from eigenlens.files import load_table, load_tensors, save_table, save_tensors
from eigenlens.frozen_set import FrozenSet
from eigenlens.inputs import check_data
from eigenlens.provenance import data_hash, text_hash
from eigenlens.scoring import Scores
from eigenlens.search.protection import Protection
from eigenlens.spectra import COMPONENT


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        method: ``one_shot``, ``iterative``, ``guarded``, ``learned (frozen)``,
            ``learned (attenuated)`` or ``learned (kept)``.
        frozen: the best set on validation.
        trace: one row per step: components edited, losses and accuracy; ``chosen`` marks the step
            that ``frozen`` is from.
        protected: how far the edit moves the model on data that it was to spare: one row per data
            set; empty where none was given.
    """

    method: str
    frozen: FrozenSet
    trace: pd.DataFrame
    protected: pd.DataFrame = field(default_factory=pd.DataFrame)

    def _repr_html_(self) -> str:
        protected = self.protected.to_html(index=False) if len(self.protected) else ""
        return (
            f"<p>{html.escape(self.method)}</p>{self.frozen._repr_html_()}"
            f"{self.trace.to_html(index=False)}{protected}"
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``frozen.safetensors``, ``trace.parquet`` and ``protected.parquet``.

        The set carries its directions, if it has them: who takes it home needs no decomposition.
        """
        folder = Path(folder)
        self.frozen.save(folder / "frozen.safetensors", directions=self.frozen.has_directions)
        save_table(folder / "protected.parquet", "protected", self.protected, {})
        save_table(folder / "trace.parquet", "trace", self.trace, {"method": self.method})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "SearchResult":
        """Read back what :meth:`save` wrote.

        Raises:
            FileNotFoundError: a file is not there.
            FileFormatError: a file is truncated or foreign.
        """
        folder = Path(folder)
        trace, metadata = load_table(folder / "trace.parquet", "trace")
        protected, _ = load_table(folder / "protected.parquet", "protected")
        frozen = FrozenSet.load(folder / "frozen.safetensors")
        return cls(metadata["method"], frozen, trace, protected)


def look(model: TransformerBridge, data: Dataset, batch_size: int) -> Evaluation:
    """Exact match and loss of the model as it is now: what searches choose by."""
    return evaluate(model, data, batch_size=batch_size, choices=False, progress=False)


def trace_row(step: int, components: int, found: Evaluation, **more: Any) -> dict[str, Any]:
    """One line of a trace: the step, how much is edited, and what it does on validation."""
    return {
        "step": step,
        "components": components,
        **more,
        "validation_loss": found.loss,
        "validation_accuracy": found.accuracy,
    }


def best_step(trace: list[dict[str, Any]], bound: float = math.inf) -> pd.DataFrame:
    """The trace as a table whose ``chosen`` marks its best row, of equal ones the first.

    Where the search has an ``objective``, the best is the lowest, otherwise as
    :func:`eigenlens.evaluation.preference` says.

    Args:
        trace: rows of :func:`trace_row`.
        bound: most ``divergence`` of the chosen row, where that is a column; the first row, which
            edits nothing, may always be chosen.
    """
    table = pd.DataFrame(trace)
    allowed = np.ones(len(table), bool)
    if "divergence" in table:  # NaN where it was not measured
        allowed = table["divergence"].to_numpy(float) <= bound
        allowed[0] = True
    if "objective" in table:
        return table.assign(chosen=np.arange(len(table)) == table["objective"].argmin())
    columns = ["validation_accuracy", "validation_loss", "components"]
    ranks = [preference(*row) for row in table[columns].itertuples(index=False)]
    best = max(np.flatnonzero(allowed).tolist(), key=lambda row: ranks[row])
    return table.assign(chosen=np.arange(len(table)) == best)


class Checkpoint:
    """State of a search on disk. A file of a search with other options or data is refused."""

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        scores: Scores,
        train: Dataset,
        validation: Dataset,
        options: Mapping[str, Any],
        protect: Protection | None = None,
    ) -> None:
        """Where to keep the state (nowhere if ``path`` is ``None``), and what identifies it."""
        self._path = Path(path) if path is not None else None
        data = {"train": train, "validation": validation}
        for rows in data.values():
            check_data(rows)
        if self._path is None:
            return
        if protect is not None:
            data |= {f"protected {name}": rows for name, rows in protect.data.items()}
            options = {**options, "bound": protect.bound, "price": protect.price}
            options |= {"weight": protect.weight, "move_means": protect.move_means}
        self._identity = {
            "model": scores.provenance.model_fingerprint,
            "scores": [scores.criterion, scores.reference, scores.z, scores.provenance.task_hash],
            "components": text_hash([scores.components[COMPONENT].to_csv(index=False)]),
            "basis": [scores.basis, scores.basis_seed],
            "positions": scores.means.header(),
            "data": {name: data_hash(rows) for name, rows in data.items()},
            "options": json.loads(json.dumps(options)),
        }

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and numbers of the last saved step, or ``None`` where there is none.

        Raises:
            ValueError: the file belongs to another search.
            FileFormatError: it is truncated or foreign.
        """
        if self._path is None or not self._path.is_file():
            return None
        tensors, metadata = load_tensors(self._path, "search state")
        if metadata["identity"] != self._identity:
            raise ValueError(
                f"{self._path} holds the state of a search with other options, data or model. "
                "Delete it, or choose another file."
            )
        return tensors, metadata["state"]

    def save(self, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Replace the file by the state of now."""
        if self._path is not None:
            copies = {name: torch.as_tensor(value).cpu() for name, value in tensors.items()}
            metadata = {"identity": self._identity, "state": dict(state)}
            save_tensors(self._path, "search state", copies, metadata)
