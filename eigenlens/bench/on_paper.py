"""Running on paper: tensors of the meta device have shapes, no values, and their bytes are counted.

Inside :class:`OnPaper` every function of the toolkit runs on a model of the meta device as it does
on a real one: what the CPU asks of such a tensor is zero. Storages that live are counted as they
are made and dropped, views once, so that the highest count is the memory that the same calls take,
but for what single operations use inside, and for what is no tensor.
"""

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_COPY = torch.ops.aten._to_copy.default
_VALUE = torch.ops.aten._local_scalar_dense.default


class OnPaper(TorchDispatchMode):
    """Counts the bytes of tensors; a context manager.

    Attributes:
        now: bytes of the tensors that live.
        peak: highest ``now`` since it was last set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._seen: set[int] = set()

    def _count(self, tensor: Tensor, *, free: bool = False) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._seen:
            return
        size = 0 if free else storage.nbytes()
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(tensor.is_meta for tensor in given):
            if func is _VALUE:
                return args[0].dtype is torch.bool or 0
            device = kwargs.get("device")
            if func is _COPY and device is not None and torch.device(device).type != "meta":
                found = torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
                self._count(found, free=True)  # what is on the CPU already is not copied there
                return found
            # Numbers and indices that are tensors of the CPU go anywhere.
            args, kwargs = tree_map(_as_meta, (args, kwargs))
        found = func(*args, **kwargs)
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return found


def _as_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) and not value.is_meta else value
