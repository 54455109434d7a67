"""What is wrong, in one sentence."""

from pydantic import ValidationError


def problems(error: ValidationError, unplaced: str = "") -> str:
    """Every problem as ``field: message``; ``unplaced`` stands for those of no single field."""
    return "; ".join(
        f"{'.'.join(map(str, e['loc'])) or unplaced}: {e['msg']}" for e in error.errors()
    )


def reason(error: Exception) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
