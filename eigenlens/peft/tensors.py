"""The tensors of an adapter: their names and shapes, and whether a file holds them."""

from collections.abc import Mapping

from torch import Tensor

from eigenlens.export.low_rank import LowRank
from eigenlens.files import FileFormatError
from eigenlens.models.wording import listed
from eigenlens.peft.config import EigenpruneAdapterConfig

_BEFORE = "base_model.model."  # peft's, where it has wrapped a model


def named_tensors(changes: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """The tensors of the changes of modules, by the names that their file has."""
    return {
        f"{_BEFORE}{path}.eigenprune_{part}": getattr(change, part)
        for path, change in changes.items()
        for part in ("down", "up", "table")
    }


def check_tensors(config: EigenpruneAdapterConfig, tensors: Mapping[str, Tensor]) -> None:
    """Check that tensors are those of a configuration, each of its shape and finite.

    Raises:
        FileFormatError: names those that are not.
    """
    shapes = _shapes(config)
    tensors = {name.removeprefix(_BEFORE): value for name, value in tensors.items()}
    problems = {
        "missing": sorted(shapes.keys() - tensors.keys()),
        "unknown": sorted(tensors.keys() - shapes.keys()),
        "of another shape": [
            f"{name} is {tuple(tensors[name].shape)} in place of {shape}"
            for name, shape in shapes.items()
            if name in tensors and tensors[name].shape != shape
        ],
        "no finite floating point numbers": [
            name
            for name in sorted(shapes.keys() & tensors.keys())
            if not tensors[name].is_floating_point() or not tensors[name].isfinite().all()
        ],
    }
    told = [f"{len(names)} {what} ({listed(names)})" for what, names in problems.items() if names]
    if told:
        raise FileFormatError(
            f"The tensors of this adapter are not those of its configuration: {'; '.join(told)}. "
            "Copy it again, or write it anew with eigenlens.peft.to_peft."
        )


def _shapes(config: EigenpruneAdapterConfig) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for path, (n_in, k, n_out) in config.shapes.items():
        parts = {"down": (n_in, k), "up": (k, n_out), "table": (len(config.rows) + 1, k)}
        found |= {f"{path}.eigenprune_{part}": shape for part, shape in parts.items()}
    return found
