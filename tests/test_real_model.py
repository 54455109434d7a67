"""The main job on SmolLM2-135M-Instruct, with the numbers that the README states."""

import json
import re
from pathlib import Path

import pytest
import torch

import eigenlens as el
from eigenlens import pipeline

pytestmark = pytest.mark.real
README = Path(__file__).parent.parent / "README.md"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What `make demo` runs."""
    config = el.EigenpruneConfig(
        model="smollm2-135m", task="int_add", task_args={"low": 10, "high": 30},
        criterion="max", fraction=0.4, device="cpu",
    )  # fmt: skip
    out = tmp_path_factory.mktemp("runs") / "demo"
    return pipeline.run(config, out, progress=False), out


def test_freezing_by_the_worst_case_triples_accuracy(demo):
    result, _ = demo
    assert len(result.scores) == 97_920
    assert len(result.frozen) == 39_168
    assert result.after.accuracy >= 3 * result.before.accuracy
    assert result.after.accuracy >= 0.05  # a prototype: 2 % → 14 %
    assert result.after.loss < result.before.loss - 0.3


def test_the_readme_states_what_the_run_measured(demo):
    result, out = demo
    text = README.read_text(encoding="utf-8")
    for name, e in (("before", result.before), ("after", result.after)):
        row = re.search(rf"^\| {name} \|(.+)\|$", text, re.MULTILINE)
        assert row, f"README has no row {name!r}"
        low, high = e.interval
        stated = [cell.strip() for cell in row.group(1).split("|")]
        assert stated == [f"{e.accuracy:.1%}", f"{low:.1%} … {high:.1%}", f"{e.loss:.3f}"]
    assert (
        json.loads((out / "metrics.json").read_text())["after"]["accuracy"] == result.after.accuracy
    )


def test_a_frozen_set_read_back_gives_the_same_numbers(demo):
    result, out = demo
    model = el.load_model("smollm2-135m", device="cpu")
    task = el.load_task("int_add", model.tokenizer, low=10, high=30)
    with el.freeze(model, el.FrozenSet.load(out / "frozen.safetensors", model)):
        again = el.evaluate(model, task.test)
        text = model.generate("11 + 12 =", max_new_tokens=3, do_sample=False, verbose=False)
    assert again.examples["loss"].to_numpy() == pytest.approx(
        result.after.examples["loss"], abs=1e-4
    )
    assert text.startswith("11 + 12 =")
    assert el.evaluate(model, task.test).loss == pytest.approx(result.before.loss, abs=1e-6)


def test_weights_in_bfloat16_run(demo):
    model = el.load_model("smollm2-135m", dtype=torch.bfloat16, device="cpu")
    task = el.load_task("int_add", model.tokenizer, low=10, high=30)
    found = el.evaluate(model, task.test)
    assert found.loss == pytest.approx(demo[0].before.loss, rel=0.05)
