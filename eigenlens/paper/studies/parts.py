"""Finished parts of an experiment on disk: how an interrupted one goes on."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from transformer_lens.model_bridge import TransformerBridge

from eigenlens.files import FileFormatError, load_record, save_record
from eigenlens.identity import conditions, identity_hash
from eigenlens.locks import in_turn
from eigenlens.models import load_model
from eigenlens.tasks import Task


@runtime_checkable
class _OfModel(Protocol):
    @property
    def model(self) -> str: ...


S = TypeVar("S", bound=_OfModel)


class Parts:
    """Finished parts of an experiment, one JSON file each; a part that is there is not made again.

    A part belongs to its key alone, which therefore holds all that it depends on. Where another
    process is making it, it is waited for.
    """

    def __init__(self, folder: Path | None) -> None:
        """Keep parts in ``folder``, or nowhere."""
        self._folder = folder

    def has(self, key: str) -> bool:
        """Whether a part is there, whole."""
        with suppress(FileNotFoundError, FileFormatError):
            return self._folder is not None and _rows(self._folder / f"{key}.json") is not None
        return False

    def do(self, key: str, make: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """The rows of a part: read back, or made and written; a damaged one is made again."""
        if self._folder is None:
            return make()
        path = self._folder / f"{key}.json"
        with suppress(FileNotFoundError, FileFormatError):
            return _rows(path)
        with in_turn(path):
            with suppress(FileNotFoundError, FileFormatError):  # made by another process meanwhile
                return _rows(path)
            save_record(path, "part", {"rows": make()})
        return _rows(path)


def _rows(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = load_record(path, "part")["rows"]
    return rows


def part_key(
    model: TransformerBridge, name: str, task: Task, options: Mapping[str, Any], *more: object
) -> str:
    """Name of a part, safe as a file name: readable, and unique by all that the part depends on.

    Args:
        model: as it is loaded.
        name: of the model.
        task: its examples count.
        options: all that was chosen, defaults among it.
        *more: what to read in the name.
    """
    unique = identity_hash(conditions(model), task.hash, options, more)
    parts = [Path(name).stem, task.name, *map(str, more), unique]
    return re.sub(r"[^\w.+_-]+", "-", "_".join(parts)).lstrip(".")


def with_models(
    settings: Iterable[S], models: Iterable[str]
) -> Iterator[tuple[S, TransformerBridge]]:
    """Settings of these models with the model of each, which is loaded once, on the CPU."""
    for name in models:
        own = [setting for setting in settings if setting.model == name]
        loaded = load_model(name, device="cpu") if own else None
        for setting in own:
            assert loaded is not None
            yield setting, loaded
