"""The scores of every component, and what the frozen bias of each will need."""

import html
import os
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from jaxtyping import Float

from eigenlens.files import FileFormatError, load_table, save_table
from eigenlens.provenance import Provenance
from eigenlens.scoring.criteria import first_order, fisher, position_fisher
from eigenlens.spectra import Spectra

Criterion = Literal["mean", "max", "ucb", "fisher", "position_fisher", "margin"]
Reference = Literal["mean", "zero", "resample"]
CRITERIA: tuple[str, ...] = get_args(Criterion)
REFERENCES: tuple[str, ...] = get_args(Reference)
COMPONENT = ["layer", "matrix", "head", "index"]
STATISTICS = ["effect", "margin", "std", "position_square", "worst", "estimate"]


@dataclass(frozen=True)
class Scores:
    """First-order scores: a negative ``delta_loss`` predicts that freezing lowers the loss.

    Attributes:
        components: one row per component: ``layer, matrix, head, index, sigma``, and the mean
            ``effect``, the mean ``margin`` effect, the ``std`` over examples, the mean
            ``position_square`` (squared effects of single positions, summed), the ``worst`` single
            effect and an ``estimate`` made elsewhere, in nats (all but the first are NaN unless
            they were asked for).
        mean_activation: mean projected activation per component and position, ``[component,
            position]``: the value that freezing puts in place of the activation.
        positions: the positions of its columns, counted from the end of the prompt.
        count: how many tokens were seen at each position.
        criterion: what ``delta_loss`` is: ``mean`` effect, ``max`` (worst single effect),
            ``ucb`` (mean + z · std), ``fisher`` (mean + ½ mean square), ``position_fisher`` (the
            same with squares of single positions), ``margin`` (the mean change of the loss if
            log-odds move linearly), or the name of the estimate (:mod:`eigenlens.refinement`).
        reference: the value that freezing puts in place: per-position mean, zero, or resample.
        n_examples: examples scored.
        provenance: model, task, seed and versions.
        z: standard deviations that ``ucb`` adds.
        bucketed: whether the first position stands for all earlier ones, too.
        spectra: the decomposition that was scored (not saved).
    """

    components: pd.DataFrame
    mean_activation: np.ndarray
    positions: range
    count: np.ndarray
    criterion: str
    reference: str
    n_examples: int
    provenance: Provenance
    z: float = 1.0
    bucketed: bool = False
    spectra: Spectra | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.components)

    @property
    def n_positions(self) -> int | None:
        """How many of the last prompt positions have a mean of their own; ``None``: all."""
        return -self.positions.start - 1 if self.bucketed else None

    @property
    def delta_loss(self) -> np.ndarray:
        """The criterion's value per component, in nats."""
        c = self.components
        if self.criterion == "fisher":
            return fisher(c, self.n_examples)
        if self.criterion == "position_fisher":
            return position_fisher(c)
        if self.criterion == "margin":
            return c["margin"].to_numpy()
        if self.criterion not in CRITERIA:
            return c["estimate"].to_numpy()
        if self.criterion == "ucb":
            return first_order(c) + self.z * c["std"].to_numpy()
        return c["worst"].to_numpy() if self.criterion == "max" else first_order(c)

    @property
    def stderr(self) -> np.ndarray:
        """Standard error of the mean effect over examples, in nats; NaN unless asked for."""
        return (self.components["std"] / np.sqrt(self.n_examples)).to_numpy()

    def means_at(
        self, positions: range, rows: np.ndarray | slice = slice(None)
    ) -> Float[np.ndarray, "component position"]:
        """What freezing puts in place of the activations of ``rows`` at ``positions``.

        A position that was never seen has the mean over positions.
        """
        mean = self.mean_activation[rows]
        weight = self.count / max(1, self.count.sum())
        fallback = (mean @ weight.astype(mean.dtype))[:, None]
        columns = np.arange(positions.start, positions.stop) - self.positions.start
        if self.bucketed:
            columns = columns.clip(min=0)
        inside = (columns >= 0) & (columns < len(self.positions))
        columns = columns.clip(0, len(self.positions) - 1)
        return np.where(inside & (self.count[columns] > 0), mean[:, columns], fallback)

    def require_spectra(self) -> Spectra:
        """The decomposition that was scored.

        Raises:
            ValueError: these scores were read from a file, which holds no directions.
        """
        if self.spectra is None:
            raise ValueError(
                "These scores were loaded without directions: add them with "
                "dataclasses.replace(scores, spectra=eigenlens.decompose(model, …))."
            )
        return self.spectra

    def with_criterion(self, criterion: Criterion | str, z: float | None = None) -> "Scores":
        """The same scores ranked by another criterion.

        Raises:
            ValueError: the criterion needs per-example effects, which were not computed.
        """
        if criterion not in CRITERIA:
            raise ValueError(f"Unknown criterion {criterion!r}; choose from {', '.join(CRITERIA)}.")
        if criterion != "mean" and self.components["std"].isna().all():
            raise ValueError(
                f"criterion={criterion!r} needs per-example effects: "
                "score again with this criterion or with stderr=True."
            )
        return replace(self, criterion=criterion, z=self.z if z is None else z)

    def to_pandas(self) -> pd.DataFrame:
        """Columns ``layer, matrix, head, index, sigma, delta_loss, stderr``."""
        return self.components[[*COMPONENT, "sigma"]].assign(
            delta_loss=self.delta_loss, stderr=self.stderr
        )

    def _repr_html_(self) -> str:
        table = self.to_pandas().sort_values("delta_loss")
        note = (
            f"{len(self):,} components, criterion {self.criterion}, reference {self.reference}, "
            f"{self.n_examples} examples. delta_loss < 0 predicts that freezing lowers the loss."
        )
        return f"<p>{html.escape(note)}</p>{table.head(10).to_html(index=False)}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one parquet file; its table has the columns of ``to_pandas`` and more."""
        table = self.to_pandas().join(self.components[STATISTICS])
        table["mean_activation"] = list(self.mean_activation)
        metadata: dict[str, Any] = {
            "positions": [self.positions.start, self.positions.stop],
            "count": self.count.tolist(),
            "criterion": self.criterion,
            "reference": self.reference,
            "n_examples": self.n_examples,
            "z": self.z,
            "bucketed": self.bucketed,
            "provenance": self.provenance.model_dump(),
        }
        save_table(path, "scores", table, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Scores":
        """Read back what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            FileFormatError: the file is truncated, foreign, or lacks a column.
        """
        table, metadata = load_table(path, "scores")
        columns = [*COMPONENT, "sigma", *STATISTICS]
        missing = {*columns, "mean_activation"} - set(table.columns)
        if missing:
            raise FileFormatError(f"{path} lacks the columns {', '.join(sorted(missing))}.")
        return cls(
            components=table[columns],
            mean_activation=np.stack(table["mean_activation"].to_list()),
            positions=range(*metadata["positions"]),
            count=np.array(metadata["count"]),
            criterion=metadata["criterion"],
            reference=metadata["reference"],
            n_examples=metadata["n_examples"],
            provenance=Provenance(**metadata["provenance"]),
            z=metadata["z"],
            bucketed=metadata.get("bucketed", False),
        )
