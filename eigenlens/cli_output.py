"""How the command line prints: texts as they are, and errors as one sentence."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

# What is printed comes from outside: prompts, paths and names are no markup and no emoji codes.
console = Console(markup=False, emoji=False)
errors = Console(stderr=True, markup=False, emoji=False, highlight=False)


def say(text: str) -> None:
    """Print a text as it is, without line breaks in its paths."""
    console.print(text, soft_wrap=True)


AsJson = Annotated[bool, typer.Option("--json", help="JSON in place of a table.")]


def say_json(value: Any) -> None:
    """Print a value for programs to read, and nothing else with it."""
    from eigenlens.files import json_text

    print(json_text(value))


def before_and_after(
    title: str, test: Any, before: Any, after: Any, *, split: str = "test", choices: bool = False
) -> Table:
    """Two evaluations and their comparison ``test``; with ``choices`` their accuracy, too."""
    table = Table(
        title=title,
        caption=f"{test.n} {split} examples, {test.gained} gained, {test.lost} lost, "
        f"McNemar p = {test.p_value:.2g}",
    )
    names = ("accuracy", "95 % interval", *(["choice accuracy"] * choices), "loss (nats)")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for name, e in (("before", before), ("after", after)):
        low, high = e.interval
        shares = [f"{e.accuracy:.1%}", f"{low:.1%} … {high:.1%}"]
        choice = "" if e.choice_accuracy is None else f"{e.choice_accuracy:.1%}"
        shares += [choice] * choices
        table.add_row(name, *shares, f"{e.loss:.3f}")
    return table


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn what a user can mend into one sentence and exit code 2."""
    from transformers.utils import logging as transformers_logging

    from eigenlens.errors import MissingPackageError, StaticExportError
    from eigenlens.files import UnwritableError

    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.disable_progress_bar()
    missing = (StaticExportError, MissingPackageError)
    try:
        yield
    except (ValueError, FileNotFoundError, UnwritableError, *missing) as error:
        errors.print(Text.assemble(("Error:", "bold red"), f" {error}"), soft_wrap=True)
        raise typer.Exit(2) from error
