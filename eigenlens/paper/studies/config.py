"""What a study of methods runs: models, tasks, methods and seeds, from a YAML file.

The files that ship with the package are in ``studies/configs``; ``eigenlens experiment NAME
--config FILE`` runs another one.
"""

import os
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from eigenlens.baselines import Baseline, make_baseline
from eigenlens.errors import problems
from eigenlens.files import read_yaml
from eigenlens.frozen_set import FrozenSet
from eigenlens.tasks import TASKS

CONFIGS = Path(__file__).parent / "configs"
S = TypeVar("S", bound="StudyFile")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StudyFile(_Strict):
    """What a study runs, as a YAML file says."""

    @classmethod
    def read(cls: type[S], path: str | os.PathLike[str]) -> S:
        """Read a YAML file.

        Raises:
            FileNotFoundError: there is no such file.
            FileFormatError: it is no YAML mapping.
            ValueError: an unknown key, task or method, or a value that is not allowed.
        """
        try:
            return cls(**read_yaml(path))
        except ValidationError as error:
            raise ValueError(f"{path} is not a valid study. {problems(error)}") from error


class Data(_Strict):
    """A task, how much of it is run at a time, and on which models (default: all)."""

    task: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    batch_size: int = Field(default=50, ge=1)
    models: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _check(self) -> "Data":
        if self.task not in TASKS:
            raise ValueError(f"unknown task {self.task!r}; choose from {', '.join(TASKS)}")
        return self


class Setting(Data):
    """A task that methods are run on.

    Attributes:
        seeds: of the splits, in place of the study's.
        n_positions: as for :func:`eigenlens.score`; long prompts need few.
        methods: labels of the methods to run; default all.
        options: arguments of a method that are other than usual for this task, by label.
    """

    seeds: tuple[int, ...] | None = None
    n_positions: int | None = Field(default=None, ge=0)
    methods: tuple[str, ...] | None = None
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)


class Method(_Strict):
    """A way to change a model.

    Attributes:
        kind: key of :data:`eigenlens.baselines.KINDS`.
        arguments: of its constructor.
        matrices: decompose these kinds only.
        like: label of a method above whose frozen set this one is matched to or made from.
        draws: repetitions with random numbers of their own.
        models: run on these only.
    """

    kind: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    matrices: tuple[str, ...] | None = None
    like: str | None = None
    draws: int = Field(default=1, ge=1)
    models: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _check(self) -> "Method":
        make_baseline(self.kind, self.arguments)
        return self

    def build(self, options: dict[str, Any], like: FrozenSet | None) -> Baseline:
        """The method with the options of a task, and the frozen set that it is made like."""
        given = {"like": (like,)} if like is not None else {}
        return make_baseline(self.kind, {**_merged(self.arguments, options), **given})


def _merged(arguments: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """``options`` win; those of a search are merged one by one."""
    inner = {**arguments.get("options", {}), **options.get("options", {})}
    return {**arguments, **options, **({"options": inner} if inner else {})}


class TasksConfig(StudyFile):
    """A study of tasks with measurements of its own.

    Attributes:
        models: names for :func:`eigenlens.load_model`.
        tasks: by the labels that the page shows.
        seeds: of the splits.
    """

    models: tuple[str, ...] = Field(min_length=1)
    tasks: dict[str, Data] = Field(min_length=1)
    seeds: tuple[int, ...] = (0,)


class StudyConfig(StudyFile):
    """A study: every method on every task of every model, with every seed.

    Attributes:
        models: names for :func:`eigenlens.load_model`.
        tasks, methods: by the labels that tables and figures show.
        seeds: of the splits and of the methods.
        probes: data on which each edit is measured besides its own task's test split.
        share_scores: methods use each other's scores, which saves time where what a method costs
            is not the question.
    """

    models: tuple[str, ...] = Field(min_length=1)
    tasks: dict[str, Setting] = Field(min_length=1)
    methods: dict[str, Method] = Field(min_length=1)
    seeds: tuple[int, ...] = (0,)
    probes: dict[str, Data] = Field(default_factory=dict)
    share_scores: bool = False

    @model_validator(mode="after")
    def _check_labels(self) -> "StudyConfig":
        labels = list(self.methods)
        for label, method in self.methods.items():
            if method.like is not None and method.like not in labels[: labels.index(label)]:
                raise ValueError(f"{label}: like={method.like!r} is no method above it")
        for name, task in self.tasks.items():
            unknown = {*(task.methods or ()), *task.options} - set(labels)
            if unknown:
                raise ValueError(f"{name}: unknown methods {', '.join(sorted(unknown))}")
            for label, options in task.options.items():
                method = self.methods[label]
                make_baseline(method.kind, _merged(method.arguments, options))
        return self

    def of_models(self, models: tuple[str, ...]) -> "StudyConfig":
        """The same study with these models in place of its own."""
        return self.model_copy(update={"models": models})
