"""Where public data sets come from: a local folder if one is named, else the Hub.

The folder is the argument ``data`` of a task, or else the environment variable
``EIGENLENS_DATA``. A folder that was named and lacks a file is an error, never a reason to go to
the Hub: results must not depend on which files happened to be there.
"""

import os
from pathlib import Path
from typing import Annotated

import datasets
from datasets import Dataset
from pydantic import AfterValidator, Field

_VARIABLE = "EIGENLENS_DATA"


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with the home folder in place of ``~``, which stays where there is no such user."""
    return Path(os.path.expanduser(path))


LocalPath = Annotated[Path, AfterValidator(expanded)]
"""A path among the arguments of a task."""


class MissingDataError(FileNotFoundError):
    """Neither a local folder nor the Hub gave the data."""


def data_folder(data: Path | None) -> Path | None:
    """``data``, else ``EIGENLENS_DATA``, else ``None``."""
    if data is not None:
        return data
    return expanded(os.environ[_VARIABLE]) if os.environ.get(_VARIABLE) else None


def data_file(folder: Path, collection: str, name: str) -> Path:
    """``folder/name`` or ``folder/collection/name``, whichever is there.

    Raises:
        MissingDataError: neither is there.
    """
    tried = (folder / name, folder / collection / name)
    for path in tried:
        if path.is_file():
            return path
    raise MissingDataError(
        f"There is neither {tried[0]} nor {tried[1]}. Put the file there, name another folder "
        f"with data= or {_VARIABLE}, or name none to load from the Hub."
    )


Revision = Annotated[
    str,
    Field(
        pattern="^[0-9a-f]{40}$",
        description="commit of the Hub's data set, where no folder is named",
    ),
]
"""A version of a data set that stays what it is, as branches and tags do not."""


def from_hub(name: str, config: str, split: str, revision: str) -> Dataset:
    """A split of a data set on the Hub at a commit, from its cache where it was loaded before.

    Raises:
        MissingDataError: the Hub cannot be reached or does not have it.
    """
    try:
        return datasets.load_dataset(name, config, split=split, revision=revision)
    except (OSError, ValueError) as error:
        raise MissingDataError(
            f"{name} ({config}, {split}) could not be loaded from the Hub: {error}. "
            f"To read local files, set {_VARIABLE} or data= to their folder."
        ) from error
