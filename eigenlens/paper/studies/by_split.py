"""A study of tasks with measurements of its own: what it measures on every split, part by part."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.paper.studies.config import CONFIGS, Data, TasksConfig
from eigenlens.paper.studies.parts import Parts, part_key, with_models
from eigenlens.paper.studies.result import ExperimentResult
from eigenlens.paper.studies.study import Study, shown
from eigenlens.tasks import Task, load_task

Rows = list[dict[str, Any]]
C = TypeVar("C", bound=TasksConfig)


class Split(NamedTuple):
    """One split of a task of a study, with the model that it is read by."""

    loaded: TransformerBridge
    task: Task
    model: str
    label: str
    setting: Data
    seed: int

    @property
    def names(self) -> dict[str, Any]:
        """What its rows begin with."""
        return {"model": self.model, "label": self.label, "seed": self.seed}


@dataclass(frozen=True)
class _Place:
    model: str
    label: str
    setting: Data


@dataclass(frozen=True)
class Measurement:
    """One part of what is measured on a split.

    Attributes:
        make: its rows.
        options: all that they depend on besides the split.
        what: tells it from other parts of the split, to be read in its name.
        names: what its rows begin with, after those of the split.
    """

    make: Callable[[], Rows]
    options: Mapping[str, Any]
    what: tuple[str, ...] = ()
    names: Mapping[str, Any] = field(default_factory=dict)


def study_by_split(
    module: str,
    config_type: type[C],
    measurements: Callable[[Split, C], Iterable[Measurement]],
    settings: Mapping[str, str],
) -> Callable[..., ExperimentResult]:
    """The ``run`` of a study of this kind, whose module says how to show what was measured.

    Args:
        module: ``__name__`` of the study; ``configs`` has a file of the same name.
        config_type: what that file holds.
        measurements: the parts of a split, in the order of the table.
        settings: what the page names besides models and seeds: attributes of the file by their
            names there.
    """
    name = module.rpartition(".")[2]

    def run(
        models: tuple[str, ...] | None = None,
        config: Path | None = None,
        parts: Path | None = None,
    ) -> ExperimentResult:
        """Run the study's own YAML file, or ``config``.

        Args:
            models: in place of the file's.
            config: YAML file in place of the study's own.
            parts: folder that keeps finished parts.
        """
        study: Study = sys.modules[module]  # whole by the time that it runs
        read = config_type.read(config or CONFIGS / f"{name}.yaml")
        kept, rows = Parts(parts), []
        for split in splits(read, models):
            for part in measurements(split, read):
                key = part_key(
                    split.loaded, split.model, split.task, part.options, split.seed, *part.what
                )
                made = kept.do(key, part.make)
                rows += [{**split.names, **part.names, **row} for row in made]
        told = {"models": models or read.models, "seeds": read.seeds}
        told |= {label: getattr(read, attribute) for label, attribute in settings.items()}
        return shown(study, name, pd.DataFrame(rows), told)

    return run


def splits(study: TasksConfig, models: tuple[str, ...] | None) -> Iterator[Split]:
    """Every split of every task, models one after the other.

    Args:
        study: what its file says.
        models: in place of the file's.

    Raises:
        ValueError: no task of the study is of these models.
    """
    names = models or study.models
    places = [
        _Place(name, label, setting)
        for name in names
        for label, setting in study.tasks.items()
        if setting.models is None or name in setting.models
    ]
    if not places:
        raise ValueError(f"No task of this study is of {', '.join(names)}.")
    for place, loaded in with_models(places, names):
        for seed in study.seeds:
            arguments = {"seed": seed, **place.setting.arguments}
            task = load_task(place.setting.task, loaded.tokenizer, **arguments)
            yield Split(loaded, task, place.model, place.label, place.setting, seed)
