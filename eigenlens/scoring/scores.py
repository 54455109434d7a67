"""The scores of every component, and what freezing each of them will need."""

import html
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from datasets import Dataset

from eigenlens.bridges import TransformerBridge
from eigenlens.decomposition import decomposed_again
from eigenlens.files import FileFormatError, load_arrays, save_table
from eigenlens.position_means import PositionMeans
from eigenlens.provenance import Provenance, data_hash
from eigenlens.scoring.criteria import first_order, fisher, position_fisher
from eigenlens.spectra import COMPONENT, Spectra

Criterion = Literal[
    "mean",
    "max",
    "max_everywhere",
    "ucb",
    "fisher",
    "position_fisher",
    "margin",
    "grad_activation",
    "eap_ig_inputs",
    "eap_ig_activations",
    "atp_qk",
    "atp_drop",
    "atp_star",
]
Reference = Literal["mean", "shared", "zero", "resample", "pair"]
CRITERIA: tuple[str, ...] = get_args(Criterion)
REFERENCES: tuple[str, ...] = get_args(Reference)
STATISTICS = ["effect", "std", "margin", "margin_std", "position_square", "worst", "estimate"]
PEERS = CRITERIA[CRITERIA.index("grad_activation") :]  # of other methods: one score at a time
# Worst cases, magnitudes, and the effect of another edit.
_NO_MEAN = ("max", "max_everywhere", "ucb", "grad_activation", "atp_drop", "atp_star")
_NEEDS = {"ucb": "std", "fisher": "std", "margin": "margin", "max": "worst"}
_NEEDS |= {"max_everywhere": "worst", "position_fisher": "position_square"}


def estimates_mean(criterion: str, reference: str) -> bool:
    """Whether such scores estimate the mean effect of freezing, which exact effects can replace."""
    return criterion not in _NO_MEAN and reference not in ("resample", "pair")


@dataclass(frozen=True)
class Scores:
    """First-order scores: a negative ``delta_loss`` predicts that freezing lowers the loss.

    Attributes:
        components: one row per component: ``layer, matrix, head, index, sigma``, and the mean
            ``effect``, its ``std`` over examples, the mean ``margin`` effect and its
            ``margin_std``, the mean ``position_square`` (squared effects of single positions,
            summed), the ``worst`` single effect and an ``estimate`` made elsewhere, in nats (all
            but the first are NaN unless they were asked for).
        means: what freezing puts in place of each component's coordinate.
        criterion: what ``delta_loss`` is: ``mean`` effect, ``max`` or ``max_everywhere`` (worst
            single effect), ``ucb`` (mean + z · std), ``fisher`` (mean + ½ mean square),
            ``position_fisher`` (the same with squares of single positions), ``margin`` (the mean
            change of the loss if log-odds move linearly), or the name of the estimate
            (:mod:`eigenlens.scoring.peers`, :mod:`eigenlens.refinement`).
        reference: where ``means`` come from: per-position ``mean``, one ``shared`` mean, ``zero``
            input, or per-position means with effects against another example (``resample``) or
            against the counterpart (``pair``: the means are those of the counterparts).
        n_examples: examples scored.
        provenance: model, task, seed and versions.
        z: standard deviations that ``ucb`` adds.
        basis: that the components are of (:mod:`eigenlens.bases`).
        basis_seed: of a ``random`` basis.
        spectra: the decomposition that was scored (not saved).
    """

    components: pd.DataFrame
    means: PositionMeans
    criterion: str
    reference: str
    n_examples: int
    provenance: Provenance
    z: float = 1.0
    basis: str = "svd"
    basis_seed: int | None = None
    spectra: Spectra | None = field(default=None, repr=False, compare=False)

    @classmethod
    def made_of(
        cls,
        spectra: Spectra,
        statistics: Mapping[str, np.ndarray],
        means: PositionMeans,
        data: Dataset,
        *,
        criterion: str,
        reference: str,
        seed: int,
    ) -> "Scores":
        """Scores of all components of ``spectra`` on ``data``; statistics not given are NaN."""
        hashed = {"task_hash": data_hash(data), "seed": seed}
        return cls(
            components=spectra.components.assign(
                **{name: statistics.get(name, np.nan) for name in STATISTICS}
            ),
            means=means,
            criterion=criterion,
            reference=reference,
            n_examples=len(data),
            provenance=spectra.provenance.model_copy(update=hashed),
            basis=spectra.basis,
            basis_seed=spectra.seed,
            spectra=spectra,
        )

    def __len__(self) -> int:
        return len(self.components)

    @property
    def delta_loss(self) -> np.ndarray:
        """The criterion's value per component, in nats."""
        c = self.components
        if self.criterion == "mean":
            return first_order(c)
        if self.criterion == "fisher":
            return fisher(c, self.n_examples)
        if self.criterion == "position_fisher":
            return position_fisher(c)
        if self.criterion == "margin":
            return c["margin"].to_numpy()
        if self.criterion == "ucb":
            return first_order(c) + self.z * c["std"].to_numpy()
        worst = self.criterion in ("max", "max_everywhere")
        return c["worst" if worst else "estimate"].to_numpy()

    @property
    def stderr(self) -> np.ndarray:
        """Standard error of ``delta_loss`` over examples, in nats.

        Known where the criterion is a mean over examples (``mean``, ``margin``) whose single
        effects were computed; NaN otherwise.
        """
        spread = {"mean": "std", "margin": "margin_std"}.get(self.criterion)
        if spread is None:
            return np.full(len(self), np.nan)
        return (self.components[spread] / np.sqrt(self.n_examples)).to_numpy()

    def spectra_on(self, model: TransformerBridge) -> Spectra:
        """The decomposition that was scored, where the model at hand has its weights.

        Scores that were read from a file hold no directions: the model is decomposed again.

        Raises:
            ValueError: the model has other weights, or these scores are of a ``pca`` basis and were
                read from a file.
        """
        if self.spectra is not None:
            return self.spectra.on(model)
        made = decomposed_again(model, self.components, self.basis, self.basis_seed)
        if made.provenance.model_fingerprint != self.provenance.model_fingerprint:
            raise ValueError("These scores belong to a model with other weights: score this one.")
        names = dict.fromkeys(zip(self.components["layer"], self.components["matrix"], strict=True))
        return made.with_spectra(made[f"blocks.{layer}.{kind}"] for layer, kind in names)

    def on(self, model: TransformerBridge) -> "Scores":
        """The same scores with directions where the model at hand has its weights.

        Raises:
            ValueError: as :meth:`spectra_on`.
        """
        return replace(self, spectra=self.spectra_on(model))

    def with_criterion(self, criterion: Criterion | str, z: float | None = None) -> "Scores":
        """The same scores ranked by another criterion.

        Raises:
            ValueError: an unknown criterion, or one whose statistics were not computed.
        """
        if criterion not in CRITERIA:
            raise ValueError(f"Unknown criterion {criterion!r}; choose from {', '.join(CRITERIA)}.")
        if criterion in PEERS and criterion != self.criterion:
            raise ValueError(f"criterion={criterion!r} was not computed: score again with it.")
        needed = _NEEDS.get(criterion)
        if needed is not None and self.components[needed].isna().all():
            raise ValueError(
                f"criterion={criterion!r} was not computed: score again with it. What needs single "
                "positions (max, max_everywhere, position_fisher) brings the others along."
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
        arrays = self.means.arrays()
        metadata: dict[str, Any] = {
            **self.means.header(),
            "count": arrays["count"].tolist(),
            "criterion": self.criterion,
            "reference": self.reference,
            "n_examples": self.n_examples,
            "z": self.z,
            "basis": self.basis,
            "basis_seed": self.basis_seed,
            "provenance": self.provenance.model_dump(),
        }
        table["fallback"] = arrays["fallback"]
        save_table(path, "scores", table, metadata, {"mean": arrays["mean"]})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Scores":
        """Read back what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            FileFormatError: the file is truncated, foreign, or lacks a column.
        """
        table, metadata, arrays = load_arrays(path, "scores")
        columns = [*COMPONENT, "sigma", *STATISTICS]
        missing = {*columns, "fallback"} - set(table.columns)
        if missing:
            raise FileFormatError(f"{path} lacks the columns {', '.join(sorted(missing))}.")
        arrays |= {
            "fallback": table["fallback"].to_numpy(),
            "count": np.array(metadata["count"], np.int64),
        }
        return cls(
            components=table[columns],
            means=PositionMeans.read(arrays, metadata),
            criterion=metadata["criterion"],
            reference=metadata["reference"],
            n_examples=metadata["n_examples"],
            provenance=Provenance(**metadata["provenance"]),
            z=metadata["z"],
            basis=metadata["basis"],
            basis_seed=metadata["basis_seed"],
        )
