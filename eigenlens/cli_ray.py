"""``--ray`` and ``--ray ADDRESS``: where a command works."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from eigenlens.distributed import Cluster

_HERE = "here"
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="[ADDRESS]",
        help="Work in processes of this machine, or on the Ray cluster at host:port or auto.",
    ),
]


class WithRay(TyperCommand):
    """A command whose ``--ray`` may stand alone, which typer knows no way to say."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give ``--ray`` its value where it has none."""
        given = []
        for word, following in zip(args, [*args[1:], "--"], strict=True):
            given.append(word)
            if word == "--ray" and following.startswith("-"):
                given.append(_HERE)
        return super().parse_args(ctx, given)


@contextmanager
def working_on(ray: str | None) -> "Iterator[Cluster | None]":
    """The cluster that ``--ray`` asks for, if any."""
    if ray is None:
        yield None
        return
    from eigenlens.distributed import Cluster

    with Cluster(None if ray == _HERE else ray) as cluster:
        yield cluster
