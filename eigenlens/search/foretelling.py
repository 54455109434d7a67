"""How long a search will take, said once a few of its steps are measured."""

import math
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

MEASURED = 3  # steps, after a first one that also fills caches
_WORTH_SAYING = 60  # seconds


def foretold(
    bar: "tqdm[int]",
    *,
    resumable: bool,
    now: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] | None = None,
) -> Iterator[int]:
    """The steps of a progress bar; after a few, a line says how long the others will take.

    Nothing is said by a bar that is not shown, or where less than a minute is left. What is said is
    the most that it can take: a search may stop earlier.

    Args:
        bar: of the steps, of known length.
        resumable: whether a search that is interrupted goes on where it was.
        now: a clock, in seconds.
        say: shows the line; by default above the bar.
    """
    start = now()
    for done, step in enumerate(bar):
        if done == 1:
            start = now()
        if done == 1 + MEASURED and not bar.disable:
            line = prediction((now() - start) / MEASURED, len(bar) - done, resumable=resumable)
            if line:
                (say or _above)(line)
        yield step


def prediction(seconds: float, steps: int, *, resumable: bool) -> str:
    """A sentence on ``steps`` steps of ``seconds`` each; empty for less than a minute."""
    left = seconds * steps
    if left < _WORTH_SAYING:
        return ""
    minutes = math.ceil(left / 60)
    unit = "minute" if minutes == 1 else "minutes"
    line = f"At most about {minutes} {unit} on this machine ({seconds:.1f} s a step)"
    return f"{line}; Ctrl-C is safe, run again to go on." if resumable else f"{line}."


def _above(line: str) -> None:
    tqdm.write(line, file=sys.stderr)
