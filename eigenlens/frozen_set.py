"""``FrozenSet``: which components an edit freezes, how strongly, and what takes their place."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eigenlens.bridges import TransformerBridge
from eigenlens.decomposition import decomposed_again
from eigenlens.files import FileFormatError, load_tensors, save_tensors
from eigenlens.matrices import KINDS
from eigenlens.position_means import PositionMeans
from eigenlens.provenance import (
    Provenance,
    hashed_model,
    hashed_plain,
    model_fingerprint,
    same_when_rounded,
    tokenizer_hash,
)
from eigenlens.scoring.scores import Scores
from eigenlens.spectra import COMPONENT, Directions, Spectra, by_matrix


class WrongModelError(ValueError):
    """A FrozenSet was made for a model with other weights."""


class UnplacedError(ValueError):
    """A FrozenSet does not say where its directions lie in a plain model."""


@dataclass(frozen=True)
class FrozenSet:
    """Components to freeze, with the mean coordinates that take their place.

    Attributes:
        components: one row each: ``layer, matrix, head, index, strength``; strength in (0, 1].
        means: their mean coordinates.
        n_candidates: how many components were chosen from.
        provenance: model, task, seed and versions.
        basis: that they are components of.
        seed: of a ``random`` basis.
        spectra: the directions; without them they follow from the weights.
        directions: those of these components alone, by site, from a file that carries them.
    """

    components: pd.DataFrame
    means: PositionMeans
    n_candidates: int
    provenance: Provenance
    basis: str = "svd"
    seed: int | None = None
    spectra: Spectra | None = field(default=None, repr=False, compare=False)
    directions: Mapping[str, Directions] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        strength = self.components["strength"]
        if len(strength) and not ((strength > 0) & (strength <= 1)).all():
            raise ValueError("Every strength must lie in (0, 1]; leave out what is not frozen.")
        if self.components.duplicated(COMPONENT).any():
            raise ValueError("A component is listed twice.")
        if len(self.means) != len(self.components):
            raise ValueError(
                f"There are means of {len(self.means)} components for {len(self.components)}: take "
                "the same rows of both."
            )
        if not (np.isfinite(self.means.fallback).all() and np.isfinite(self.means.values).all()):
            raise ValueError("A mean is NaN or infinite: calibrate on finite activations.")

    def __len__(self) -> int:
        return len(self.components)

    @classmethod
    def from_scores(
        cls, scores: Scores, rows: np.ndarray, strength: np.ndarray | float = 1.0
    ) -> "FrozenSet":
        """Freeze the components in these ``rows`` of ``scores.components``."""
        return cls(
            components=scores.components[COMPONENT]
            .iloc[rows]
            .assign(strength=strength)
            .reset_index(drop=True),
            means=scores.means[rows],
            n_candidates=len(scores),
            provenance=scores.provenance,
            basis=scores.basis,
            seed=scores.basis_seed,
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

    def scaled(self, strength: float) -> "FrozenSet":
        """The same edit at a share of its strength; nothing at 0.

        Raises:
            ValueError: a share outside [0, 1].
        """
        if not 0 <= strength <= 1:
            raise ValueError(f"strength={strength}: give a share from 0 to 1.")
        if strength == 0:
            nothing = np.zeros(0, np.int64)
            return replace(self, components=self.components.iloc[:0], means=self.means[nothing])
        changed = self.components["strength"] * strength
        return replace(self, components=self.components.assign(strength=changed))

    def part(self, rows: np.ndarray) -> "FrozenSet":
        """These rows of the components alone; their directions come from decompositions."""
        components = self.components.iloc[rows].reset_index(drop=True)
        return replace(self, components=components, means=self.means[rows], directions=None)

    def to_pandas(self) -> pd.DataFrame:
        """Columns ``layer, matrix, head, index, strength``."""
        return self.components.copy()

    def kept(self, scores: Scores) -> pd.DataFrame:
        """The components of ``scores`` that this set leaves alone, with their scores.

        What :func:`eigenlens.learned` with ``keep=True`` found: the task's own components.
        """
        known = pd.MultiIndex.from_frame(scores.components[COMPONENT])
        mine = known.isin(pd.MultiIndex.from_frame(self.components[COMPONENT]))
        return scores.to_pandas()[~mine].reset_index(drop=True)

    def _repr_html_(self) -> str:
        by_matrix = self.components.pivot_table(
            index="layer", columns="matrix", values="index", aggfunc="count", fill_value=0
        )
        kind = "one mean for all positions" if self.means.is_shared else "means by position"
        note = (
            f"{len(self):,} of {self.n_candidates:,} components {self.edit} ({self.fraction:.2%}), "
            f"{kind}"
        )
        return f"<p>{note}; how many per layer and matrix:</p>{by_matrix.to_html()}"

    def shared(self) -> "FrozenSet":
        """The same components with one mean for all positions, which weights can express."""
        return replace(self, means=self.means.shared())

    def directions_on(
        self, model: TransformerBridge, *, allow_dtype: bool = False
    ) -> dict[str, Directions]:
        """Directions of these components, by site, where the model at hand has its weights.

        Args:
            model: with the weights that the set was made for.
            allow_dtype: they may be of another type.

        Raises:
            WrongModelError: the set belongs to other weights.
            ValueError: its directions follow from data or weights that are not here.
        """
        self.check_model(model, allow_dtype=allow_dtype)
        if not self.has_directions:
            if self.provenance.model_fingerprint != model_fingerprint(model):
                raise ValueError(
                    "Weights of another dtype have other directions: save this FrozenSet with "
                    "directions=True."
                )
            spectra = decomposed_again(model, self.components, self.basis, self.seed)
            return replace(self, spectra=spectra).directions_on(model)
        return {
            name: own.to(own.site.find(model).flat_weight.device)
            for name, own in self._directions().items()
        }

    def directions_in(
        self, model: PreTrainedModel, *, allow_dtype: bool = False
    ) -> dict[str, Directions]:
        """As :meth:`directions_on`, in a plain transformers model.

        Raises:
            WrongModelError: the set belongs to other weights.
            UnplacedError: it holds no directions, or does not know where they lie.
        """
        made = self.provenance.plain
        if made is None or not self.has_directions:
            raise UnplacedError(
                "This edit does not say where its directions lie in a plain model: write it with "
                "save(path, directions=True) where TransformerLens is installed."
            )
        hashed, own = hashed_plain(model)
        if not same_when_rounded(made, hashed, own):
            raise self._of_other_weights("hashes", next(iter(made.values())), hashed(own))
        self._check_dtype(own, allow_dtype)
        found: dict[str, Directions] = {}
        for name, part in self._directions().items():
            if part.place is None:
                raise UnplacedError(
                    f"{name} is no linear map of the plain transformers model: its edit lives in "
                    "TransformerLens only."
                )
            found[name] = part.to(part.place.weight(model).device)
        return found

    @property
    def has_directions(self) -> bool:
        """Whether the directions of all its components are here, and need not be found anew."""
        return self.directions is not None or self.spectra is not None or not len(self)

    def _directions(self) -> Mapping[str, Directions]:
        if self.directions is not None or self.spectra is None:
            own = self.directions or {}
            for name, rows in by_matrix(self.components).items():
                if name not in own or own[name].n_components != len(rows):
                    raise ValueError(
                        f"The directions that this set holds in {name} are not those of its "
                        "components: leave them out with dataclasses.replace(…, directions=None)."
                    )
            return own
        head, index = (self.components[name].to_numpy() for name in ("head", "index"))
        return {
            name: self.spectra[name].subset(head[rows], index[rows])
            for name, rows in by_matrix(self.components).items()
        }

    def save(self, path: str | os.PathLike[str], *, directions: bool = False) -> None:
        """Write one safetensors file.

        Args:
            path: the file.
            directions: write the components' directions into it, so that whoever reads it need not
                decompose the model. A ``pca`` basis, which does not follow from the weights, always
                is.

        Raises:
            ValueError: directions are wanted and not here.
        """
        c = self.components
        tensors = {
            "layer": torch.tensor(c["layer"].to_numpy(np.int32)),
            "matrix": torch.tensor(pd.Categorical(c["matrix"], KINDS).codes.astype(np.int32)),
            "head": torch.tensor(c["head"].to_numpy(np.int32)),
            "index": torch.tensor(c["index"].to_numpy(np.int32)),
            "strength": torch.tensor(c["strength"].to_numpy(np.float64)),
            **{name: torch.as_tensor(values) for name, values in self.means.arrays().items()},
        }
        metadata: dict[str, Any] = {
            **self.means.header(),
            "n_candidates": self.n_candidates,
            "basis": self.basis,
            "basis_seed": self.seed,
            "provenance": self.provenance.model_dump(),
        }
        if directions or self.basis == "pca":
            if not self.has_directions:
                raise ValueError("This set holds no directions to save.")
            own = self._directions()
            metadata["sites"] = {name: d.header() for name, d in own.items()}
            for name, d in own.items():
                tensors |= {f"{name}.{part}": value for part, value in d.tensors().items()}
        save_tensors(path, "frozen set", tensors, metadata)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: TransformerBridge | None = None,
        *,
        allow_dtype: bool = False,
    ) -> "FrozenSet":
        """Read back what :meth:`save` wrote.

        Args:
            path: the file.
            model: refuse the file unless it belongs to these weights.
            allow_dtype: they may be of another type.

        Raises:
            FileNotFoundError: there is no such file.
            FileFormatError: the file is truncated or foreign.
            WrongModelError: it belongs to a model with other weights.
        """
        tensors, metadata = load_tensors(path, "frozen set")
        try:
            frozen = cls._read(tensors, metadata)
        except (KeyError, IndexError) as error:
            raise FileFormatError(f"{path} lacks {error}.") from error
        if model is not None:
            frozen.check_model(model, allow_dtype=allow_dtype)
        return frozen

    @classmethod
    def _read(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> "FrozenSet":
        components = pd.DataFrame(
            {
                "layer": tensors["layer"].long().numpy(),
                "matrix": np.array(KINDS, dtype=object)[tensors["matrix"].numpy()],
                "head": tensors["head"].long().numpy(),
                "index": tensors["index"].long().numpy(),
                "strength": tensors["strength"].numpy(),
            }
        )
        arrays = {name: tensors[name].numpy() for name in ("mean", "fallback", "count")}
        directions = None
        if "sites" in metadata:
            directions = {
                name: Directions.of_tensors(header, tensors, name)
                for name, header in metadata["sites"].items()
            }
        return cls(
            components=components,
            means=PositionMeans.read(arrays, metadata),
            n_candidates=metadata["n_candidates"],
            provenance=Provenance(**metadata["provenance"]),
            basis=metadata["basis"],
            seed=metadata["basis_seed"],
            directions=directions,
        )

    def check_model(self, model: TransformerBridge, *, allow_dtype: bool = False) -> None:
        """Raise :class:`WrongModelError` unless this set belongs to the weights of ``model``.

        With ``allow_dtype`` they may be of another type: they are compared as rounded to the
        coarser one. What an edit does there was not measured: evaluate again.
        """
        made_for = self.provenance.model_fingerprint
        found = model_fingerprint(model)
        if made_for == found:
            return
        rounded = self.provenance.rounded
        hashed, own = hashed_model(model)
        if rounded is None or not same_when_rounded(rounded, hashed, own):
            raise self._of_other_weights("fingerprints", made_for, found)
        self._check_dtype(own, allow_dtype)

    def _of_other_weights(self, what: str, made_for: str, found: str) -> WrongModelError:
        return WrongModelError(
            f"This FrozenSet was made for {self.provenance.model!r}, and the model at hand has "
            f"other weights ({what} {made_for[:8]}… and {found[:8]}…): score and select on this "
            "model."
        )

    def _check_dtype(self, own: torch.dtype, allow_dtype: bool) -> None:
        made = self.provenance.dtype
        if not allow_dtype and made != str(own).removeprefix("torch."):
            raise WrongModelError(
                f"This FrozenSet was made for these weights in {made}: give allow_dtype=True "
                "(--allow-dtype) to use it here, and evaluate again."
            )

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise :class:`WrongModelError` unless a tokenizer has the tokens of the model's own."""
        if self.provenance.tokenizer not in (None, tokenizer_hash(tokenizer)):
            raise WrongModelError(
                f"This FrozenSet was made for {self.provenance.model!r} with a tokenizer whose "
                "tokens have other ids than those of the one at hand: load that model's own."
            )


def check_frozen(frozen: object) -> None:
    """Raise ``ValueError`` for what is no ``FrozenSet``, such as the path of its file."""
    if not isinstance(frozen, FrozenSet):
        raise ValueError(
            f"The edit is a {type(frozen).__name__} and no FrozenSet: give what select or a search "
            "returns, or FrozenSet.load(path)."
        )
