"""How a kind of file is written, read, and judged when it was damaged."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import eigenlens as el
from eigenlens.files import FileFormatError


@dataclass(frozen=True)
class Sample:
    """Results of a tiny model."""

    model: Any
    scores: el.Scores
    frozen: el.FrozenSet
    change: el.ActivationChange
    evaluation: el.Evaluation


@dataclass(frozen=True)
class Reader:
    """How a kind of file is written, read and compared.

    Attributes:
        cases: how often it is damaged.
        file: its name.
        write: makes it.
        read: what the package makes of it.
        right: whether the bytes say what was read; at last comes what was read undamaged.
        errors: what the reader may raise.
    """

    cases: int
    file: str
    write: Callable[[Path, "Sample"], Any]
    read: Callable[[Path, "Sample"], Any]
    right: Callable[[bytes, Any, Any], bool]
    errors: tuple[type[Exception], ...] = (FileFormatError,)


def unchanged(content: bytes, found: Any, whole: Any) -> bool:
    """Of files with a checksum: what was written, or nothing."""
    return same(found, whole)


def same(one: Any, other: Any) -> bool:
    """Equality through tables, tensors and the dataclasses that hold them."""
    if type(one) is not type(other):
        return False
    if isinstance(one, pd.DataFrame):
        return one.equals(other) and (one.dtypes == other.dtypes).all()
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=True)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, el.Spectra):
        return same(dict(one), dict(other)) and same(one.provenance, other.provenance)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if hasattr(one, "__dataclass_fields__"):
        return same(dict(vars(one)), dict(vars(other)))
    if isinstance(one, float):
        return np.array_equal(one, other, equal_nan=True)
    return bool(one == other)
