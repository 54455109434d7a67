"""Stages of a run: each is written as it ends, and read back where an earlier run wrote it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from transformer_lens.model_bridge import TransformerBridge

from eigenlens.config import EigenpruneConfig
from eigenlens.files import FileFormatError, write_text
from eigenlens.leftovers import sweep
from eigenlens.provenance import Provenance
from eigenlens.tasks import Task

T = TypeVar("T")


class Stages:
    """Runs stages, or reads back what an earlier run with this configuration wrote."""

    def __init__(
        self, config: EigenpruneConfig, out: Path | None, model: TransformerBridge, task: Task
    ) -> None:
        self.out = out
        self.seconds: dict[str, float] = {}
        self._fingerprint = Provenance.of(model).model_fingerprint
        if out is None:
            return
        sweep(out)
        identity = config.to_yaml() + f"# model {self._fingerprint}, task {task.hash}\n"
        file = out / "config.yaml"
        if file.is_file() and file.read_bytes() != identity.encode():
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
