"""What is wrong, in one sentence."""

from pydantic import ValidationError

_LONGEST = 1000  # signs


class MissingPackageError(ImportError):
    """A package of an extra is not installed; says which."""


class StaticExportError(RuntimeError):
    """SVG, PDF or PNG cannot be written on this machine; the message says what to install."""


def problems(error: ValidationError, unplaced: str = "") -> str:
    """Every problem as ``field: message``; ``unplaced`` stands for those of no single field."""
    told = (f"{'.'.join(map(str, e['loc'])) or unplaced}: {e['msg']}" for e in error.errors())
    return short("; ".join(told))


def reason(error: Exception) -> str:
    """What an error says, on one line."""
    return short(" ".join(str(error).split())) or type(error).__name__


def short(text: str) -> str:
    """The text, cut where it quotes without end."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
