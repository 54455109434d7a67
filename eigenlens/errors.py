"""What is wrong with a configuration, in one sentence."""

from pydantic import ValidationError


class MissingPackageError(ImportError):
    """A package of an extra is not installed; says which."""


def problems(error: ValidationError, unplaced: str = "") -> str:
    """Every problem as ``field: message``; ``unplaced`` stands for those of no single field."""
    return "; ".join(
        f"{'.'.join(map(str, e['loc'])) or unplaced}: {e['msg']}" for e in error.errors()
    )
