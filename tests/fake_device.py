"""An accelerator that only pretends: tensors have its device and shapes, and no values.

Operations on them run under ``FakeTensorMode``, which refuses to mix devices; what comes to the CPU
is real and zero. Every value that the CPU waits for is counted. PyTorch's CPU build has no CUDA to
pretend, not even for a backward pass, so the device is one of the kind made for other backends.
"""

import sys

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import (
    _DummyDeviceGuard,
    _setup_privateuseone_for_python_backend,
)

NAME = "accel"


_GUARD = _DummyDeviceGuard()  # PyTorch does not keep it alive
if not hasattr(torch, NAME):
    _setup_privateuseone_for_python_backend(NAME, device_guard=_GUARD)


class FakeDevice(TorchDispatchMode):
    """Runs what touches the device without values.

    Attributes:
        waits: places in eigenlens that read a value of the device, and how often.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=False)
        self.waits: dict[str, int] = {}

    def _wait(self):
        frame = sys._getframe(2)
        while frame and not frame.f_globals.get("__name__", "").startswith("eigenlens."):
            frame = frame.f_back
        if frame:
            place = f"{frame.f_globals['__name__']}.{frame.f_code.co_name}"
            self.waits[place] = self.waits.get(place, 0) + 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        on_device = any(isinstance(t, FakeTensor) for t in tensors)
        wanted = kwargs.get("device")
        to_device = wanted is not None and torch.device(wanted).type == NAME
        if func is torch.ops.aten._local_scalar_dense.default and on_device:
            self._wait()
            return {torch.bool: True}.get(args[0].dtype, 0)
        if func is torch.ops.aten.equal.default and on_device:
            self._wait()
            return True
        if func is torch.ops.aten._to_copy.default:
            if on_device and wanted is not None and not to_device:
                self._wait()
                dtype = kwargs.get("dtype") or args[0].dtype
                return torch.zeros(tuple(args[0].shape), dtype=dtype)
            if to_device and not on_device:
                with self.fake:
                    dtype = kwargs.get("dtype") or args[0].dtype
                    return torch.empty(tuple(args[0].shape), dtype=dtype, device=wanted)
        if not (on_device or to_device):
            return func(*args, **kwargs)
        with self.fake:

            def constant(value):
                # Numbers that are tensors go anywhere.
                real = isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)
                return self.fake.from_tensor(value) if real and value.ndim == 0 else value

            args, kwargs = tree_map(constant, (args, kwargs))
            return func(*args, **kwargs)


def on_devices(model, devices):
    """Replace parameters and buffers of ``model`` by ones without values.

    ``devices`` says where each is, by its name; those on the CPU stay.
    """
    for name, module in model.named_modules():
        for store in (module._parameters, module._buffers):
            for key, value in store.items():
                where = devices(f"{name}.{key}")
                if value is not None and where.type != "cpu":
                    made = torch.empty(tuple(value.shape), dtype=value.dtype, device=where)
                    if isinstance(value, torch.nn.Parameter):
                        made = torch.nn.Parameter(made, requires_grad=False)
                    store[key] = made
