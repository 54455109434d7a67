"""Models of real sizes: made from a seed, and taken through the whole chain stage by stage."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers as tf
from typer.testing import CliRunner

import eigenlens as el
from eigenlens.bench import making, resident
from eigenlens.bench.chain import chain
from eigenlens.bench.configurations import CONFIGURATIONS, configuration
from eigenlens.bench.making import byte_tokenizer, laid_out, make_model
from eigenlens.bench.stages import STAGES, ChainConfig, additions, run_stage
from eigenlens.cli import app

SMALL = {"model_type": "gpt2", "n_layer": 2, "n_embd": 24, "n_head": 3, "vocab_size": 300}
# Of the models' cards: parameters in units of a million.
MILLIONS = {"gpt2-xl": 1558, "phi-2": 2780, "llama-7b": 6738, "llama-70b": 68977}


def small_config():
    return tf.GPT2Config(**{**SMALL, "n_positions": 64, "bos_token_id": None, "eos_token_id": None})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "model"
    make_model(small_config(), folder, shard_bytes=40_000, progress=False)
    return folder


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configurations_have_the_parameters_that_the_models_are_known_for(name):
    model = laid_out(configuration(name), torch.bfloat16)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == MILLIONS[name]
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_made_model_is_one_of_transformers_and_of_its_seed(made, tmp_path):
    shards = sorted(made.glob("*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size < 42_000 for path in shards)
    opened = tf.AutoModelForCausalLM.from_pretrained(made)
    weight = opened.transformer.h[1].mlp.c_fc.weight
    assert weight.detach().std() == pytest.approx(0.02, rel=0.1)  # GPT-2's own initialisation
    assert (opened.transformer.ln_f.weight == 1).all()
    other = tmp_path / "other"
    make_model(small_config(), other, shard_bytes=10_000_000, progress=False)
    again = tf.AutoModelForCausalLM.from_pretrained(other)
    for (name, one), two in zip(opened.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two), name
    make_model(small_config(), tmp_path / "seeded", seed=1, progress=False)
    seeded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "seeded")
    assert not torch.equal(seeded.transformer.h[1].mlp.c_fc.weight, weight)


def test_a_model_is_made_once_and_goes_on_shard_by_shard(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    written = []
    save = safetensors.torch.save_file

    def killed_at_the_third(tensors, path, metadata):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(sorted(tensors))
        save(tensors, path, metadata=metadata)

    with monkeypatch.context() as patch:
        patch.setattr(making.safetensors.torch, "save_file", killed_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            make_model(small_config(), folder, shard_bytes=40_000, progress=False)
    assert not (folder / "config.json").exists()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert len(before) == 2
    assert make_model(small_config(), folder, shard_bytes=40_000, progress=False)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not make_model(small_config(), folder, shard_bytes=40_000, progress=False)
    with pytest.raises(ValueError, match="holds another model"):
        make_model(small_config(), folder, seed=1, progress=False)


@pytest.mark.slow
def test_memory_while_making_stays_at_a_shard(tmp_path):
    """A model of 96 MB in shards of 8 MB, in a process of its own."""
    config = {**SMALL, "n_layer": 8, "n_embd": 496, "n_head": 8, "n_positions": 64}
    code = f"""
import transformers as tf
from pathlib import Path
from eigenlens.bench import resident
from eigenlens.bench.making import make_model
rest = {{"bos_token_id": None, "eos_token_id": None}}
config = tf.GPT2Config(**{{**{config!r}, **rest}})
make_model(config, Path({str(tmp_path)!r}) / "first", shard_bytes=8_000_000, progress=False)
before = resident.forget_peak()
make_model(config, Path({str(tmp_path)!r}) / "model", shard_bytes=8_000_000, progress=False)
print(resident.peak() - before)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    size = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    assert size > 90e6
    assert int(said.stdout.split()[-1]) < 0.5 * size


def test_bytes_are_tokens_and_the_vocabulary_is_full():
    tokenizer = byte_tokenizer(500)
    assert len(tokenizer) == 500
    assert tokenizer.decode(tokenizer("12 + é =").input_ids) == "12 + é ="
    assert len(tokenizer("12 + é =").input_ids) == 9  # é has two bytes
    config = tf.GPT2Config(**{**SMALL, "vocab_size": 256})
    with pytest.raises(ValueError, match="no room for 256 bytes"):
        make_model(config, Path("nowhere"), progress=False)


def test_prompts_have_the_length_that_was_asked_for(made):
    model = el.load_model(made, device="cpu")
    task = additions(model, 5, tokens=30)
    assert len(task.train) == 5
    for prompt in task.train["prompt"]:
        assert 30 <= len(model.tokenizer(prompt).input_ids) < 30 + len("12 + 13 = 25\n")
        *solved, last = prompt.split("\n")
        assert last.endswith("=")
        for line in solved:
            a, _, b, _, found = line.split()
            assert int(a) + int(b) == int(found)


@pytest.mark.slow
def test_every_stage_says_what_it_took(made, tmp_path):
    config = ChainConfig(model=str(made), examples=6, batch_size=3, device="cpu")
    found = {name: run_stage(name, config, tmp_path) for name in STAGES}
    for stage in found.values():
        assert stage["seconds"] > 0
        assert stage["peak"] >= stage["loaded"] > 100e6
    n = 2 * 6 * 24  # six maps of 24 coordinates, whatever their heads
    assert found["decompose"]["components"] == n
    assert found["freeze"]["frozen"] == round(n / 100)
    assert len(found["learned"]["validation_loss"]) == 2
    # the edit that was read back is the one that scores select
    model = el.load_model(made, device="cpu")
    task = additions(model, 6)
    scores = el.score(
        model,
        el.decompose(model, progress=False),
        task.train,
        criterion="margin",
        reference="shared",
        batch_size=3,
        progress=False,
    )
    with el.freeze(model, el.select(scores, 0.01)):
        loss = el.evaluate(model, task.test, progress=False).loss
    assert found["evaluate"]["loss"] == pytest.approx(loss, rel=1e-6)


def test_the_peak_is_forgotten_and_seen_again():
    before = resident.forget_peak()
    block = torch.ones(50 * 2**18)  # 50 MB, gone before anybody looks
    del block
    assert resident.peak() - before > 45e6
    again = resident.forget_peak()
    assert resident.peak() - again < 20e6


@pytest.mark.slow
def test_an_interrupted_chain_goes_on(made, tmp_path):
    config = ChainConfig(model=str(made), examples=6, batch_size=3, device="cpu")
    first = chain(config, tmp_path)
    assert [stage["stage"] for stage in first["stages"]] == list(STAGES)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert len(kept) == 12
    (tmp_path / "evaluate.json").unlink()
    again = chain(config, tmp_path)
    assert again["stages"][:4] == first["stages"][:4]
    assert again["stages"][4]["loss"] == first["stages"][4]["loss"]
    with pytest.raises(ValueError, match="another configuration"):
        chain(config.model_copy(update={"examples": 7}), tmp_path)


def test_the_command_makes_a_model_and_says_what_is_missing(tmp_path):
    file = tmp_path / "small.json"
    file.write_text(json.dumps({**SMALL, "n_positions": 64}))
    run = CliRunner().invoke
    found = run(app, ["bench", "--make", str(file), "--out", str(tmp_path / "model")])
    assert found.exit_code == 0, found.output
    assert (tmp_path / "model" / "config.json").is_file()
    for words, message in (
        (["--make", "gpt5", "--out", str(tmp_path / "x")], "There is no configuration 'gpt5'"),
        (["--make", "gpt2-xl"], "name it with --out"),
        (["--chain", str(tmp_path / "no"), "--out", str(tmp_path / "x")], "is no model here"),
        (["--make", "gpt2-xl", "--chain", "x", "--out", "x"], "give one of them"),
        (["--plan", "gpt5"], "There is no configuration 'gpt5'"),
        (["--gpu"], "name it with --out"),
        (["--fit"], "name it with --out"),
        (["--make", str(file), "--dtype", "int8", "--out", "x"], "no floating point type"),
    ):
        found = run(app, ["bench", *words])
        assert found.exit_code == 2, found.output
        assert message in " ".join(found.output.split())
    assert not (tmp_path / "x").exists()
