"""What cannot be written as a folder, told before anything is loaded or computed."""

import os
from pathlib import Path

from torch import nn

from eigenlens.folders import checked_folder
from eigenlens.frozen_set import FrozenSet, check_frozen

_ONE_BIAS = {"bake": "A plain model", "lora": "A LoRA adapter"}


class PositionBiasError(ValueError):
    """Means by position, where only one bias for all positions can be expressed."""


def check_not_empty(frozen: FrozenSet) -> None:
    """Raise ``ValueError`` where nothing is frozen.

    Hooks take such an edit, and do nothing. A folder would be a copy of the model, and an adapter
    would have no part.
    """
    if not len(frozen):
        raise ValueError(
            "This edit freezes nothing: what it would be written as is the model as it is. Choose "
            "more components, or do without an edit."
        )


def check_export(frozen: FrozenSet, form: str, folder: str | os.PathLike[str]) -> Path:
    """The folder, if an edit can be written there as ``bake``, ``lora`` or ``peft``.

    Raises:
        PositionBiasError: means by position, where one mean has to serve all positions.
        ValueError: nothing is frozen, or the folder is a file.
    """
    check_frozen(frozen)
    check_not_empty(frozen)
    what = _ONE_BIAS.get(form)
    if what is not None and not frozen.means.is_shared:
        raise PositionBiasError(
            f"{what} has one bias for all positions, and this edit has means by position: give "
            "frozen.shared() (--shared), or better search with reference='shared' from the start."
        )
    return checked_folder(folder)


def check_not_base(model: nn.Module, folder: Path) -> None:
    """Raise ``ValueError`` where writing would replace the model that was read there."""
    own = getattr(model, "name_or_path", "")
    if own and folder.exists() and folder.resolve() == Path(own).resolve():
        raise ValueError(f"{folder} holds the model without the edit: name another folder.")
