"""What a method costs, measured in the process that runs it.

Passes are counted where the logits are made: a forward pass is one batch through the unembedding, a
backward pass is one gradient that reaches the logits. Both are also counted in examples, since
batches differ in size. Memory is the resident memory of the process above that at the start,
sampled every five milliseconds; what an accelerator holds is not in it.
"""

import contextlib
import ctypes
import gc
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from eigenlens.bridges import TransformerBridge


@dataclass
class Cost:
    """The price of finding an edit, and the size of the edit.

    Attributes:
        seconds: wall-clock time.
        forward_passes, backward_passes: batches.
        forward_examples, backward_examples: the examples in them.
        peak_memory_mb: rise of the resident memory, in MB of 2²⁰ bytes.
        parameters_changed: numbers that the edit sets; see the edit for what they are.
        saved_bytes: size of its file.
    """

    seconds: float = 0.0
    forward_passes: int = 0
    forward_examples: int = 0
    backward_passes: int = 0
    backward_examples: int = 0
    peak_memory_mb: float = 0.0
    parameters_changed: int = 0
    saved_bytes: int = 0

    def summary(self) -> dict[str, float]:
        """The numbers by name."""
        return asdict(self)


@dataclass
class PeakMemory:
    """Rise of the resident memory, in MB; final when the block that measures it ends."""

    mb: float = 0.0


def now() -> float:
    """Seconds on a clock, read when an accelerator has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if torch.backends.mps.is_available():
        torch.mps.synchronize()
    return time.perf_counter()


@contextmanager
def measured(model: TransformerBridge) -> Iterator[Cost]:
    """Measure what the block does with ``model``; the cost is complete when the block ends."""
    cost = Cost()
    handle = model.unembed.register_forward_hook(_counter(cost))
    with peak_memory() as peak:
        start = now()
        try:
            yield cost
        finally:
            cost.seconds = now() - start
            handle.remove()
    cost.peak_memory_mb = peak.mb


def _counter(cost: Cost) -> Any:
    def on_backward(grad: Tensor) -> None:
        cost.backward_passes += 1
        cost.backward_examples += len(grad)

    def on_forward(module: nn.Module, args: Any, logits: Tensor) -> None:
        cost.forward_passes += 1
        cost.forward_examples += len(logits)
        if logits.requires_grad:
            logits.register_hook(on_backward)

    return on_forward


@contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Sample the resident memory of this process while the block runs."""
    give_memory_back()
    process = psutil.Process()
    before = highest = process.memory_info().rss
    done = threading.Event()

    def sample() -> None:
        nonlocal highest
        while not done.wait(0.005):
            highest = max(highest, process.memory_info().rss)

    peak = PeakMemory()
    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        highest = max(highest, process.memory_info().rss)
        peak.mb = (highest - before) / 2**20


def give_memory_back() -> None:
    """Return freed memory to the system, or the next job would reuse it unseen (glibc only)."""
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Return freed memory to the system that lies between what is kept (glibc only)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
