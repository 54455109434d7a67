"""What does not fit into memory is done in halves, with a word about it.

Whatever was summed up to then is thrown away: half a sum cannot be told from a whole one. What a
model turned out to have room for is remembered, so that it is found once.
"""

import warnings
from collections.abc import Callable
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from accelerate.utils.memory import clear_device_cache
from torch import nn

T = TypeVar("T")
# Allocators of PyTorch that raise a plain RuntimeError.
_TOLD = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_fits: WeakKeyDictionary[nn.Module, dict[str, int]] = WeakKeyDictionary()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was not enough, on the CPU or on a device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(told in str(error) for told in _TOLD)


def fitting(
    model: nn.Module, what: str, size: int, run: Callable[[int], T], *, smallest: int = 1
) -> T:
    """``run(size)``, or with half as much at once, and half of that, until it fits.

    :func:`accelerate.utils.find_executable_batch_size` is this without ``MemoryError``, without a
    word, and without memory of what fitted.

    Args:
        model: whose pass it is.
        what: is done, for the message; one limit is remembered for each.
        size: how many examples or rows to do at once.
        run: does it from the beginning, with at most so many at once.
        smallest: fewest that can be done at once.

    Raises:
        MemoryError, RuntimeError: of ``run``, where the smallest size does not fit either.
    """
    limits = _fits.setdefault(model, {})
    size = min(size, max(smallest, limits.get(what, size)))
    while True:
        try:
            return run(size)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or size // 2 < smallest:
                raise
        # Here the error is gone, and with it the tensors that its frames held.
        clear_device_cache(garbage_collection=True)
        half = size // 2
        said = f"{what}: {size} at once do not fit into memory, going on with {half}."
        warnings.warn(said, stacklevel=3)
        size = half
        limits[what] = size
