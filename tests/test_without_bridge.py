"""Edits that carry their directions, where TransformerLens cannot be imported."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_attach import LONG, PROMPTS, TOKENS, generate, left_padded, plain, teacher_forced
from test_freezing import frozen_half
from test_take_home import attenuated
from tiny_models import FAMILIES, in_families

import eigenlens as el
from eigenlens.frozen_set import UnplacedError, WrongModelError
from eigenlens.places import is_unchanged, plain_parameters
from eigenlens.positions import prompt_ends_at

# Attaches each edit to a plain model, bakes and writes adapters of the shared ones; writes what it
# found beside the edit.
SCRIPT = """
import json, sys, warnings
sys.modules["transformer_lens"] = None  # importing it fails
warnings.simplefilter("ignore")
import peft, torch, transformers
import eigenlens as el
from eigenlens.double import StayDouble
from eigenlens.peft import to_peft
from eigenlens.positions import prompt_ends_at
from pathlib import Path

StayDouble().__enter__()  # as the tests do
root = Path(sys.argv[1])
given = torch.load(root / "given.pt")
made = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def logits(model):
    with torch.no_grad():
        return model(given["tokens"]).logits


for case in sorted(root.glob("*/*")):
    def plain(case=case):
        return transformers.AutoModelForCausalLM.from_pretrained(
            root / "models" / case.parent.name, dtype=case.name
        ).eval()

    if case.parent.name == "models":
        continue
    model = plain()
    before = logits(model)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    found = {}
    with el.attach(model, el.FrozenSet.load(case / "edit.safetensors")):
        with prompt_ends_at(model, 4):
            found["logits"] = logits(model)
        for mask in ("mask", "whole"):
            tokens = given["padded" if mask == "mask" else "long"]
            options = {"attention_mask": given[mask], **made}
            found[mask] = model.generate(tokens, **options)
    found["undone"] = torch.equal(logits(model), before) and hooks == [
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()
    ]
    shared = el.FrozenSet.load(case / "shared.safetensors")
    with el.attach(model, shared):
        found["shared"] = logits(model)
    el.to_lora(model, shared, case / "lora")
    to_peft(model, shared, case / "peft")
    for form in ("lora", "peft"):
        wrapped = peft.PeftModel.from_pretrained(plain(), case / form).eval()
        with torch.no_grad():
            found[form] = wrapped(input_ids=given["tokens"]).logits
    try:
        el.bake(model, shared, case / "baked")
    except ValueError as error:
        found["refused"] = str(error)
    else:
        baked = transformers.AutoModelForCausalLM.from_pretrained(case / "baked", dtype=case.name)
        found["baked"] = logits(baked.eval())
    torch.save(found, case / "found.pt")
assert not any(name.startswith("transformer_lens.") for name in sys.modules)
"""


def run_without(*arguments, **options):
    """A Python in which importing TransformerLens fails, on this copy of the package."""
    environment = {**os.environ, "PYTHONPATH": str(Path(el.__file__).parents[1])}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)


def found_elsewhere(tiny_folder, root, dtype):
    """Bridge, edits and what the script found for every family in a type, by family."""
    (root / "models").mkdir()
    tokens, mask = left_padded()
    whole = torch.ones_like(LONG)
    torch.save(
        {"tokens": TOKENS, "padded": tokens, "mask": mask, "long": LONG, "whole": whole},
        root / "given.pt",
    )
    edits = {}
    for family in FAMILIES:
        (root / "models" / family).symlink_to(tiny_folder(family))
        bridge = el.load_model(tiny_folder(family), dtype=dtype, device="cpu")
        edits[family] = bridge, frozen_half(bridge, fraction=0.3), attenuated(bridge)
        folder = root / family / dtype
        folder.mkdir(parents=True)
        for frozen, name in zip(edits[family][1:], ("edit", "shared"), strict=True):
            frozen.save(folder / f"{name}.safetensors", directions=True)
    script = root / "script.py"
    script.write_text(SCRIPT)
    done = run_without(script, root)
    assert done.returncode == 0, done.stderr
    return {
        family: (*made, torch.load(root / family / dtype / "found.pt"))
        for family, made in edits.items()
    }


@pytest.fixture(scope="module")
def elsewhere(tiny_folder, tmp_path_factory):
    """:func:`found_elsewhere` by type, each made once."""
    made = {}

    def of(dtype):
        if dtype not in made:
            made[dtype] = found_elsewhere(tiny_folder, tmp_path_factory.mktemp(dtype), dtype)
        return made[dtype]

    return of


@pytest.mark.slow
@in_families()
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "float64"])
def test_logits_and_texts_are_those_of_the_bridge(elsewhere, family, dtype):
    bridge, frozen, shared, found = elsewhere(dtype)[family]
    tolerance = 1e-10 if dtype == "float64" else 1e-4
    close = {"rtol": tolerance, "atol": tolerance}
    with torch.no_grad(), el.freeze(bridge, frozen), prompt_ends_at(bridge, 4):
        torch.testing.assert_close(found["logits"], bridge(TOKENS), **close)
    assert found["undone"]
    for mask, prompts in (("mask", PROMPTS), ("whole", PROMPTS[1:])):
        for row, prompt in enumerate(prompts):
            text = found[mask][row, -6:].tolist()
            _, logits = teacher_forced(bridge, frozen, prompt, text)
            best = logits.max(-1).values
            written = logits.gather(-1, torch.tensor(text)[:, None])[:, 0]
            torch.testing.assert_close(written, best, **close)  # in float32 there may be ties
    with torch.no_grad(), el.freeze(bridge, shared):
        wanted = bridge(TOKENS)
    for way in ("shared", "lora", "peft", *(["baked"] if "baked" in found else [])):
        torch.testing.assert_close(found[way].to(wanted), wanted, **close)
    assert ("baked" in found) != ("cannot have" in found.get("refused", ""))


@pytest.mark.slow
def test_every_family_but_those_without_biases_was_baked(elsewhere):
    made = elsewhere("float64")
    refused = {family for family in FAMILIES if "refused" in made[family][-1]}
    assert refused == {"phi3", "mistral", "gemma2", "gemma3", "qwen3", "gptj"}


@in_families()
def test_the_plain_model_inside_a_bridge_is_read_as_it_is(tiny, tiny_folder, family):
    """Names and numbers of all parameters are those that transformers has."""
    wanted = dict(plain(tiny_folder(family)).named_parameters())
    found = dict(plain_parameters(tiny(family)))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert is_unchanged(tiny(family))


def test_a_bridge_whose_split_weights_were_changed_is_no_plain_model(tiny_folder):
    """GPT-NeoX' queries are a copy: an edit of other ones must not fit the file's weights."""
    bridge = el.load_model(tiny_folder("gpt_neox"), dtype="float64", device="cpu")
    with torch.no_grad():
        bridge.blocks[0].attn.q.original_component.weight[0, 0] += 0.1
    assert not is_unchanged(bridge)
    frozen = frozen_half(bridge)
    assert frozen.provenance.plain is None
    with pytest.raises(WrongModelError, match="other weights"):
        el.attach(plain(tiny_folder("gpt_neox")), frozen)


def test_attaching_makes_no_bridge_where_directions_are_known(tiny, tiny_folder, monkeypatch):
    model, frozen = plain(tiny_folder("phi3")), frozen_half(tiny("phi3"), fraction=0.3)
    with el.attach(model, dataclasses.replace(frozen, spectra=None)):
        wanted = generate(model, LONG)
    monkeypatch.setattr("eigenlens.export.around.bridge_around", None)
    with el.attach(model, frozen):
        assert torch.equal(generate(model, LONG), wanted)
    with pytest.raises(TypeError):
        el.attach(model, dataclasses.replace(frozen, spectra=None))
    with pytest.raises(UnplacedError, match="save"):
        dataclasses.replace(frozen, spectra=None).directions_in(model)


WITHOUT = """
import sys
sys.modules["transformer_lens"] = None
from eigenlens.cli import app
app(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def shared_edit(tiny_folder, tmp_path_factory):
    bridge = el.load_model(tiny_folder("llama"), dtype="float32", device="cpu")
    folder = tmp_path_factory.mktemp("edit")
    frozen = attenuated(bridge, ["W_Q", "W_out"])
    frozen.save(folder / "with.safetensors", directions=True)
    frozen.save(folder / "without.safetensors")
    return folder


@pytest.mark.slow
def test_apply_and_export_need_no_bridge(shared_edit, tiny_folder, tmp_path):
    edit = shared_edit / "with.safetensors"
    given = ("--prompt", "1 + 2 =", "--new-tokens", 4, "--device", "cpu", "--json")
    found = run_without("-c", WITHOUT, "apply", edit, *given)
    assert found.returncode == 0, found.stderr
    (row,) = json.loads(found.stdout)
    model = plain(tiny_folder("llama"), torch.float32)
    with el.attach(model, el.FrozenSet.load(edit)):
        wanted = generate(model, torch.tensor([[8, 3, 9, 6]]), max_new_tokens=4)
    words = el.load_model(tiny_folder("llama"), device="cpu").tokenizer
    assert row["after"] == words.decode(wanted[0, 4:], skip_special_tokens=True)
    assert row["before"] != row["after"]
    done = run_without("-c", WITHOUT, "export", edit, "--to", "bake", "--out", tmp_path / "baked")
    assert done.returncode == 0, done.stderr
    assert torch.equal(
        generate(plain(tmp_path / "baked", torch.float32), torch.tensor([[8, 3, 9, 6]]))[0, :8],
        wanted[0],
    )


@pytest.mark.slow
def test_an_edit_without_directions_says_what_it_needs(shared_edit):
    found = run_without(
        "-c", WITHOUT, "apply", shared_edit / "without.safetensors", "--prompt", "1"
    )
    assert found.returncode == 2
    assert "save(path, directions=True) where TransformerLens is installed" in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1
