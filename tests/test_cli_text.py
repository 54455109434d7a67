"""The command line takes and prints texts as they are."""

import json
import shutil
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from eigenlens import cli, models
from eigenlens.cli_output import clear_errors
from eigenlens.cli_values import pairs
from eigenlens.errors import StaticExportError
from eigenlens.models import KnownModel

NASTY = "[INST] [bold]x[/bold] [/b] [link=a]b[/link] eigenlens[figures] :smile: <s> \\[x] \\"


def run_cli(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError, StaticExportError])
def test_errors_are_printed_to_the_letter(kind, capsys):
    with pytest.raises(typer.Exit), clear_errors():
        raise kind(NASTY)
    assert capsys.readouterr().err == f"Error: {NASTY}\n"


def test_a_bad_row_with_brackets_is_shown(home):
    bad = {"prompt": "[INST] 1 + 1 [/INST]", "answer": " [b]2[/b]", "candidates": [NASTY]}
    write_rows(home / "[v2] mine.jsonl", bad)
    found = run_cli("run", "--task", "jsonl", "--task-arg", "path=[v2] mine.jsonl")
    assert found.exit_code == 2, found.exception
    assert "[v2] mine.jsonl, line 1: the answer ' [b]2[/b]' is not among" in found.stderr
    assert repr(NASTY) in found.stderr


def test_names_with_brackets_pass_through_a_whole_run(home, tiny_folder):
    model = "m[bold][/i]:cat:"
    shutil.copytree(tiny_folder("gpt2"), home / model)
    rows = [{"prompt": f"{a} + 1 =", "answer": f" {a + 1}"} for a in range(20)]
    write_rows(home / "@rows.jsonl", *rows)
    found = run_cli(
        *("run", "--model", model, "--task", "jsonl", "--task-arg", "path=@rows.jsonl"),
        *("--search", "one_shot", "--matrices", "W_K", "--refine", 0, "--device", "cpu"),
        *("--out", "run[/b]"),
    )
    assert found.exit_code == 0, found.output
    assert f"jsonl on {model}" in " ".join(found.output.split())
    assert found.stdout.endswith("Run folder: run[/b]\n")
    assert (home / "run[/b]" / "metrics.json").is_file()
    found = run_cli("report", "run[/b]", "--no-circuit")
    assert found.stdout == "Report: run[/b]/report.html\n"


def test_tables_show_brackets(monkeypatch):
    known = {"[b]one[/b]": KnownModel(description="[/i] :cat:", requirement="a[b]==1")}
    monkeypatch.setattr(models, "KNOWN_MODELS", known)
    output = run_cli("models").output
    for text in ("[b]one[/b]", "[/i] :cat:", "a[b]==1"):
        assert text in output


@pytest.mark.parametrize(
    "text",
    [
        *("@f.jsonl", "[v2].jsonl", "*.jsonl", "&f", "!f", "%f", "`f`", "{x}.jsonl", "|", "="),
        *("~", "~/f.jsonl", "#1.jsonl", "f #2.jsonl", "a: b: c", "f.jsonl ", "it's", "1e-3"),
        *("2024-01-01", "2024-13-45", "2024-01-01 10:00:00", "!!python/none x", "\u00e9", "nil"),
    ],
)
def test_values_that_are_no_yaml_are_texts(text):
    assert pairs([f"key={text}"], "--task-arg") == {"key": text}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("10", 10), ("-1.5", -1.5), ("true", True), ("null", None), ("'10'", "10"), ('"~"', "~")),
        *(("[1, a]", [1, "a"]), ("{a: 1}", {"a": 1}), ("a=b", "a=b")),
    ],
)
def test_values_that_are_yaml(text, value):
    assert pairs([f"key={text}"], "--task-arg") == {"key": value}


@pytest.mark.parametrize("text", ["key=", "key= ", "key", "=1"])
def test_values_that_are_missing(text):
    with pytest.raises(ValueError, match=r"--task-arg '.*' (gives no value|is not of the form)"):
        pairs([text], "--task-arg")


def test_the_home_folder_is_known_everywhere(home):
    write_rows(home / "f.jsonl", {"prompt": "a"})
    (home / "data").mkdir()

    def problem(*arguments):
        found = run_cli("run", *arguments)
        assert found.exit_code == 2, found.exception
        return found.stderr

    jsonl = ("--task", "jsonl", "--task-arg")
    assert f"{home}/f.jsonl, line 1" in problem(*jsonl, "path=~/f.jsonl")
    assert f"{home} is a folder" in problem(*jsonl, "path=~")
    assert "No such file: ~nobody-of-that-name/f" in problem(*jsonl, "path=~nobody-of-that-name/f")
    both = ("--task-arg", "test=~/g.jsonl", "--task-arg", "train=~/f.jsonl")
    assert f"No such file: {home}/g.jsonl" in problem("--task", "jsonl", *both)
    for task, file in (("rte", "RTE/train.jsonl"), ("wikitext", "valid.txt")):
        assert f"{home}/data/{file}" in problem("--task", task, "--task-arg", "data=~/data")
    assert f"{home}/c.yaml" in problem("--config=~/c.yaml")
    assert f"{home}/gone is no run folder" in run_cli("report", "~/gone").stderr


def test_the_home_folder_in_variables(home, monkeypatch):
    from eigenlens.files import cache_dir
    from eigenlens.tasks.sources import data_folder

    monkeypatch.setenv("EIGENLENS_DATA", "~/data")
    monkeypatch.setenv("EIGENLENS_CACHE", "~/cache")
    assert data_folder(None) == home / "data"
    assert cache_dir() == home / "cache"


@pytest.mark.slow
def test_the_package_itself_is_the_command():
    command = [sys.executable, "-m", "eigenlens", "tasks", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == json.loads(run_cli("tasks", "--json").stdout)
