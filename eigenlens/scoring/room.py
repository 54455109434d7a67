"""What scoring keeps in memory, whatever the number of examples, and whether there is room for it.

It is told before the first pass. Activations of a batch are no part of it: a batch that does not
fit is halved (:mod:`eigenlens.memory`), and what is kept cannot be.
"""

import sys

import psutil
import torch
from tqdm.auto import tqdm

from eigenlens.scoring.plan import Plan
from eigenlens.spectra import Spectra

_BY_POSITION = 4  # sums, their means, these as a table and by matrix
_BY_COMPONENT = 6  # sums over single effects
_WORTH_SAYING = 1e8  # bytes


def free_gb(spectra: Spectra) -> float:
    """Memory that is free where the directions are, in GB."""
    device = next(iter(spectra.values())).device
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0] / 1e9)
    return float(psutil.virtual_memory().available / 1e9)


def has_room(spectra: Spectra, memory_gb: float | None) -> bool:
    """Whether the sums of outer products of all matrices fit into ``memory_gb``."""
    needed = sum(s.site.n_heads * s.site.width**2 * s.dtype.itemsize for s in spectra.values())
    room = free_gb(spectra) / 4 if memory_gb is None else memory_gb
    return needed <= room * 1e9


def kept_bytes(spectra: Spectra, plan: Plan) -> int:
    """Bytes of means, by position, and of sums."""
    numbers = _BY_POSITION * (len(plan.positions) + 1) + _BY_COMPONENT
    return sum(s.sigma.numel() * numbers * s.dtype.itemsize for s in spectra.values())


def check_room(spectra: Spectra, plan: Plan, budget_gb: float | None, *, progress: bool) -> None:
    """Say what scoring keeps, if it is much.

    Raises:
        ValueError: it does not fit into the budget, which is by default what is free.
    """
    needed = kept_bytes(spectra, plan)
    room = free_gb(spectra) if budget_gb is None else budget_gb
    what = (
        f"Scoring keeps {needed / 1e9:.2g} GB beside model and directions (means of "
        f"{len(plan.positions) + 1:,} positions and sums of {spectra.n_components:,} components)"
    )
    if needed > room * 1e9:
        raise ValueError(
            f"{what}, and there is room for {room:.2g} GB: give fewer positions a mean of their "
            "own (n_positions=, --positions), one mean to all (reference='shared'), or score fewer "
            "matrices or layers."
        )
    if progress and needed >= _WORTH_SAYING:
        tqdm.write(f"{what}; {room:.2g} GB are free.", file=sys.stderr)
