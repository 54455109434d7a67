"""Exports over a base that holds the same weights in another type than the edit was made on."""

import json

import peft
import pytest
import torch
from test_attach import LONG, plain
from test_cli_edits import run_cli
from test_freezing import frozen_half
from tiny_models import EQUAL

import eigenlens as el
from eigenlens.frozen_set import WrongModelError
from eigenlens.peft import get_eigenpruned_model, to_peft

WAYS = {"bake": el.bake, "lora": el.to_lora, "peft": to_peft}
TYPES = [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
pytestmark = pytest.mark.parametrize(("made", "used"), TYPES, ids=["to-bfloat16", "to-float32"])


@pytest.fixture
def edit(tiny_folder, tmp_path, made):
    """An edit's file with its directions, its set, and the logits of the model that it was made on
    before and after it."""
    bridge = el.load_model(tiny_folder("llama"), dtype=made, device="cpu")
    frozen = frozen_half(bridge, EQUAL).shared()
    path = tmp_path / "frozen.safetensors"
    frozen.save(path, directions=True)
    with torch.no_grad():
        before = bridge(LONG).float()
        with el.freeze(bridge, frozen):
            return path, el.FrozenSet.load(path), before, bridge(LONG).float()


def read(way, folder, base, dtype):
    """The logits of what was exported, as others load it."""
    if way == "bake":
        model = plain(folder, dtype)
    else:
        model = peft.PeftModel.from_pretrained(plain(base, dtype), folder).eval()
    with torch.no_grad():
        return model(input_ids=LONG).logits


def check_edited(found, before, wanted):
    """As edited, within what rounding weights to bfloat16 moves."""
    spread = wanted.std()
    assert (found.float() - wanted).abs().mean() < 0.05 * spread
    assert (before - wanted).abs().mean() > 0.05 * spread


@pytest.mark.parametrize("way", WAYS)
def test_an_export_over_another_dtype_only_if_asked(edit, tiny_folder, tmp_path, used, way):
    _, frozen, before, wanted = edit
    base, folder = plain(tiny_folder("llama"), used), tmp_path / way
    with pytest.raises(WrongModelError, match=r"made for these weights in .*allow_dtype=True"):
        WAYS[way](base, frozen, folder)
    assert not folder.exists()
    WAYS[way](base, frozen, folder, allow_dtype=True)
    found = read(way, folder, tiny_folder("llama"), used)
    assert found.dtype == used
    check_edited(found, before, wanted)
    with torch.no_grad(), el.attach(base, frozen, allow_dtype=True):
        attached = base(LONG).logits
    if used == torch.float32:  # the same numbers: nothing is rounded on the way
        torch.testing.assert_close(found, attached, rtol=1e-4, atol=1e-4)
    base.model.layers[1].mlp.up_proj.weight.data[0, 0] += 0.1
    with pytest.raises(WrongModelError, match="other weights"):
        WAYS[way](base, frozen, tmp_path / "other", allow_dtype=True)
    assert not (tmp_path / "other").exists()


def test_an_adapter_in_memory_over_another_dtype(edit, tiny_folder, used):
    _, frozen, before, wanted = edit
    base = plain(tiny_folder("llama"), used)
    with pytest.raises(WrongModelError, match="allow_dtype=True"):
        get_eigenpruned_model(base, frozen)
    wrapped = get_eigenpruned_model(base, frozen, allow_dtype=True)
    with torch.no_grad():
        check_edited(wrapped(input_ids=LONG).logits, before, wanted)


def test_the_command_exports_over_another_dtype_and_measures_there(
    edit, tiny_folder, tmp_path, used
):
    path, frozen, before, wanted = edit
    kind = str(used).removeprefix("torch.")
    rows = [{"prompt": row["prompt"], "answer": row["answer"]} for row in EQUAL]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    measured = ("--task", "jsonl", "--task-arg", f"path={tmp_path / 'rows.jsonl'}")
    for way in WAYS:
        options = ("--to", way, "--dtype", kind, "--device", "cpu", "--out", tmp_path / way)
        refused = run_cli("export", path, *options)
        assert refused.exit_code == 2
        assert "--allow-dtype" in refused.stderr
        assert not (tmp_path / way).exists()
        more = measured if way == "bake" else ()
        done = run_cli("export", path, *options, "--allow-dtype", *more)
        assert done.exit_code == 0, done.output
        check_edited(read(way, tmp_path / way, tiny_folder("llama"), used), before, wanted)
    bridge = el.load_model(tiny_folder("llama"), dtype=used, device="cpu")
    data = el.load_task("jsonl", path=str(tmp_path / "rows.jsonl")).test
    with el.freeze(bridge, frozen, allow_dtype=True):
        loss = el.evaluate(bridge, data, progress=False).loss
    assert f"{loss:.3f}" in (tmp_path / "bake" / "README.md").read_text()
