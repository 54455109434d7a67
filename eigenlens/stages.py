"""Stages of a run: each is written as it ends, and read back where an earlier run wrote it."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from transformer_lens.model_bridge import TransformerBridge

from eigenlens.config import EigenpruneConfig, search_options
from eigenlens.files import FileFormatError, write_text
from eigenlens.identity import conditions, defaults
from eigenlens.refinement import REFINED, REFINED_EXAMPLES
from eigenlens.scoring import score
from eigenlens.scoring.plan import N_POSITIONS
from eigenlens.scoring.shards import Shards
from eigenlens.search import Protection
from eigenlens.tasks import Task
from eigenlens.tasks.own_text import own_text

_DEPENDS = "# depends on "
T = TypeVar("T")


class Stages:
    """Runs stages, or reads back what an earlier run with this configuration wrote.

    ``config.yaml`` ends with a comment that says what else the results depend on: a run under other
    conditions is refused by name.
    """

    def __init__(
        self,
        config: EigenpruneConfig,
        out: Path | None,
        model: TransformerBridge,
        task: Task,
        shards: int | Shards = 1,
    ) -> None:
        """``shards`` are those of :func:`eigenlens.score`, on which no result depends."""
        self.out = out
        self.shards = shards
        self.seconds: dict[str, float] = {}
        if out is None:
            return
        file, said = out / "config.yaml", config.to_yaml()
        depends = {**conditions(model), "task": task.hash, **_defaults(config)}
        depends = json.loads(json.dumps(depends, default=str))
        if file.is_file():
            _check_same(out, file.read_text(encoding="utf-8", errors="replace"), said, depends)
        write_text(file, f"{said}{_DEPENDS}{json.dumps(depends, ensure_ascii=False)}\n")

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


def _defaults(config: EigenpruneConfig) -> dict[str, Any]:
    """All options of the stages, those that the configuration does not spell out among them."""
    chosen = search_options(config.search)(**config.search_args)
    return {
        "search": chosen.model_dump(mode="json"),
        "score": {
            **{k: v for k, v in defaults(score).items() if k != "shards"},
            "positions": N_POSITIONS,
        },
        "refine": [REFINED, REFINED_EXAMPLES],
        "protect": {**defaults(own_text), **defaults(Protection)},
    }


def _check_same(out: Path, found: str, said: str, depends: dict[str, Any]) -> None:
    """Raise where a folder holds a run of something else; says of what."""
    before, mark, rest = found.partition(_DEPENDS)
    if before != said or not mark:
        what = "configuration (see config.yaml there)"
    else:
        known = json.loads(rest)
        if known == depends:
            return
        changed = [name for name in depends if known.get(name) != depends[name]]
        what = f"{', '.join(changed)} (see the end of config.yaml there)"
    raise ValueError(
        f"{out} holds a run with another {what}. Choose another folder, or delete that one."
    )
