"""Layers on several devices, as accelerate places them, and what it does not keep on any."""

from collections.abc import Iterator, Mapping

from torch import nn

DeviceMap = str | dict[str, str | int]
_PLACED = ("auto", "balanced", "balanced_low_0", "sequential")


def check_device_map(device_map: object, device: object) -> None:
    """Raise ``ValueError`` for a map that cannot be followed, before anything is loaded.

    Raises:
        ValueError: both a map and a device; an unknown word; layers for the disk.
    """
    if device_map is None:
        return
    if device is not None:
        raise ValueError("device= and device_map= both say where the model goes: give one of them.")
    if isinstance(device_map, str):
        if device_map not in _PLACED:
            raise ValueError(
                f"Unknown device_map {device_map!r}; use {', '.join(_PLACED)}, or a mapping of "
                "module names to devices."
            )
    elif isinstance(device_map, Mapping):
        disk = [name for name, place in device_map.items() if str(place) in ("disk", "meta")]
        if disk:
            raise _refused(disk)
    else:
        kind = type(device_map).__name__
        raise ValueError(f"The device_map is a {kind}: give a word or a mapping.")


def check_in_memory(model: nn.Module) -> None:
    """Raise ``ValueError`` for a model of which accelerate keeps layers off their device.

    Such a module has its weights during its own forward pass alone, and the passes that
    differentiate would hold the weights of all layers at once: nothing would be spared.
    """
    off = list(_offloaded(model))
    if off:
        raise _refused(off)


def _offloaded(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        if any(getattr(part, "offload", False) for part in getattr(hook, "hooks", (hook,))):
            yield name


def _refused(names: list[str]) -> ValueError:
    first = names[0]
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return ValueError(
        f"{first}{others} would be offloaded, and eigenlens reads and differentiates weights, "
        "which an offloaded module has during its own forward pass alone: give each module a "
        "device that has room for it (`eigenlens bench --plan` says how much it takes), or load "
        "the model with dtype='bfloat16', or without a device_map on the CPU, where weights stay "
        "mapped to their files."
    )
