"""Edits that are damaged, empty, of another model or in the wrong place: one sentence each."""

import dataclasses
import json
import re

import jaxtyping
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from test_attach import LONG, plain
from test_cli_edits import run_cli
from test_freezing import frozen_half
from test_take_home import attached, attenuated
from tiny_models import word_tokenizer
from tokenizers import models

import eigenlens as el
from eigenlens import folders
from eigenlens.frozen_set import WrongModelError
from eigenlens.peft import EigenpruneAdapterConfig, get_eigenpruned_model, to_peft

EXPORTS = {"bake": el.bake, "lora": el.to_lora, "peft": to_peft}


@pytest.fixture(autouse=True)
def _as_users_run_it(monkeypatch):
    """Without the type checks that the tests put on every function."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module")
def made(tiny, tiny_folder):
    """A plain model, and its edits with means by position and shared ones."""
    bridge = tiny("llama")
    return plain(tiny_folder("llama")), frozen_half(bridge, fraction=0.3), attenuated(bridge)


def one_sentence(error):
    """What was raised, checked to be a single line that ends."""
    text = str(error.value)
    assert "\n" not in text
    assert re.search(r"[.)]$", text), text
    return text


# An adapter's folder, damaged


@pytest.fixture(scope="module")
def adapter(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "peft"
    to_peft(made[0], made[1], folder)
    return folder


@pytest.fixture
def damaged(adapter, tmp_path):
    """The folder after its tensors and its configuration went through two functions."""

    def write(change_tensors=None, change_config=None, *, cut=None):
        config = json.loads((adapter / "adapter_config.json").read_text())
        tensors = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(
            json.dumps(change_config(config) if change_config else config)
        )
        path = tmp_path / "adapter_model.safetensors"
        safetensors.torch.save_file(change_tensors(tensors) if change_tensors else tensors, path)
        if cut is not None:
            path.write_bytes(path.read_bytes()[:cut])
        return tmp_path

    return write


PATH = "model.layers.1.mlp.up_proj"
NAME = f"base_model.model.{PATH}.eigenprune_"


def changed(part, change):
    return lambda tensors: tensors | {f"{NAME}{part}": change(tensors[f"{NAME}{part}"].clone())}


def put(value):
    def change(tensor):
        tensor[0, 0] = value
        return tensor

    return change


TENSORS = {
    "nan": (changed("down", put(float("nan"))), r"1 no finite.*up_proj\.eigenprune_down"),
    "inf": (changed("table", put(float("-inf"))), r"1 no finite.*up_proj\.eigenprune_table"),
    "integers": (changed("up", lambda t: (t * 9).int()), r"1 no finite.*eigenprune_up"),
    "missing": (
        lambda t: {name: value for name, value in t.items() if name != f"{NAME}up"},
        r"1 missing \(model\.layers\.1\.mlp\.up_proj\.eigenprune_up\)",
    ),
    "none at all": (lambda t: {}, r"\d+ missing .* more"),
    "one too many": (lambda t: t | {f"{NAME}lora_A": torch.ones(2, 2)}, r"1 unknown .*lora_A"),
    "another's name": (
        lambda t: {name.replace("layers.1.", "layers.7."): value for name, value in t.items()},
        r"missing .*layers\.1\..*unknown .*layers\.7\.",
    ),
    "transposed": (
        changed("up", lambda t: t.T.contiguous()),
        r"1 of another shape .*eigenprune_up is \(40, (\d+)\) in place of \(\1, 40\)",
    ),
    "fewer positions": (changed("table", lambda t: t[1:]), r"eigenprune_table is .* in place of"),
}


@pytest.mark.parametrize("case", TENSORS)
@pytest.mark.parametrize("low_memory", [False, True])
def test_tensors_of_an_adapter_are_all_there_and_finite(tiny_folder, damaged, case, low_memory):
    change, message = TENSORS[case]
    folder = damaged(change)
    with pytest.raises(ValueError, match=message) as error:
        peft.PeftModel.from_pretrained(
            plain(tiny_folder("llama")), folder, low_cpu_mem_usage=low_memory
        )
    assert "write it anew with eigenlens.peft.to_peft" in one_sentence(error)


@pytest.mark.parametrize("cut", [0, 5, 200, -40])
def test_a_truncated_adapter_is_named(tiny_folder, damaged, cut):
    folder = damaged(cut=cut)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is (truncated|empty)") as e:
        peft.PeftModel.from_pretrained(plain(tiny_folder("llama")), folder)
    one_sentence(e)


def test_an_adapter_without_its_tensors_or_as_a_pickle(tiny_folder, damaged):
    folder = damaged()
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks adapter_model\.safetensors: copy") as error:
        peft.PeftModel.from_pretrained(plain(tiny_folder("llama")), folder)
    one_sentence(error)
    torch.save({}, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin is a pickle"):
        peft.PeftModel.from_pretrained(plain(tiny_folder("llama")), folder)


def without(name):
    return lambda config: {key: value for key, value in config.items() if key != name}


CONFIGS = {
    "no shapes": (without("shapes"), "no configuration that .*weights are not of the modules"),
    "no weights": (without("weights"), "weights are not of the modules that have shapes"),
    "shape of two": (lambda c: c | {"shapes": {PATH: [32, 40]}}, rf"shapes\.{PATH}"),
    "negative": (lambda c: c | {"shapes": {PATH: [32, -1, 40]}}, "greater than 0"),
    "words": (lambda c: c | {"positions": ["a", "b", "c"]}, r"positions\.0: .*valid integer"),
    "backwards": (lambda c: c | {"positions": [3, -3, 0]}, "end at -3, before they begin at 3"),
    "no hash": (lambda c: c | {"weights": {p: {} for p in c["weights"]}}, "at least 1 item"),
    "other task": (lambda c: c | {"task_type": "SEQ_CLS"}, "task_type: .*CAUSAL_LM"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_is_what_to_peft_writes(tiny_folder, damaged, case):
    change, message = CONFIGS[case]
    with pytest.raises(ValueError, match=message) as error:
        peft.PeftModel.from_pretrained(plain(tiny_folder("llama")), damaged(None, change))
    one_sentence(error)


def test_a_whole_adapter_and_one_without_effect_are_taken(made, tiny_folder, damaged):
    """None of these checks refuses what is right; the default configuration says who makes one."""
    model, frozen, _ = made
    wrapped = peft.PeftModel.from_pretrained(plain(tiny_folder("llama")), damaged()).eval()
    with torch.no_grad():
        found = wrapped(input_ids=LONG).logits
        with el.attach(model, frozen):
            torch.testing.assert_close(found, model(LONG).logits, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"made by eigenlens\.peft\.to_peft"):
        peft.get_peft_model(
            plain(tiny_folder("llama")), EigenpruneAdapterConfig(target_modules=["up_proj"])
        )


def test_merging_a_damaged_adapter_is_told_by_load_model(tiny_folder, damaged):
    folder = damaged(
        changed("up", put(float("nan"))),
        lambda c: c | {"base_model_name_or_path": str(tiny_folder("llama"))},
    )
    with pytest.raises(ValueError, match=r"does not fit its base model .*1 no finite"):
        el.load_model(folder, merge_adapter=True, device="cpu", dtype="float64")
    damaged(None, lambda c: c | {"peft_type": "NOTHING"})
    with pytest.raises(ValueError, match=r"does not fit its base model .*NOTHING"):
        el.load_model(folder, merge_adapter=True, device="cpu", dtype="float64")


# Places that cannot be written to


@pytest.mark.parametrize("form", EXPORTS)
@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_is_no_folder(made, tmp_path, monkeypatch, form, below):
    model, _, shared = made
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    monkeypatch.setattr("eigenlens.export.attach.check_plain", None)  # nothing is computed
    with pytest.raises(ValueError, match=r"notes\.txt is a file: name a folder") as error:
        EXPORTS[form](model, shared, file / below)
    one_sentence(error)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("form", EXPORTS)
def test_the_models_own_folder_is_not_overwritten(made, tiny_folder, form):
    model, _, shared = made
    before = {path.name: path.stat().st_mtime_ns for path in tiny_folder("llama").iterdir()}
    with pytest.raises(ValueError, match="holds the model without the edit: name another folder"):
        EXPORTS[form](model, shared, tiny_folder("llama"))
    found = {path.name: path.stat().st_mtime_ns for path in tiny_folder("llama").iterdir()}
    assert found == before


@pytest.mark.parametrize("form", EXPORTS)
def test_a_folder_is_written_whole_or_not_at_all(made, tmp_path, monkeypatch, form):
    """A write that fails leaves nothing where nothing was, and what was there as it was."""
    model, _, shared = made
    replace = folders.os.replace
    new, old = tmp_path / "new", tmp_path / "old"
    EXPORTS[form](model, shared, old)
    (old / "notes.txt").write_text("mine")
    kept = {path.name: path.read_bytes() for path in old.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        patch.setattr("transformers.modeling_utils.safe_save_file", full)
        for folder in (new, old):
            with pytest.raises(OSError, match="make room") as error:
                EXPORTS[form](model, shared, folder)
            one_sentence(error)
    assert {path.name for path in tmp_path.iterdir()} == {"old"}
    assert {path.name: path.read_bytes() for path in old.iterdir()} == kept
    # Killed between two files: the configuration is not there, so that nothing reads the folder.
    moved = []

    def killed(source, target):
        if moved:
            raise KeyboardInterrupt
        moved.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(folders.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            EXPORTS[form](model, shared, old)
    assert not {"config.json", "adapter_config.json"} & {path.name for path in old.iterdir()}
    EXPORTS[form](model, shared, old)
    assert {path.name: path.read_bytes() for path in old.iterdir()} == kept


# Edits that do not fit


def test_an_edit_that_freezes_nothing_does_nothing_and_is_not_written(made, tmp_path):
    model, _, shared = made
    nothing = shared.scaled(0.0)
    with torch.no_grad():
        assert torch.equal(attached(model, nothing), attached(model, nothing))
        with el.attach(model, nothing):
            found = model(LONG).logits
        assert torch.equal(found, model(LONG).logits)
    for export in EXPORTS.values():
        with pytest.raises(ValueError, match="freezes nothing") as error:
            export(model, nothing, tmp_path / "out")
        one_sentence(error)
    with pytest.raises(ValueError, match="freezes nothing"):
        get_eigenpruned_model(model, nothing)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("use", ["attach", *EXPORTS])
def test_edits_of_other_models_are_refused_everywhere(made, tiny, tiny_folder, tmp_path, use):
    _, _, shared = made

    def used(model, frozen):
        if use == "attach":
            return el.attach(model, frozen)
        return EXPORTS[use](model, frozen, tmp_path / "out")

    other = plain(tiny_folder("llama"))
    other.lm_head.weight.data[0, 0] += 1e-3
    for foreign in (other, plain(tiny_folder("qwen3")), plain(tiny_folder("gpt2"))):
        with pytest.raises(WrongModelError, match="other weights") as error:
            used(foreign, shared)
        one_sentence(error)
    with pytest.raises(WrongModelError, match=r"in float64: give allow_dtype=True"):
        used(plain(tiny_folder("llama"), torch.float32), shared)
    with pytest.raises(ValueError, match="TransformerBridge and no plain model"):
        used(tiny("llama"), shared)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("use", ["attach", *EXPORTS])
def test_what_is_no_edit_or_no_model_is_told(made, tmp_path, use):
    model, _, shared = made
    more = () if use == "attach" else (tmp_path / "out",)
    function = (EXPORTS | {"attach": el.attach})[use]
    for edit in ("frozen.safetensors", None, shared.components):
        with pytest.raises(ValueError, match=r"and no FrozenSet: give what .*FrozenSet\.load"):
            function(model, edit, *more)
    for wrong in ("gpt2", None, torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="no plain model of transformers"):
            function(wrong, shared, *more)


def test_a_tokenizer_with_other_ids_is_not_baked_in(made, tmp_path):
    model, _, shared = made
    core = word_tokenizer().backend_tokenizer
    words = core.get_vocab()
    words["+"], words["x"] = words["x"], words["+"]
    core.model = models.WordLevel(words, unk_token="?")
    other = type(word_tokenizer())(tokenizer_object=core)
    with pytest.raises(WrongModelError, match="tokens have other ids") as error:
        el.bake(model, shared, tmp_path / "out", tokenizer=other)
    one_sentence(error)
    assert not (tmp_path / "out").exists()


FRAMES = {
    "layer": ({"layer": 9}, "Unknown layer 9"),
    "head": ({"head": 50}, "of a head 50"),
    "index": ({"index": 500}, "no component 500"),
    "negative": ({"index": -1}, "no component -1"),
}


@pytest.mark.parametrize("case", FRAMES)
def test_components_that_a_model_does_not_have(made, case):
    model, frozen, _ = made
    change, message = FRAMES[case]
    first = frozen.components.iloc[:1].assign(**change)
    wrong = dataclasses.replace(frozen, components=first, means=frozen.means[:1], spectra=None)
    with pytest.raises(ValueError, match=message) as error:
        el.attach(model, wrong)
    one_sentence(error)


def test_means_that_do_not_fit_or_are_no_numbers(made):
    _, frozen, _ = made
    with pytest.raises(ValueError, match=r"means of \d+ components for 3: take the same rows"):
        dataclasses.replace(frozen, components=frozen.components[:3])
    with pytest.raises(ValueError, match="mean is NaN or infinite"):
        dataclasses.replace(frozen, means=frozen.means.shifted(np.full(len(frozen), np.nan)))


def test_directions_of_other_components_are_refused(made, tmp_path):
    model, frozen, _ = made
    frozen.save(tmp_path / "edit.safetensors", directions=True)
    again = el.FrozenSet.load(tmp_path / "edit.safetensors")
    rows = np.arange(0, len(again), 2)
    fewer = {"components": again.components.iloc[rows], "means": again.means[rows]}
    with pytest.raises(ValueError, match="are not those of its components: leave them out"):
        el.attach(model, dataclasses.replace(again, **fewer))
    half = dataclasses.replace(again, **fewer, directions=None)
    wanted = dataclasses.replace(frozen, **fewer)
    torch.testing.assert_close(attached(model, half), attached(model, wanted))


@pytest.mark.parametrize("cut", [0, 6, 500, -30])
def test_a_truncated_edit_is_named(made, tmp_path, cut):
    path = tmp_path / "frozen.safetensors"
    made[1].save(path, directions=True)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"frozen\.safetensors is truncated") as error:
        el.FrozenSet.load(path)
    one_sentence(error)
    found = run_cli("apply", path, "--prompt", "1")
    assert (found.exit_code, len(found.stderr.strip().splitlines())) == (2, 1)
    assert "is truncated" in found.stderr


# The command line refuses before it loads or measures


@pytest.fixture
def edit_file(made, tmp_path):
    def write(frozen):
        frozen.save(tmp_path / "frozen.safetensors")
        return tmp_path / "frozen.safetensors"

    return write


@pytest.mark.parametrize("form", ["bake", "lora"])
def test_export_refuses_before_it_loads_a_model(made, edit_file, tmp_path, monkeypatch, form):
    monkeypatch.setattr("eigenlens.export.loading.load_plain", None)
    path = edit_file(made[1])
    command = ("export", path, "--to", form, "--out")
    found = run_cli(*command, tmp_path / "out", *(["--task", "cb"] if form == "bake" else []))
    assert found.exit_code == 2, found.output
    assert "means by position: give frozen.shared() (--shared)" in found.stderr
    found = run_cli(*command, path, "--shared")
    assert found.exit_code == 2, found.output
    assert "frozen.safetensors is a file: name a folder" in found.stderr
    found = run_cli(
        "export", edit_file(made[2].scaled(0.0)), "--to", "peft", "--out", tmp_path / "out"
    )
    assert "freezes nothing" in found.stderr


def test_export_refuses_what_cannot_be_baked_before_it_measures(
    tiny, edit_file, tmp_path, monkeypatch
):
    monkeypatch.setattr("eigenlens.cli_edits._measured", None)
    found = run_cli(
        *("export", edit_file(attenuated(tiny("mistral"))), "--to", "bake", "--task", "cb"),
        *("--out", tmp_path / "out", "--device", "cpu"),
    )
    assert found.exit_code == 2, found.output
    assert "which a MistralForCausalLM cannot have" in found.stderr
    assert not (tmp_path / "out").exists()


def test_other_commands_that_write_folders_refuse_files(made, edit_file):
    path = edit_file(made[1])
    for command in (("pull", "somebody/edit"), ("harness-tasks", "--data", path.parent)):
        found = run_cli(*command, "--out", path)
        assert found.exit_code == 2, found.output
        assert "frozen.safetensors is a file: name a folder" in found.stderr
