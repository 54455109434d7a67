"""Write the lock files from what is installed here: ``python tools/lock.py``.

``constraints-demo.txt`` holds what ``make demo`` needs, ``constraints.txt`` what the tests and the
docs need as well. Both are whole closures, so that they can be installed without a resolver.
"""

import tomllib
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LOCKS = {"constraints-demo.txt": (), "constraints.txt": ("dev", "docs")}  # extras of each
HEADS = {
    "constraints-demo.txt": "# What make demo installs; written by tools/lock.py.",
    "constraints.txt": "# The versions that the tests and the numbers of the docs were made with; "
    "written by tools/lock.py.",
}


def lines(name: str) -> list[str]:
    """The pins of a lock file, sorted."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(r for extra in LOCKS[name] for r in extras[extra])]
    found = _closure(list(map(Requirement, wanted)))
    return [f"{name}=={found[name]}" for name in sorted(found)]


def _closure(todo: list[Requirement]) -> dict[str, str]:
    """Versions of these requirements and of all that they require here."""
    versions: dict[str, str] = {}
    done: set[tuple[str, str]] = set()
    while todo:
        requirement = todo.pop()
        for extra in {"", *requirement.extras}:
            key = canonicalize_name(requirement.name), extra
            if key in done:
                continue
            done.add(key)
            found = distribution(key[0])
            versions[key[0]] = found.version.split("+")[0]  # whatever the build
            inner = map(Requirement, found.requires or [])
            todo += [r for r in inner if r.marker is None or r.marker.evaluate({"extra": extra})]
    return versions


def main() -> None:
    """Write both."""
    for name, head in HEADS.items():
        (ROOT / name).write_text("\n".join([head, *lines(name), ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
