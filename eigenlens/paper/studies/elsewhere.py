"""The cells of a study on other processes and machines (:class:`eigenlens.Cluster`).

Each cell is a task: a study of that cell alone, in a folder of its own over there, whose files come
back to the folder of finished parts here. Then the study goes on as always, and finds them. A
process that is lost loses its own cell, which another one makes again; who is interrupted here
finds what had come back.
"""

import inspect
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from eigenlens.distributed import Cluster, Task
from eigenlens.files import atomic_path
from eigenlens.paper.studies import EXPERIMENTS
from eigenlens.paper.studies.config import CONFIGS, StudyConfig
from eigenlens.paper.studies.grid import Bench, Cell, cells, grid_study, run_grid
from eigenlens.paper.studies.parts import Parts
from eigenlens.paper.studies.peers import PeersConfig

_BY_MODEL = ("estimators", "peers", "searches")  # whose parts are not cells of a grid
_KEPT = (".json", ".safetensors")
Files = dict[str, bytes]  # by name


def make_cells(
    config: StudyConfig, folder: Path, cluster: Cluster, *, progress: bool = True
) -> None:
    """Make what is missing of the cells of a study.

    Args:
        config: the study.
        folder: that keeps finished cells.
        cluster: where to make them.
        progress: show a bar of finished cells.

    Raises:
        FailedTaskError: a cell cannot be made; names it. All others that do not depend on it are
            made first.
        LostTaskError: a cell's process or machine was lost again and again.
        ValueError: a cell is another one over there.
    """
    bench = Bench(Parts(folder), folder, config.share_scores)
    folder.mkdir(parents=True, exist_ok=True)
    groups = _draws(config)
    for depth in range(1 + max((_depth(draws[0]) for draws in groups), default=0)):
        missing = [
            draws for draws in groups if _depth(draws[0]) == depth and bench.lacks(draws, config)
        ]
        tasks = [
            Task(
                f"{cell.label}, {cell.name}, seed {cell.seed} ({cell.key})",
                _made,
                (only(config, cell), _files_of(bench, cell.parent, folder)),
            )
            for cell, *_ in missing
        ]
        for number, files in cluster.results(
            tasks, name="cells", unit="cell", progress=progress, keep_going=True
        ):
            _take(files, folder)
            if bench.lacks(missing[number], config):
                raise ValueError(
                    f"{tasks[number].key} came back as another cell: the workers have other "
                    "weights, data, devices or another version of eigenlens."
                )


def _draws(config: StudyConfig) -> list[list[Cell]]:
    """All cells, the draws of each together, and those that others are made like first."""
    found: dict[tuple[str, str, int, str], list[Cell]] = {}
    for cell in cells(config):
        found.setdefault((cell.model, cell.label, cell.seed, cell.name), []).append(cell)
    return list(found.values())


def _depth(cell: Cell) -> int:
    """How many cells have to be made before this one."""
    return 0 if cell.parent is None else 1 + _depth(cell.parent)


def only(config: StudyConfig, cell: Cell) -> StudyConfig:
    """The study of one cell with all its draws, and of those that it is made like."""
    methods = {cell.name: cell.method}
    parent = cell.parent
    while parent is not None:
        methods = {parent.name: parent.method.model_copy(update={"draws": 1}), **methods}
        parent = parent.parent
    setting = cell.setting.model_copy(update={"seeds": None})
    return config.model_copy(
        update={
            "models": (cell.model,),
            "tasks": {cell.label: setting},
            "methods": methods,
            "seeds": (cell.seed,),
        }
    )


def _files_of(bench: Bench, cell: Cell | None, folder: Path) -> Files:
    """What lies in the folder of a cell, and of those that it is made like."""
    found: Files = {}
    while cell is not None:
        for path in folder.glob(f"{bench.file(cell)}*"):
            if path.suffix in _KEPT:
                found[path.name] = path.read_bytes()
        cell = cell.parent
    return found


def _made(config: StudyConfig, given: Files) -> Files:
    """Over there: make these cells, and give back their files."""
    with TemporaryDirectory(prefix="eigenlens-cell-") as place:
        folder = Path(place)
        _take(given, folder)
        run_grid(config, folder)
        return _new(folder, given)


def _take(files: Files, folder: Path) -> None:
    for name, content in files.items():
        with atomic_path(folder / Path(name).name) as path:
            path.write_bytes(content)


def _new(folder: Path, given: Files) -> Files:
    made = (p for p in folder.iterdir() if p.suffix in _KEPT and p.name not in given)
    return {path.name: path.read_bytes() for path in made}


def make_parts(
    name: str, folder: Path, models: tuple[str, ...] | None, config: Path | None, cluster: Cluster
) -> None:
    """Make what is missing of the parts of a study.

    Args:
        name: of the study.
        folder: of its parts; cells of grids lie beside it.
        models: in place of the study's own.
        config: YAML file in place of the study's own.
        cluster: where to make them.

    Raises:
        FailedTaskError, LostTaskError, ValueError: as for :func:`make_cells`; a study that is of
            one piece.
    """
    run = EXPERIMENTS[name].run
    if run.__module__ == grid_study.__module__:
        read = StudyConfig.read(config or CONFIGS / f"{name}.yaml")
        make_cells(read.of_models(models) if models else read, folder.parent / "cells", cluster)
        return
    if name not in _BY_MODEL:
        raise ValueError(f"The experiment {name!r} is of one piece: drop --ray.")
    if models is None:
        own = inspect.signature(run).parameters["models"].default
        models = own or PeersConfig.read(config or CONFIGS / f"{name}.yaml").models
    text = None if config is None else config.read_text(encoding="utf-8")
    given = {path.name: path.read_bytes() for path in folder.glob("*.json")}
    tasks = [Task(f"{name} on {model}", _made_of, (name, model, text, given)) for model in models]
    for _, files in cluster.results(tasks, name=name, unit="model", progress=True, keep_going=True):
        _take(files, folder)


def _made_of(name: str, model: str, config: str | None, given: Files) -> Files:
    """Over there: make the parts of a study that are of a model, and give back their files."""
    with TemporaryDirectory(prefix="eigenlens-cell-") as place:
        folder = Path(place) / name
        _take(given, folder)
        options: dict[str, Any] = {"models": (model,), "parts": folder}
        if config is not None:
            options["config"] = Path(place) / "config.yaml"
            options["config"].write_text(config, encoding="utf-8")
        EXPERIMENTS[name].run(**options)
        return _new(folder, given)
