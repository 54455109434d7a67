"""The shipped model knows what its card says, and stays small."""

import json
import subprocess
import sys

import pytest
import torch

import eigenlens as el
from eigenlens.zoo import ARITH_TINY
from eigenlens.zoo.train import accuracies, all_pairs, tokenizer, train


@pytest.fixture(scope="module")
def arith():
    return el.load_model("arith-tiny", device="cpu")


def test_it_is_small_and_whole():
    assert sum(f.stat().st_size for f in ARITH_TINY.iterdir()) < 4_000_000
    names = {f.name for f in ARITH_TINY.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= names
    assert el.decompose(el.load_model("arith-tiny"), progress=False).n_components == 1536


@pytest.mark.parametrize("name", ["int_add", "int_mult"])
def test_it_knows_both_computations(arith, name):
    task = el.load_task(name, arith.tokenizer, low=0, high=20)
    right = sum(
        el.evaluate(arith, s).accuracy * len(s) for s in (task.train, task.validation, task.test)
    )
    assert right >= 0.99 * 400


def test_it_is_torn_between_them(arith):
    found = {}
    for reading in ("sum", "product"):
        task = el.load_task("ambiguous", arith.tokenizer, reading=reading)
        found[reading] = el.evaluate(arith, task.train).examples
    either = found["sum"]["correct"] | found["product"]["correct"]
    assert either.mean() >= 0.99
    for examples in found.values():
        assert 0.3 <= examples["correct"].mean() <= 0.7
        assert (examples["loss"] < 2).mean() > 0.95  # both readings stay likely on every pair


def test_the_card_states_what_is_measured(arith):
    stated = json.loads((ARITH_TINY / "training.json").read_text())["accuracy"]
    data = all_pairs(tokenizer())
    assert accuracies(arith.original_model, data) == pytest.approx(stated)
    card = (ARITH_TINY / "README.md").read_text(encoding="utf-8")
    for name, value in stated.items():
        assert f"| `{name}` | {value:.2%} |" in card


@pytest.mark.slow
def test_training_is_seeded_and_learns():
    one, curve, _ = train(8, seed=3)
    two, _, _ = train(8, seed=3)
    assert all(map(torch.equal, one.parameters(), two.parameters()))
    assert curve[-1]["loss"] < curve[0]["loss"]


@pytest.mark.slow
def test_it_loads_without_network_or_cache(tmp_path):
    code = "import eigenlens as el; print(el.load_model('arith-tiny', device='cpu').cfg.n_layers)"
    environment = {
        "PATH": "/usr/bin:/bin",
        "HF_HUB_OFFLINE": "1",
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path),
    }
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip().endswith("2")


def test_freezing_uncovers_the_product(arith):
    """The paper's hypothesis in a bottle: 15 of 1,536 components, one shot, unseen pairs."""
    task = el.load_task("ambiguous", arith.tokenizer, reading="product")
    spectra = el.decompose(arith, progress=False)
    scores = el.score(arith, spectra, task.train, criterion="margin", progress=False)
    before = el.evaluate(arith, task.test)
    with el.freeze(arith, el.select(scores, count=15)):
        after = el.evaluate(arith, task.test)
    assert after.accuracy >= before.accuracy + 0.25
    assert el.compare(before, after).p_value < 0.001
