"""Runs every method on every task of every model: one *cell* each, kept when it is done.

A cell is a fit on the train split, with choices made on validation, and one measurement on test.
Its file is named by a hash of all that it depends on (the cell of the study, defaults of its method
included, and the model and data as they were loaded), so that studies share cells; beside it lies
the edit itself, for what is measured later under it.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, is_dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.baselines import Edit, FitResult, FrozenEdit, load_edit, measure
from eigenlens.baselines.baseline import Baseline
from eigenlens.decomposition import decompose
from eigenlens.evaluation import Evaluation, majority_accuracy, preference
from eigenlens.files import FileFormatError
from eigenlens.frozen_set import FrozenSet
from eigenlens.identity import conditions, defaults, identity_hash
from eigenlens.models import load_model
from eigenlens.monitors import output_statistics
from eigenlens.paper.studies.config import CONFIGS, Data, Method, Setting, StudyConfig
from eigenlens.paper.studies.parts import Parts
from eigenlens.paper.studies.repetitions import prompts_column
from eigenlens.paper.studies.result import ExperimentResult
from eigenlens.paper.studies.study import Study, shown
from eigenlens.scoring import Scores
from eigenlens.search import LearnedConfig
from eigenlens.spectra import Spectra
from eigenlens.tasks import Task, load_task
from eigenlens.tasks.candidates import candidates_of

_SEEDS_PER_DRAW = 1000  # seeds of two draws never meet


@dataclass(frozen=True)
class Cell:
    """One method on one task of one model."""

    model: str
    label: str
    setting: Setting
    name: str
    method: Method
    seed: int
    draw: int
    parent: "Cell | None" = None

    @property
    def key(self) -> str:
        """Readable, and unique by all that the study says of it, defaults included."""
        described = {
            "model": self.model,
            "task": self.setting.task,
            "arguments": self.setting.arguments,
            "batch_size": self.setting.batch_size,
            "n_positions": self.setting.n_positions,
            "method": self.method.model_dump(mode="json", exclude={"draws", "models", "like"}),
            "options": self.options,
            "defaults": _defaults(self.method.build(self.options, None)),
            "seed": self.seed,
            "draw": self.draw,
            "parent": self.parent.key if self.parent else None,
        }
        unique = identity_hash(described)
        return f"{Path(self.model).stem}_{self.setting.task}_{self.method.kind}_{unique}"

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the method that belong to this task."""
        return self.setting.options.get(self.name, {})


def _defaults(baseline: Baseline) -> dict[str, Any]:
    """All options of a method, and of the search inside it."""
    found: dict[str, Any] = {"method": asdict(baseline) if is_dataclass(baseline) else {}}
    return {**found, "learned": defaults(LearnedConfig)} if "options" in found["method"] else found


def cells(config: StudyConfig) -> Iterator[Cell]:
    """All cells of a study, those that others are made like first."""
    for model in config.models:
        for label, setting in config.tasks.items():
            if setting.models is not None and model not in setting.models:
                continue
            for seed in config.seeds if setting.seeds is None else setting.seeds:
                made: dict[str, Cell] = {}
                for name, method in config.methods.items():
                    if setting.methods is not None and name not in setting.methods:
                        continue
                    if method.models is not None and model not in method.models:
                        continue
                    parent = _parent(name, method, made)
                    for draw in range(method.draws):
                        cell = Cell(model, label, setting, name, method, seed, draw, parent)
                        made.setdefault(name, cell)
                        yield cell


def _parent(name: str, method: Method, made: dict[str, Cell]) -> Cell | None:
    if method.like is None:
        return None
    if method.like not in made:
        raise ValueError(f"{name} is made like {method.like!r}, which does not run where it does.")
    return made[method.like]


def run_grid(config: StudyConfig, parts: Path | None = None) -> pd.DataFrame:
    """Measure every cell, and every probe under its edit.

    Args:
        config: the study.
        parts: folder that keeps finished cells, to go on after an interruption.

    Returns:
        One row per cell and measured data: ``model, label, seed, method, draw, cell``, then
        ``prompts``, ``data`` (empty for the cell's own test split), its ``task``, ``right, n, loss,
        choice_right`` and what the method cost.

    Raises:
        ValueError: no task of the study is for its models.
    """
    planned = list(cells(config))
    if not planned:
        raise ValueError(f"No task of this study is for {', '.join(config.models)}.")
    bench = Bench(Parts(parts), parts, config.share_scores)
    rows: list[dict[str, Any]] = []
    bar = tqdm(planned, desc="cells", unit="cell")
    for cell in bar:
        bar.set_postfix_str(f"{cell.model}, {cell.label}, {cell.name}")
        rows += bench.rows(cell)
        for label, probe in _probes(config, cell).items():
            rows += bench.probe(cell, label, probe)
    return pd.DataFrame(rows)


def _probes(config: StudyConfig, cell: Cell) -> dict[str, Data]:
    """What the edit of a cell is measured on besides."""
    every = config.probes.items()
    return {k: probe for k, probe in every if probe.models is None or cell.model in probe.models}


class Bench:
    """Fits cells; keeps one model at a time, and what was derived from it."""

    def __init__(self, parts: Parts, folder: Path | None, share_scores: bool) -> None:
        self._parts = parts
        self._share_scores = share_scores
        self._folder = folder
        self._edits: dict[str, Edit] = {}
        self._loaded: Loaded | None = None
        self._scored: tuple[Any, ...] = ()
        self._scores: dict[str, Scores] = {}

    def rows(self, cell: Cell) -> list[dict[str, Any]]:
        found = self._parts.do(self.file(cell), partial(self._fit, cell))
        tested = self.loaded(cell.model).task(cell.setting, cell.seed).test
        names = {**self._names(cell), "prompts": prompts_column(tested)}
        return [{**names, **row} for row in found]

    def probe(self, cell: Cell, label: str, probe: Data) -> list[dict[str, Any]]:
        found = self._parts.do(self._probe_file(cell, probe), partial(self._probe, cell, probe))
        tested = self.loaded(cell.model).task(probe, cell.seed).test
        names = {**self._names(cell), "prompts": prompts_column(tested)}
        return [{**names, "data": label, **row} for row in found]

    def file(self, cell: Cell) -> str:
        """Name of a cell's files."""
        loaded = self.loaded(cell.model)
        unique = identity_hash(loaded.conditions, loaded.task(cell.setting, cell.seed).hash)
        return f"{cell.key}-{unique}"

    def _probe_file(self, cell: Cell, probe: Data) -> str:
        data = self.loaded(cell.model).task(probe, cell.seed).hash
        unique = identity_hash(probe.model_dump(mode="json", exclude={"models"}), cell.seed, data)
        return f"{self.file(cell)}_on_{probe.task}_{unique}"

    def lacks(self, own: Iterable[Cell], config: StudyConfig) -> bool:
        """Whether a file of one of these cells, or of what is measured under it, is not there."""
        return not all(
            self._parts.has(name)
            for cell in own
            for name in (
                self.file(cell),
                *(self._probe_file(cell, probe) for probe in _probes(config, cell).values()),
            )
        )

    def _names(self, cell: Cell) -> dict[str, Any]:
        return {
            "model": cell.model,
            "label": cell.label,
            "seed": cell.seed,
            "method": cell.name,
            "draw": cell.draw,
            "cell": self.file(cell),
        }

    def _fit(self, cell: Cell) -> list[dict[str, Any]]:
        loaded = self.loaded(cell.model)
        task = loaded.task(cell.setting, cell.seed)
        spectra = loaded.spectra
        if cell.method.matrices is not None:
            spectra = spectra.select(matrices=cell.method.matrices)
        method = cell.method.build(
            cell.options, None if cell.parent is None else self.frozen(cell.parent)
        )
        shared = self._shared_scores(cell)
        fit = partial(
            method.fit,
            loaded.model,
            spectra,
            task,
            batch_size=cell.setting.batch_size,
            n_positions=cell.setting.n_positions,
            shared=shared,
        )
        if cell.draw and not shared:
            # The first draw, which pays for the scores, was made by a process that is gone: what
            # this draw costs must not depend on that.
            fit(seed=cell.seed)
        found = fit(seed=cell.seed + _SEEDS_PER_DRAW * cell.draw)
        self._keep(cell, found.edit)
        test = measure(loaded.model, task.test, found.edit, batch_size=cell.setting.batch_size)
        return [{"data": "", "task": cell.setting.task, **_measured(test), **_found(found, task)}]

    def _probe(self, cell: Cell, probe: Data) -> list[dict[str, Any]]:
        loaded = self.loaded(cell.model)
        data = loaded.task(probe, cell.seed).test
        edit = self._edit(cell)
        test = measure(loaded.model, data, edit, batch_size=probe.batch_size)
        with edit.applied(loaded.model):
            put = edit.transform(data)
            statistics = output_statistics(loaded.model, put, batch_size=probe.batch_size)
        # Of single answer words a perplexity says little.
        text = None if any(candidates_of(data)) else test.perplexity
        return [{"task": probe.task, **_measured(test), **statistics.summary(), "perplexity": text}]

    def _shared_scores(self, cell: Cell) -> dict[str, Scores]:
        """One dictionary for all draws of a method, which differ in their seed only, or for all
        methods that score the same components on the same examples."""
        scored: tuple[Any, ...] = (cell.model, cell.label, cell.seed, cell.method.matrices)
        if not self._share_scores:
            scored = (*scored, cell.name)
        if self._scored != scored:
            self._scored, self._scores = scored, {}
        return self._scores

    def _keep(self, cell: Cell, edit: Edit) -> None:
        if self._folder is None:
            self._edits[cell.key] = edit
        else:
            edit.save(self._folder / f"{self.file(cell)}.safetensors")

    def _edit(self, cell: Cell) -> Edit:
        """The edit of a cell, which is fitted first if it has to be."""
        self.rows(cell)
        if self._folder is None:
            return self._edits[cell.key]
        path = self._folder / f"{self.file(cell)}.safetensors"
        with suppress(FileNotFoundError, FileFormatError):
            return load_edit(path)
        self._fit(cell)  # the edit was lost or damaged after its cell was done
        return load_edit(path)

    def frozen(self, cell: Cell) -> FrozenSet:
        """What a cell freezes.

        Raises:
            ValueError: its method freezes nothing.
        """
        edit = self._edit(cell)
        if not isinstance(edit, FrozenEdit):
            raise ValueError(f"{cell.name} freezes nothing: nothing can be made like it.")
        return edit.frozen

    def loaded(self, name: str) -> "Loaded":
        """The model of that name, in place of the one before."""
        if self._loaded is None or self._loaded.name != name:
            self._loaded = Loaded(name)
        return self._loaded


class Loaded:
    """A model with its decomposition."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.model: TransformerBridge = load_model(name)
        self.conditions = conditions(self.model)
        self._tasks: dict[str, Task] = {}

    @cached_property
    def spectra(self) -> Spectra:
        return decompose(self.model, progress=False)

    def task(self, data: Data, seed: int) -> Task:
        """The task with this seed, unless its arguments name another."""
        arguments = {"seed": seed, **data.arguments}
        key = identity_hash(data.task, arguments)
        if key not in self._tasks:
            self._tasks[key] = load_task(data.task, self.model.tokenizer, **arguments)
        return self._tasks[key]


def _measured(test: Evaluation) -> dict[str, Any]:
    every = test.choice_n == test.n  # shares of a part of the examples cannot be added up with n
    return {
        "right": int(test.examples["correct"].sum()),
        "n": test.n,
        "loss": test.loss,
        "choice_right": int(test.examples["choice_correct"].sum()) if every else None,
        # lets two cells be compared example by example
        "correct": "".join("01"[int(value)] for value in test.examples["correct"]),
    }


def _found(found: FitResult, task: Task) -> dict[str, Any]:
    """What was chosen, and at what cost."""
    frozen = found.edit.frozen if isinstance(found.edit, FrozenEdit) else None
    ranks = [preference(*row) for row in found.trace[["accuracy", "loss"]].to_numpy()]
    best = found.trace.iloc[ranks.index(max(ranks))]
    return {
        "validation_accuracy": found.validation.accuracy,
        "candidates": len(found.trace),
        "chosen": json.dumps({str(k): v for k, v in best.items()}, default=float),
        "components": None if frozen is None else len(frozen),
        "share": None if frozen is None else frozen.fraction,
        "majority": majority_accuracy(task.train, task.test),
        **found.cost.summary(),
    }


def grid_study(
    module: str, measured: Callable[[StudyConfig, Path | None], pd.DataFrame] = run_grid
) -> Callable[..., ExperimentResult]:
    """The ``run`` of a study of this kind, whose module says how to show what was measured.

    Args:
        module: ``__name__`` of the study; ``configs`` has a file of the same name, with dashes.
        measured: makes the table of a study, whose cells are kept in a folder.
    """
    name = module.rpartition(".")[2].replace("_", "-")

    def run(
        models: tuple[str, ...] | None = None,
        config: Path | None = None,
        parts: Path | None = None,
    ) -> ExperimentResult:
        """Run the study's own YAML file, or ``config``.

        Args:
            models: in place of the file's.
            config: YAML file in place of the study's own.
            parts: folder of this study's parts; cells lie beside it, where all studies find them.
        """
        study: Study = sys.modules[module]  # whole by the time that it runs
        read = StudyConfig.read(config or CONFIGS / f"{name}.yaml")
        read = read.of_models(models) if models else read
        table = measured(read, parts.parent / "cells" if parts is not None else None)
        settings = {"models": ", ".join(read.models), "seeds": ", ".join(map(str, read.seeds))}
        return shown(study, name, table, settings)

    return run
