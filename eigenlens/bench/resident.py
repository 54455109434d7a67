"""The resident memory of this process: now, and at its highest since it was last asked to forget.

On Linux the system keeps the highest value itself and forgets it on request, so that nothing
between two samples is missed. Elsewhere it is the highest of the whole process.
"""

import re
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from eigenlens.costs import give_memory_back

_SELF = Path("/proc/self")


def forget_peak() -> int:
    """Begin to look for the highest value anew; returns what is resident now, in bytes."""
    give_memory_back()
    with suppress(OSError):
        (_SELF / "clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return int(psutil.Process().memory_info().rss)


def peak() -> int:
    """Highest resident memory since :func:`forget_peak`, in bytes."""
    status = _SELF / "status"
    if status.is_file():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # not there on Windows

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def device_peak() -> int:
    """Highest memory that tensors had on GPUs since :func:`forget_peak`, in bytes; 0 without."""
    return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
