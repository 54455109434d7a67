"""The configuration of a whole run: what it depends on, checked before anything is loaded."""

import inspect
import os
from typing import Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from eigenlens.decomposition import Basis, kinds_of
from eigenlens.errors import problems
from eigenlens.files import read_yaml
from eigenlens.scoring import Criterion, Reference
from eigenlens.search import SEARCHES


class EigenpruneConfig(BaseModel):
    """Everything that a run depends on. Unknown keys are refused.

    ``search`` is a key of :data:`eigenlens.search.SEARCHES` and ``search_args`` are its own
    keyword arguments. All choices are made on the validation split: highest exact-match accuracy,
    then lowest loss. ``protect`` names tasks (with their arguments) whose validation split the edit
    must leave as it is, to within ``protect_bound`` nats of divergence per answer token. By default
    it is text that the model writes itself (``own_text``), unless its tokenizer does not read that
    back, as with toys; an empty mapping protects nothing. ``one_shot`` and ``iterative`` cannot
    protect: there the divergence is measured.
    ``refine`` components, those whose scores are least to be trusted, get their exact effect on
    some training examples instead of the estimate: by default 600 for ``one_shot``, the only search
    that ranks once and for all, unless the criterion is a maximum or ``ucb`` or the reference
    ``resample``, which do not estimate the mean effect of freezing.

    A frozen coordinate gets its one mean over all positions (``shared``), which the study ``harm``
    finds better than the paper's means by position (``mean``). Of the latter, ``n_positions`` of
    the last positions of the prompt keep their own (default: 128), and those before them share one,
    which bounds memory and the size of the edit for long prompts.

    ``skip_unsupported`` decomposes what is dense of a model that is not
    (:func:`eigenlens.weight_matrices`); the result names what was left out.

    ``basis`` says what the components are (:mod:`eigenlens.bases`); that of ``pca`` is taken on the
    train split. ``seed`` is the seed of the task, of a random basis, of resampling and of the
    search.

    ``from_memory`` names what :func:`eigenlens.eigenprune` was handed as an object: ``model`` and
    ``task`` then only say what these call themselves, and the configuration alone does not
    reproduce the run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "arith-tiny"
    merge_adapter: bool = False
    dtype: str = "float32"
    device: str | None = None
    task: str = "ambiguous"
    task_args: dict[str, Any] = Field(default_factory=dict)
    matrices: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    skip_unsupported: bool = False
    basis: Basis = "svd"
    criterion: Criterion = "margin"
    refine: int | None = Field(default=None, ge=0)
    reference: Reference = "shared"
    search: Literal["one_shot", "iterative", "guarded", "learned"] = "learned"
    search_args: dict[str, Any] = Field(default_factory=dict)
    protect: dict[str, dict[str, Any]] | None = None
    protect_bound: float = Field(default=0.05, ge=0)
    batch_size: int = Field(default=50, ge=1)
    n_positions: int | None = Field(default=None, ge=0)
    seed: int = 0
    from_memory: tuple[Literal["model", "task"], ...] = ()

    @field_validator("search_args")
    @classmethod
    def _check_search_args(cls, args: dict[str, Any], info: Any) -> dict[str, Any]:
        # ``info`` is pydantic's ValidationInfo, a protocol that cannot be checked at run time.
        return _valid_options(info.data["search"], args) if "search" in info.data else args

    @model_validator(mode="after")
    def _check_kinds(self) -> "EigenpruneConfig":
        kinds_of(self.basis, self.matrices)
        return self

    @model_validator(mode="after")
    def _check_search(self) -> "EigenpruneConfig":
        if self.protect and "protect" not in inspect.signature(SEARCHES[self.search]).parameters:
            raise ValueError(f"search={self.search!r} cannot protect: use guarded or learned")
        if self.n_positions is not None and self.reference in ("shared", "zero"):
            raise ValueError(
                f"n_positions={self.n_positions}: reference={self.reference!r} knows no positions; "
                "use reference='mean'"
            )
        return self

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "EigenpruneConfig":
        """The configuration of a key of :data:`PRESETS`; ``overrides`` win.

        Raises:
            ValueError: no such preset, or a value that is not valid.
        """
        if name not in PRESETS:
            raise ValueError(f"Unknown preset {name!r}; choose from {', '.join(PRESETS)}.")
        return cls.make(**{**PRESETS[name], **overrides})

    @classmethod
    def make(cls, **values: Any) -> "EigenpruneConfig":
        """Like the constructor, with one readable ``ValueError`` for all that is wrong."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise ValueError(f"The configuration is not valid. {problems(error)}") from error

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], **overrides: Any) -> "EigenpruneConfig":
        """Read a YAML file; ``overrides`` win.

        Raises:
            FileNotFoundError: there is no such file.
            FileFormatError: it is no YAML mapping.
            ValueError: an unknown key or a value out of range; names the file.
        """
        values = read_yaml(path) | overrides
        try:
            return cls.make(**values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def to_yaml(self) -> str:
        """All values as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


PRESETS: dict[str, dict[str, Any]] = {
    # The paper's text: per-position means, worst case over examples, three shares to choose from.
    "paper": {
        "criterion": "max",
        "reference": "mean",
        "search": "one_shot",
        "search_args": {"fractions": [0.01, 0.05, 0.1], "or_nothing": False},
    },
}
# Given by the run itself, not by ``search_args``.
_GIVEN = {"protect", "choose", "batch_size", "seed", "checkpoint", "progress"}


def search_options(search: str) -> type[BaseModel]:
    """The options of a search, checked and in their types."""
    parameters = inspect.signature(SEARCHES[search]).parameters
    if "config" in parameters:
        config = next(arg for arg in get_args(parameters["config"].annotation) if arg is not None)
        assert issubclass(config, BaseModel)
        return config
    own = {
        p.name: (p.annotation, ... if p.default is p.empty else p.default)
        for p in parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name not in _GIVEN
    }
    return create_model(search, __config__=ConfigDict(extra="forbid"), **own)  # type: ignore[call-overload]


def _valid_options(search: str, options: dict[str, Any]) -> dict[str, Any]:
    """A search's arguments in their types (YAML reads 1e-3 as text); an error names wrong ones."""
    model = search_options(search)
    own = [name for name in model.model_fields if name not in _GIVEN]
    try:
        if given := _GIVEN & set(options):
            raise ValueError(f"{', '.join(sorted(given))}: an option of the run itself")
        valid = model(**options)
    except ValidationError as error:
        raise ValueError(f"{problems(error)} (arguments of {search}: {', '.join(own)})") from error
    found: dict[str, Any] = valid.model_dump(exclude_unset=True)
    return found
