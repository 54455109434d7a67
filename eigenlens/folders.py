"""Folders that transformers and peft read, written whole: never half old and half new."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eigenlens.files import writing
from eigenlens.leftovers import sweep, temporary_beside


def checked_folder(folder: str | os.PathLike[str]) -> Path:
    """A folder that can be written to, as far as can be told before something is written.

    Raises:
        ValueError: it is a file, or would lie in one.
    """
    path = Path(folder)
    nearest = next(part for part in (path, *path.absolute().parents) if part.exists())
    if not nearest.is_dir():
        raise ValueError(f"{nearest} is a file: name a folder to write to.")
    return path


@contextmanager
def whole_folder(folder: Path, config: str, weights: str) -> Iterator[Path]:
    """Yield a temporary folder, whose files go into ``folder`` only when the block succeeds.

    Other files that are there stay. An old configuration and old weights go before the new ones
    come, and the configuration comes last: what a killed process leaves is a folder that nothing
    reads.

    Args:
        folder: need not be there.
        config: name of the file that readers look for first.
        weights: pattern of the names of its weights.

    Raises:
        UnwritableError: no room, or no right to write there.
    """
    temporary = temporary_beside(folder)
    try:
        with writing(folder):
            temporary.mkdir(parents=True)
            sweep(folder.parent)
            yield temporary
            new = [path.relative_to(temporary) for path in temporary.rglob("*") if path.is_file()]
            for name in new:  # safetensors writes for the owner alone
                (temporary / name).chmod(temporary.stat().st_mode & 0o666)
            if not folder.exists():
                os.replace(temporary, folder)
                return
            for old in (folder / config, *folder.glob(weights)):
                old.unlink(missing_ok=True)
            for name in sorted(new, key=lambda name: str(name) == config):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(temporary / name, folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
