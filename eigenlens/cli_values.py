"""Values as they are written on a command line."""

import datetime
import os
from pathlib import Path
from typing import Any

from eigenlens.yaml_texts import parse_yaml


def pairs(values: list[str], option: str) -> dict[str, Any]:
    """``key=value`` pairs by key."""
    found = {}
    for text in values:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f"{option} {text!r} is not of the form key=value.")
        if not value.strip():
            raise ValueError(f"{option} {text!r} gives no value; write null for none.")
        found[key] = _value(value)
    return found


def _value(text: str) -> Any:
    """A number, truth value, null, list or mapping written as YAML; all else is text as it is.

    So is what YAML would read as something else by surprise: ``~`` and comments (nothing), dates,
    and the names of files that begin with a sign.
    """
    try:
        value = parse_yaml(text)
    except ValueError:
        return text
    if isinstance(value, str):
        return value if text.lstrip()[0] in "'\"" else text
    if value is None:
        return None if text.strip().lower() == "null" else text
    return text if isinstance(value, datetime.date) else value


def expanded(path: Path | None) -> Path | None:
    """``~`` is the home folder, also after an equals sign, where shells leave it alone."""
    return None if path is None else Path(os.path.expanduser(path))


def split(text: str | None, kind: type = str) -> tuple[Any, ...] | None:
    if text is None:
        return None
    try:
        return tuple(kind(part.strip()) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ValueError(f"{text!r} is not a comma-separated list of numbers.") from error
