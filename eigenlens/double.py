"""Exact arithmetic for oracles: float64 stays float64 inside a model.

It imports nothing of the package, so that tests can have it before types are checked at run time.
"""

import sys
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class StayDouble(TorchFunctionMode):
    """Keep float64 in float64 where models go through float32 (norms, softmax).

    Oracles need exact arithmetic: a float32 rounding in the middle of a float64 model hides errors
    of 1e-8, and its attention mask overflows there.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        narrowing = func is torch.Tensor.float or (
            func is torch.Tensor.to and torch.float32 in args
        )
        narrowing = narrowing or kwargs.get("dtype") is torch.float32
        if narrowing and args and isinstance(args[0], torch.Tensor):
            # Not what eigenlens itself casts down: that would be its fault, and must show.
            own = sys._getframe(1).f_globals["__name__"].startswith("eigenlens.")
            if args[0].dtype == torch.float64 and not own:
                if "dtype" not in kwargs:
                    return args[0]
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)
