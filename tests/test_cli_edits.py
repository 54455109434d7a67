"""The commands that use a finished edit."""

import json

import peft
import pytest
import torch
from test_attach import plain
from test_freezing import frozen_half
from tiny_models import EQUAL
from typer.testing import CliRunner

import eigenlens as el
import eigenlens.peft
from eigenlens.cli import app


def run_cli(*arguments, **options):
    return CliRunner().invoke(app, [str(a) for a in arguments], **options)


@pytest.fixture(scope="module")
def edit(tiny_folder, tmp_path_factory):
    """A float32 edit as a file, its bridge, and its set."""
    bridge = el.load_model(tiny_folder("llama"), dtype="float32", device="cpu")
    frozen = frozen_half(bridge, EQUAL, 0.4)
    path = tmp_path_factory.mktemp("edit") / "frozen.safetensors"
    frozen.save(path)
    return path, bridge, frozen


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"prompt": row["prompt"], "answer": row["answer"]} for row in EQUAL]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines * 2))
    return path


def test_apply_shows_both_texts_side_by_side(edit):
    path, bridge, frozen = edit
    options = ("--new-tokens", 4, "--device", "cpu", "--json")
    found = run_cli("apply", path, "--prompt", "1 + 2 =", *options)
    assert found.exit_code == 0, found.output
    (row,) = json.loads(found.stdout)
    tokens = torch.tensor([bridge.tokenizer.encode("1 + 2 =")])
    given = {"max_new_tokens": 4, "do_sample": False, "verbose": False, "stop_at_eos": False}
    with el.freeze(bridge, frozen):
        written = bridge.generate(tokens, **given, return_type="tokens")[0, 4:]
    assert row["after"] == bridge.tokenizer.decode(written, skip_special_tokens=True)
    assert row["before"] != row["after"]
    table = run_cli("apply", path, "--new-tokens", 4, "--device", "cpu", input="1 + 2 =\n\n7 + 7 =")
    assert " ".join(row["after"].split()) in " ".join(table.stdout.split())
    assert "7 + 7 =" in table.stdout


def test_apply_ends_where_the_context_ends(edit):
    path, bridge, _ = edit
    n_ctx = bridge.cfg.n_ctx
    command = ("apply", path, "--device", "cpu", "--json", "--new-tokens", 10 * n_ctx, "--prompt")
    found = run_cli(*command, " ".join(["1"] * (n_ctx - 1)))
    assert found.exit_code == 0, found.output
    (row,) = json.loads(found.stdout)
    assert len(bridge.tokenizer.encode(row["before"])) <= 1
    found = run_cli(*command, " ".join(["1"] * n_ctx))
    assert found.exit_code == 2
    assert f"fills the model's context of {n_ctx} tokens" in " ".join(found.output.split())


def test_evaluate_measures_what_the_library_does(edit, rows):
    path, bridge, frozen = edit
    found = run_cli(
        *("evaluate", path, "--task", "jsonl", "--task-arg", f"path={rows}"),
        *("--device", "cpu", "--json"),
    )
    assert found.exit_code == 0, found.output
    numbers = json.loads(found.stdout)
    task = el.load_task("jsonl", bridge.tokenizer, path=str(rows))
    with el.freeze(bridge, frozen):
        wanted = el.evaluate(bridge, task.test)
    assert numbers["after"]["loss"] == pytest.approx(wanted.loss, abs=1e-6)
    assert numbers["after"]["loss"] != pytest.approx(numbers["before"]["loss"], abs=1e-3)
    table = run_cli(
        "evaluate", path, "--task", "jsonl", "--task-arg", f"path={rows}", "--device", "cpu"
    )
    assert f"{wanted.loss:.3f}" in table.stdout


def test_export_writes_each_form(edit, rows, tiny_folder, tmp_path):
    path, _, frozen = edit
    tokens = torch.tensor([[8, 3, 9, 6]])
    base = plain(tiny_folder("llama"), torch.float32)
    models = {}
    for form in ("bake", "lora", "peft"):
        measured = ("--task", "jsonl", "--task-arg", f"path={rows}") if form == "bake" else ()
        out = tmp_path / form
        found = run_cli("export", path, "--to", form, "--shared", "--out", out, *measured)
        assert found.exit_code == 0, found.output
        assert found.stdout == f"Written to {out}\n"
    models["bake"] = plain(tmp_path / "bake", torch.float32)
    for form in ("lora", "peft"):
        own = plain(tiny_folder("llama"), torch.float32)
        models[form] = peft.PeftModel.from_pretrained(own, tmp_path / form).eval()
    with torch.no_grad():
        with el.attach(base, frozen.shared()):
            wanted = base(tokens).logits
        for model in models.values():
            torch.testing.assert_close(model(input_ids=tokens).logits, wanted, rtol=1e-5, atol=1e-5)
    assert "| after |" in (tmp_path / "bake" / "README.md").read_text()
    assert (tmp_path / "bake" / "tokenizer.json").is_file()
    (tmp_path / "mine").touch()
    modes = {file.stat().st_mode for form in models for file in (tmp_path / form).iterdir()}
    assert modes == {(tmp_path / "mine").stat().st_mode}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", "{edit}", "--to", "bake", "--out", "{out}"), "frozen.shared()"),
        (("export", "{edit}", "--to", "lora", "--out", "{out}", "--task", "cb"), "of --to bake"),
        (("apply", "{edit}"), "Give --prompt"),
        (("apply", "{edit}", "--prompt", "1", "--model", "nowhere"), "nowhere"),
        (("apply", "{out}/no", "--prompt", "1"), "No such file"),
        (("apply", "{edit}", "--prompt", "1", "--dtype", "bfloat16"), "save this FrozenSet"),
        (("evaluate", "{edit}", "--task", "ioi", "--split", "dev"), "is no split"),
        (("evaluate", "{edit}", "--task", "nothing"), "Unknown task"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(edit, tmp_path, arguments, message):
    path, _, _ = edit
    arguments = [a.format(edit=path, out=tmp_path / "out") for a in arguments]
    extra = ["--allow-dtype"] if "bfloat16" in arguments else []
    found = run_cli(*arguments, *extra, input="")
    assert found.exit_code == 2, found.output
    assert found.stderr.startswith("Error: ")
    assert message in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1
