"""Weights for the length of a block: changed inside and restored bit for bit, or differentiated."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def restored(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Whatever the block writes into these weights, or views of them, is taken back at its end."""
    with torch.no_grad():
        kept = [(tensor, tensor.clone()) for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)


@contextmanager
def requiring_grad(weights: Iterable[Tensor]) -> Iterator[None]:
    """Let gradients reach these weights inside the block; none are left behind."""
    kept = [(weight, weight.requires_grad, weight.grad) for weight in weights]
    try:
        for weight, _, _ in kept:
            weight.grad = None
            weight.requires_grad_(True)
        yield
    finally:
        for weight, required, gradient in kept:
            weight.requires_grad_(required)
            weight.grad = gradient
