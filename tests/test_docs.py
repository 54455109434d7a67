"""The pages of the docs: their examples run, their commands exist, and they are complete."""

import re
import shlex
from pathlib import Path

import pytest
import typer

import eigenlens as el
from eigenlens.cli import app

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
PROSE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.+?)^```", page.read_text("utf-8"), re.DOTALL | re.M)


def name(page):
    return page.relative_to(ROOT).as_posix()


def with_examples():
    """Pages with Python; all but what is read first are slow."""
    for page in PAGES:
        if blocks(page, "python"):
            first = page.stem == "get-started"
            yield pytest.param(page, marks=() if first else pytest.mark.slow, id=name(page))


@pytest.mark.parametrize("page", list(with_examples()))
def test_the_examples_of_a_page_run_one_after_another(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)


def test_every_example_of_python_is_one_that_runs():
    languages = {
        found
        for page in PROSE
        for found in re.findall(r"^```(\S*)\n", page.read_text("utf-8"), re.M)
    }
    assert languages - {""} <= {"python", "bash", "sh"}


def commands():
    """Every call of ``eigenlens`` in a block of bash, with the page it is on."""
    for page in PROSE:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["eigenlens"]:
                    yield pytest.param(words[1:], id=f"{name(page)}: {' '.join(words[1:4])}")


@pytest.mark.parametrize("words", list(commands()))
def test_commands_are_understood(words):
    """By the program itself, which is not run: an option that it does not know is an error."""
    group = typer.main.get_command(app)
    group.commands[words[0]].make_context(words[0], words[1:])


def test_an_unknown_option_would_be_noticed():
    with pytest.raises(Exception, match="No such option"):
        test_commands_are_understood(["run", "--no-such-option"])


def test_the_reference_has_every_public_name():
    stated = {
        found
        for page in PAGES
        for found in re.findall(r"^::: eigenlens\.(\w+)$", page.read_text("utf-8"), re.M)
    }
    assert stated == set(el.__all__)


def test_every_accuracy_with_an_interval_is_on_a_page_of_figures():
    """What the docs repeat of the studies."""
    studies = "".join(path.read_text("utf-8") for path in (ROOT / "figures").glob("*.md"))
    stated = [
        (name(page), cell)
        for page in PAGES
        for cell in re.findall(r"\d+\.\d%\s\(\d+\.\d% … \d+\.\d%\)", page.read_text("utf-8"))
    ]
    assert len(stated) > 30
    assert [(page, cell) for page, cell in stated if re.sub(r"\s+", " ", cell) not in studies] == []


def test_links_within_the_repository_lead_somewhere():
    """Of the files that are read on their own; those of the site are the strict build's."""
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "llms.txt"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8")):
            assert (ROOT / target).exists(), f"{page.name}: {target}"
