"""Edits to the Hub and back, through huggingface_hub's own requests to a stand-in."""

import json

import huggingface_hub
import pytest
from local_hub import local_hub
from test_cli_edits import run_cli
from test_freezing import frozen_half

import eigenlens as el


@pytest.fixture
def edit(tiny, tmp_path):
    """An edit as a file, and its set."""
    frozen = frozen_half(tiny("llama"))
    path = tmp_path / "edit" / "mine.safetensors"
    frozen.save(path)
    return path, frozen


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with local_hub() as hub:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_mine")
        yield hub


def test_an_edit_comes_back_as_it_went(hub, edit, tmp_path):
    path, frozen = edit
    pushed = run_cli("push", path, "sums", "--private")
    assert pushed.exit_code == 0, pushed.output
    assert pushed.stdout == f"Pushed to {hub.address}/me/sums\n"
    assert hub.private == {"me/sums": True}
    assert hub.tokens == {"Bearer hf_mine"}
    assert set(hub.files["me/sums"]) == {"frozen.safetensors", "README.md"}
    assert b'base_model: "llama"\n' in hub.files["me/sums"]["README.md"]  # not its whole folder
    out = tmp_path / "got"
    pulled = run_cli("pull", "me/sums", "--out", out)
    assert pulled.exit_code == 0, pulled.output
    assert pulled.stdout == f"Edit: {out / 'frozen.safetensors'}\n"
    again = el.FrozenSet.load(out / "frozen.safetensors")
    assert again.components.equals(frozen.components)
    assert (out / "frozen.safetensors").read_bytes() == path.read_bytes()
    assert run_cli("push", path, "sums").exit_code == 0  # again, where it is already


def test_the_card_tells_what_the_run_measured(hub, tmp_path):
    rows = [{"prompt": f"{a} + 1 =", "answer": f" {a + 1}"} for a in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["run", "--model", "arith-tiny", "--task", "jsonl", "--protect", "none"]
    command += ["--task-arg", f"path={tmp_path / 'rows.jsonl'}", "--fraction", "0.01", "--json"]
    done = run_cli(*command, "--device", "cpu", "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    numbers = json.loads(done.stdout)
    kept = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert numbers == {name: value for name, value in kept.items() if name != "eigenlens"}
    assert run_cli("push", tmp_path / "run", "me/sums").exit_code == 0
    card = hub.files["me/sums"]["README.md"].decode()
    assert 'base_model: "arith-tiny"' in card
    assert f"| {numbers['after']['loss']:.3f} |" in card
    assert f"{numbers['frozen']['components']:,} of {numbers['frozen']['of']:,} components" in card
    assert "under one mean for all positions" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pull", "me/nothing"), "me/nothing"),
        (("pull", "me/empty"), "frozen.safetensors"),
        (("pull", "me/foreign"), "is truncated or no safetensors file"),
        (("pull", "no such name!"), "no such name!"),
        (("push", "{edit}", "no such name!"), "no such name!"),
        (("push", "nowhere.safetensors", "me/sums"), "nowhere.safetensors"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(hub, edit, tmp_path, arguments, message):
    hub.files |= {"me/empty": {}, "me/foreign": {"frozen.safetensors": b"{}"}}
    out = ("--out", tmp_path) if arguments[0] == "pull" else ()
    found = run_cli(*(a.format(edit=edit[0]) for a in arguments), *out)
    assert found.exit_code == 2, found.output
    assert found.stderr.startswith("Error: ")
    assert message in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1


def test_a_hub_that_does_not_answer_is_one_sentence(hub, edit, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    found = run_cli("push", edit[0], "me/sums")
    assert found.exit_code == 2, found.output
    assert found.stderr.startswith("Error: The Hub and 'me/sums'")


def test_lists_are_json_on_demand():
    models = {row["name"]: row for row in json.loads(run_cli("models", "--json").stdout)}
    assert models["smollm2-135m"]["hub"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    tasks = {row["name"]: row["what"] for row in json.loads(run_cli("tasks", "--json").stdout)}
    assert tasks["cb"].startswith("CommitmentBank")
