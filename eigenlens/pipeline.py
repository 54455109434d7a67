"""The whole job: load → decompose → score → select → freeze → evaluate before and after.

With ``out`` every stage is written as it ends; a run that was interrupted goes on from there, and a
finished one is read back. The folder's ``config.yaml`` alone reproduces the run.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.evaluation import Comparison, Evaluation, compare, evaluate
from eigenlens.files import FileFormatError, write_json, write_text
from eigenlens.freezing import FrozenSet, freeze
from eigenlens.models import load_model
from eigenlens.plots import spectrum
from eigenlens.provenance import Provenance, versions
from eigenlens.scoring import Criterion, Reference, Scores, score
from eigenlens.selection import Within, select
from eigenlens.spectra import decompose
from eigenlens.tasks import Task, load_task

T = TypeVar("T")


class EigenpruneConfig(BaseModel):
    """Everything that a run depends on. Unknown keys are refused.

    ``fraction`` may be a list: the best on the validation split is taken (highest exact-match
    accuracy, then lowest loss). ``seed`` is the seed of the task and of resampling.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "arith-tiny"
    dtype: str = "float32"
    device: str | None = None
    task: str = "ambiguous"
    task_args: dict[str, Any] = Field(default_factory=dict)
    matrices: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    criterion: Criterion = "margin"
    reference: Reference = "mean"
    fraction: tuple[float, ...] = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
    within: Within = "all"
    negative_only: bool = False
    batch_size: int = Field(default=50, ge=1)
    seed: int = 0

    @field_validator("fraction", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int | float) else value

    @field_validator("fraction")
    @classmethod
    def _in_range(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        outside = [f for f in value if not 0 <= f <= 1]
        if outside or not value:
            raise ValueError(f"fraction={outside} lies outside [0, 1]")
        return value

    @classmethod
    def make(cls, **values: Any) -> "EigenpruneConfig":
        """Like the constructor, with one readable ``ValueError`` for all that is wrong."""
        try:
            return cls(**values)
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            raise ValueError("The configuration is not valid. " + "; ".join(problems)) from error

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], **overrides: Any) -> "EigenpruneConfig":
        """Read a YAML file; ``overrides`` win.

        Raises:
            FileNotFoundError: there is no such file.
            FileFormatError: it is no YAML mapping.
            ValueError: an unknown key or a value out of range.
        """
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise FileFormatError(f"{path} is not valid YAML: {error}") from error
        if not isinstance(values, dict):
            raise FileFormatError(f"{path} does not hold a mapping of options to values.")
        return cls.make(**values | overrides)

    def to_yaml(self) -> str:
        """All values as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class EigenpruneResult:
    """What a run found.

    Attributes:
        config: what it was run with.
        before, after: test split, unedited and frozen.
        comparison: the two, paired.
        scores: of every component on the train split.
        frozen: the components that were frozen.
        choices: validation loss and accuracy of each fraction that was tried.
        seconds: per stage.
    """

    config: EigenpruneConfig
    before: Evaluation
    after: Evaluation
    comparison: Comparison
    scores: Scores
    frozen: FrozenSet
    choices: list[dict[str, float]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

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
            "choices": self.choices,
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
            f"<p>{self.config.task} on {self.config.model}: {len(self.frozen):,} of "
            f"{self.frozen.n_candidates:,} components frozen ({self.frozen.fraction:.2%}); "
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
    scores = stages.do(
        "score",
        "scores.parquet",
        Scores.load,
        lambda: _score(model, task, config, stages, progress),
    )
    with stages.timed("select"):
        frozen, choices = _choose(model, task, config, scores)
    stages.write("frozen.safetensors", frozen.save)
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
        frozen,
        choices,
        stages.seconds,
    )
    if stages.out is not None:
        write_json(stages.out / "metrics.json", result.metrics())
        stages.write("spectrum.html", lambda path: spectrum(scores, frozen).write_html(path))
    return result


def _score(
    model: TransformerBridge,
    task: Task,
    config: EigenpruneConfig,
    stages: "_Stages",
    progress: bool,
) -> Scores:
    with stages.timed("decompose"):
        spectra = decompose(model, config.matrices, config.layers, progress=progress)
    return score(
        model,
        spectra,
        task.train,
        criterion=config.criterion,
        reference=config.reference,
        batch_size=config.batch_size,
        seed=config.seed,
        progress=progress,
    )


def _choose(
    model: TransformerBridge, task: Task, config: EigenpruneConfig, scores: Scores
) -> tuple[FrozenSet, list[dict[str, float]]]:
    """The best fraction on the validation split, and what each reached there."""
    options = {"within": config.within, "negative_only": config.negative_only}
    sets = {f: select(scores, f, **options) for f in config.fraction}  # type: ignore[arg-type]
    if len(sets) == 1:
        return next(iter(sets.values())), []
    choices = []
    for fraction, frozen in sets.items():
        with freeze(model, frozen):
            found = evaluate(model, task.validation, batch_size=config.batch_size)
        choices.append({"fraction": fraction, "accuracy": found.accuracy, "loss": found.loss})
    best = min(choices, key=lambda choice: (-choice["accuracy"], choice["loss"]))
    return sets[best["fraction"]], choices


def _after(
    model: TransformerBridge,
    task: Task,
    config: EigenpruneConfig,
    frozen: FrozenSet,
    progress: bool,
) -> Evaluation:
    with freeze(model, frozen):
        return evaluate(model, task.test, batch_size=config.batch_size, progress=progress)


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
        """Read ``file`` if it is whole, else make the result and write it."""
        with self.timed(name):
            if self.out is not None and (self.out / file).is_file():
                try:
                    return load(self.out / file)
                except FileFormatError:
                    pass  # damaged: made anew
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
