"""The whole job: load → decompose → score → search → freeze → evaluate before and after.

With ``out`` every stage is written as it ends; a run that was interrupted goes on from there, and a
finished one is read back. The folder's ``config.yaml`` alone reproduces the run.
"""

import html
import inspect
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

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
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.errors import problems
from eigenlens.evaluation import Comparison, Evaluation, compare, evaluate
from eigenlens.files import FileFormatError, read_yaml, write_json, write_text
from eigenlens.freezing import FrozenSet, freeze
from eigenlens.models import load_model
from eigenlens.paper.released_code import (
    ReferenceCode,
    finetuned,
    score_like_reference,
    select_like_reference,
)
from eigenlens.plots import search_trace, spectrum
from eigenlens.provenance import Provenance, versions
from eigenlens.refinement import REFINED, REFINED_EXAMPLES, refined
from eigenlens.scoring import Criterion, Reference, Scores, score
from eigenlens.search import SEARCHES, Protection, SearchResult
from eigenlens.spectra import Spectra, decompose
from eigenlens.tasks import Task, load_task

T = TypeVar("T")


class EigenpruneConfig(BaseModel):
    """Everything that a run depends on. Unknown keys are refused.

    ``search`` is a key of :data:`eigenlens.search.SEARCHES` and ``search_args`` are its own
    keyword arguments. All choices are made on the validation split: highest exact-match accuracy,
    then lowest loss. ``protect`` names tasks (with their arguments) whose validation split the edit
    must leave as it is, to within ``protect_bound`` nats of divergence per answer token.
    ``refine`` components, those whose scores are least to be trusted, get their exact effect on
    some training examples instead of the estimate: by default 600 for ``one_shot``, the only search
    that ranks once and for all, unless the criterion is ``max`` or ``ucb`` or the reference
    ``resample``, which do not estimate the mean effect of freezing.

    Of long prompts, ``n_positions`` of the last positions keep a mean of their own (default: all);
    those before them share one, which bounds memory and the size of the edit.

    ``reference_code`` scores and selects as the paper's released code does; its switches say in
    what. ``seed`` is the seed of the task, of resampling and of the search.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "arith-tiny"
    dtype: str = "float32"
    device: str | None = None
    task: str = "ambiguous"
    task_args: dict[str, Any] = Field(default_factory=dict)
    matrices: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    reference_code: ReferenceCode | None = None
    criterion: Criterion = "margin"
    refine: int | None = Field(default=None, ge=0)
    reference: Reference = "mean"
    search: Literal["one_shot", "iterative", "guarded", "learned"] = "learned"
    search_args: dict[str, Any] = Field(default_factory=dict)
    protect: dict[str, dict[str, Any]] = Field(default_factory=dict)
    protect_bound: float = Field(default=0.05, ge=0)
    batch_size: int = Field(default=50, ge=1)
    n_positions: int | None = Field(default=None, ge=0)
    seed: int = 0

    @field_validator("search_args")
    @classmethod
    def _check_search_args(cls, args: dict[str, Any], info: Any) -> dict[str, Any]:
        # ``info`` is pydantic's ValidationInfo, a protocol that cannot be checked at run time.
        return _valid_options(info.data["search"], args) if "search" in info.data else args

    @model_validator(mode="after")
    def _check_search(self) -> "EigenpruneConfig":
        if self.protect and "protect" not in inspect.signature(SEARCHES[self.search]).parameters:
            raise ValueError(f"search={self.search!r} cannot protect: use guarded or learned")
        if self.reference_code is not None and self.search != "one_shot":
            raise ValueError("reference_code goes with search='one_shot'")
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
            ValueError: an unknown key or a value out of range.
        """
        return cls.make(**read_yaml(path) | overrides)

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
    # The released code, all deviations on; its main script freezes 30 % of the keys.
    "reference_code": {
        "matrices": ["W_K"],
        "reference_code": {},
        "search": "one_shot",
        "search_args": {"fractions": [0.3], "or_nothing": False},
    },
}
_FINISHED = (
    "config.yaml",
    "before.parquet",
    "scores.parquet",
    "frozen.safetensors",
    "trace.parquet",
    "protected.parquet",
    "after.parquet",
    "metrics.json",
)
_STATE = "search.safetensors"  # of a search that is not done yet
# Given by the run itself, not by ``search_args``.
_GIVEN = {"protect", "choose", "batch_size", "seed", "checkpoint", "progress"}


def _valid_options(search: str, options: dict[str, Any]) -> dict[str, Any]:
    """A search's arguments in their types (YAML reads 1e-3 as text); an error names wrong ones."""
    parameters = inspect.signature(SEARCHES[search]).parameters.values()
    own = {
        p.name: (p.annotation, ... if p.default is p.empty else p.default)
        for p in parameters
        if p.kind is p.KEYWORD_ONLY and p.name not in _GIVEN
    }
    model = create_model(search, __config__=ConfigDict(extra="forbid"), **own)  # type: ignore[call-overload]
    try:
        valid = model(**options)
    except ValidationError as error:
        raise ValueError(f"{problems(error)} (arguments of {search}: {', '.join(own)})") from error
    found: dict[str, Any] = valid.model_dump(exclude_unset=True)
    return found


@dataclass(frozen=True)
class EigenpruneResult:
    """What a run found.

    Attributes:
        config: what it was run with.
        before, after: test split, unedited and frozen.
        comparison: the two, paired.
        scores: of every component on the train split.
        search: the components that were frozen, the trace of the search, and what it spared.
        seconds: per stage.
    """

    config: EigenpruneConfig
    before: Evaluation
    after: Evaluation
    comparison: Comparison
    scores: Scores
    search: SearchResult
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def frozen(self) -> FrozenSet:
        """The components that were frozen or attenuated."""
        return self.search.frozen

    def metrics(self) -> dict[str, Any]:
        """The content of ``metrics.json``."""
        source = self.scores.provenance
        return {
            "before": self.before.summary(),
            "after": self.after.summary(),
            "comparison": self.comparison.summary(),
            "frozen": {
                "components": len(self.frozen),
                "of": self.frozen.n_candidates,
                "fraction": self.frozen.fraction,
            },
            "search": {
                "method": self.search.method,
                "chosen": self.search.trace[self.search.trace["chosen"]].to_dict("records")[0],
                "protected": self.search.protected.to_dict("records"),
            },
            "seed": self.config.seed,
            "fingerprints": {
                "model": source.model_fingerprint,
                "train": source.task_hash,
                "test": self.before.provenance.task_hash,
            },
            "versions": versions(),
            "seconds": self.seconds,
        }

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{name}</td><td>{e.accuracy:.1%}</td><td>{e.interval[0]:.1%} … "
            f"{e.interval[1]:.1%}</td><td>{e.loss:.3f}</td></tr>"
            for name, e in (("before", self.before), ("after", self.after))
        )
        return (
            f"<p>{html.escape(f'{self.config.task} on {self.config.model}')}: "
            f"{len(self.frozen):,} of {self.frozen.n_candidates:,} components {self.frozen.edit} "
            f"({self.frozen.fraction:.2%}); "
            f"{self.before.n} test examples, McNemar p = {self.comparison.p_value:.2g}</p>"
            "<table><tr><th></th><th>accuracy</th><th>95 % interval</th>"
            f"<th>loss (nats)</th></tr>{rows}</table>"
        )


def run(
    config: EigenpruneConfig, out: str | os.PathLike[str] | None = None, *, progress: bool = True
) -> EigenpruneResult:
    """Load model and task as ``config`` says, then :func:`eigenprune`."""
    # The task first: it is cheap, and may be wrong.
    load_task(config.task, **{"seed": config.seed} | config.task_args)
    model = load_model(config.model, dtype=config.dtype, device=config.device)
    task = load_task(config.task, model.tokenizer, **{"seed": config.seed} | config.task_args)
    return eigenprune(model, task, config, out=out, progress=progress)


def eigenprune(
    model: TransformerBridge,
    task: Task,
    config: EigenpruneConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> EigenpruneResult:
    """Score on the train split, choose on validation, measure on test before and after.

    Args:
        model: in eval mode.
        task: its splits are used as they are; ``config.task`` only names it.
        config: options (default: :class:`EigenpruneConfig`'s).
        out: folder for the results. A folder with the same configuration is resumed.
        progress: show progress bars.

    Raises:
        ValueError: bad options or data; ``out`` holds a run with another configuration.
    """
    config = config or EigenpruneConfig()
    stages = _Stages(config, Path(out) if out is not None else None, model, task)
    before = stages.do(
        "before",
        "before.parquet",
        Evaluation.load,
        lambda: evaluate(model, task.test, batch_size=config.batch_size, progress=progress),
    )
    with _fine_tuned(model, task, config):
        return _edit(model, task, config, stages, before, progress)


@contextmanager
def _fine_tuned(model: TransformerBridge, task: Task, config: EigenpruneConfig) -> Iterator[None]:
    """The released code's optional epoch on all weights, taken back on leaving."""
    switches = config.reference_code
    if switches is None or not switches.finetune:
        yield
        return
    with finetuned(model, task.train, batch_size=switches.batch_size, seed=config.seed):
        yield


def _edit(
    model: TransformerBridge,
    task: Task,
    config: EigenpruneConfig,
    stages: "_Stages",
    before: Evaluation,
    progress: bool,
) -> EigenpruneResult:
    """Everything after the measurement of the unedited model."""
    scores = stages.do(
        "score",
        "scores.parquet",
        Scores.load,
        lambda: _score(model, task, config, stages, progress),
    )
    found = stages.do(
        "search",
        "",
        SearchResult.load,
        lambda: _search(model, task, config, scores, stages, progress),
    )
    if stages.out is not None:
        (stages.out / _STATE).unlink(missing_ok=True)
    frozen = found.frozen
    after = stages.do(
        "after",
        "after.parquet",
        Evaluation.load,
        lambda: _after(model, task, config, frozen, progress),
    )
    result = EigenpruneResult(
        config,
        before,
        after,
        compare(before, after, seed=config.seed),
        scores,
        found,
        stages.seconds,
    )
    if stages.out is not None:
        write_json(stages.out / "metrics.json", result.metrics())
        stages.write("spectrum.html", lambda path: spectrum(scores, frozen).write_html(path))
        stages.write("trace.html", lambda path: search_trace(found).write_html(path))
    return result


def _score(
    model: TransformerBridge,
    task: Task,
    config: EigenpruneConfig,
    stages: "_Stages",
    progress: bool,
) -> Scores:
    spectra = _spectra(model, config, stages, progress)
    if config.reference_code is not None:
        return score_like_reference(
            model, spectra, task.train, config.reference_code, seed=config.seed
        )
    scores = score(
        model,
        spectra,
        task.train,
        criterion=config.criterion,
        reference=config.reference,
        batch_size=config.batch_size,
        n_positions=config.n_positions,
        seed=config.seed,
        progress=progress,
    )
    count = config.refine
    if count is None:
        of_the_mean = config.criterion not in ("max", "ucb") and config.reference != "resample"
        count = REFINED if config.search == "one_shot" and of_the_mean else 0
    if count == 0:
        return scores
    examples = task.train.select(range(min(REFINED_EXAMPLES, len(task.train))))
    with stages.timed("refine"):
        return refined(
            model, scores, examples, count=count, batch_size=config.batch_size, progress=progress
        )


def _spectra(
    model: TransformerBridge, config: EigenpruneConfig, stages: "_Stages", progress: bool
) -> Spectra:
    with stages.timed("decompose"):
        return decompose(model, config.matrices, config.layers, progress=progress)


def _search(
    model: TransformerBridge,
    task: Task,
    config: EigenpruneConfig,
    scores: Scores,
    stages: "_Stages",
    progress: bool,
) -> SearchResult:
    if scores.spectra is None:  # read back from the run folder
        scores = replace(scores, spectra=_spectra(model, config, stages, progress))
    options: dict[str, Any] = {"batch_size": config.batch_size, **config.search_args}
    if config.search == "one_shot":
        if config.reference_code is not None:
            options["choose"] = partial(select_like_reference, switches=config.reference_code)
        return SEARCHES["one_shot"](model, scores, task.validation, **options)
    if "seed" in inspect.signature(SEARCHES[config.search]).parameters:
        options["seed"] = config.seed
    if config.protect:
        spared = {
            name: load_task(name, model.tokenizer, **{"seed": config.seed} | arguments)
            for name, arguments in config.protect.items()
        }
        options["protect"] = Protection(
            model,
            {name: task.validation for name, task in spared.items()},
            unseen={name: task.test for name, task in spared.items()},
            bound=config.protect_bound,
            batch_size=config.batch_size,
        )
    state = stages.out / _STATE if stages.out is not None else None
    return SEARCHES[config.search](
        model, scores, task.train, task.validation, checkpoint=state, progress=progress, **options
    )


def _after(
    model: TransformerBridge,
    task: Task,
    config: EigenpruneConfig,
    frozen: FrozenSet,
    progress: bool,
) -> Evaluation:
    with freeze(model, frozen):
        return evaluate(model, task.test, batch_size=config.batch_size, progress=progress)


def load_run(folder: str | os.PathLike[str]) -> tuple[EigenpruneResult, dict[str, Any]]:
    """A finished run, and the content of its ``metrics.json`` (versions, seconds, fingerprints).

    Raises:
        FileNotFoundError: the folder holds no finished run; the message says how to get one.
        FileFormatError: a file is truncated or foreign.
    """
    folder = Path(folder)
    missing = [name for name in _FINISHED if not (folder / name).is_file()]
    if "config.yaml" in missing:
        raise FileNotFoundError(
            f"{folder} is no run folder: it holds no config.yaml. `eigenlens run --out {folder}` "
            "makes a run there."
        )
    if missing:
        raise FileNotFoundError(
            f"The run in {folder} is not finished: {', '.join(missing)} is not there. "
            f"`eigenlens run --config {folder / 'config.yaml'} --out {folder}` goes on with it."
        )
    try:
        metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileFormatError(f"{folder / 'metrics.json'} is not valid JSON: {error}") from error
    config = EigenpruneConfig.from_yaml(folder / "config.yaml")
    before = Evaluation.load(folder / "before.parquet")
    after = Evaluation.load(folder / "after.parquet")
    result = EigenpruneResult(
        config,
        before,
        after,
        compare(before, after, seed=config.seed),
        Scores.load(folder / "scores.parquet"),
        SearchResult.load(folder),
        metrics["seconds"],
    )
    return result, metrics


class _Stages:
    """Runs stages, or reads back what an earlier run with this configuration wrote."""

    def __init__(
        self, config: EigenpruneConfig, out: Path | None, model: TransformerBridge, task: Task
    ) -> None:
        self.out = out
        self.seconds: dict[str, float] = {}
        self._fingerprint = Provenance.of(model).model_fingerprint
        if out is None:
            return
        identity = config.to_yaml() + f"# model {self._fingerprint}, task {task.hash}\n"
        file = out / "config.yaml"
        if file.is_file() and file.read_text(encoding="utf-8") != identity:
            raise ValueError(
                f"{out} holds a run with another configuration, model or task (see config.yaml "
                "there). Choose another folder, or delete that one."
            )
        write_text(file, identity)

    def do(self, name: str, file: str, load: Callable[[Path], T], make: Callable[[], T]) -> T:
        """Read ``file`` of the run folder if it is whole, else make the result and write it."""
        with self.timed(name):
            if self.out is not None:
                with suppress(FileNotFoundError, FileFormatError):  # absent or damaged: made anew
                    return load(self.out / file)
            made = make()
        self.write(file, made.save)  # type: ignore[attr-defined]
        return made

    def write(self, file: str, save: Callable[[Path], Any]) -> None:
        """Save into the run folder, where there is one."""
        if self.out is not None:
            save(self.out / file)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Record the seconds of a stage, without those of stages inside it."""
        start, inner = time.perf_counter(), sum(self.seconds.values())
        yield
        self.seconds[name] = time.perf_counter() - start - (sum(self.seconds.values()) - inner)
