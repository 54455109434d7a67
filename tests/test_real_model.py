"""The main job on SmolLM2-135M-Instruct, on a small budget."""

import pytest
import torch
from test_attach import plain
from test_take_home import check_same_answers_everywhere

import eigenlens as el
from eigenlens import pipeline
from eigenlens.models.known import resolve

pytestmark = pytest.mark.real
TASK = {"low": 10, "high": 30, "n_train": 300, "n_validation": 50, "n_test": 50}


@pytest.fixture(scope="module")
def one_shot(tmp_path_factory):
    """Freezing by the worst case, as the paper's code ranks."""
    config = el.EigenpruneConfig(
        model="smollm2-135m", task="int_add", task_args={"low": 10, "high": 30}, criterion="max",
        reference="mean", protect={}, search="one_shot", search_args={"fractions": [0.4]},
        device="cpu",
    )  # fmt: skip
    out = tmp_path_factory.mktemp("runs") / "one_shot"
    return pipeline.run(config, out, progress=False), out


def test_freezing_by_the_worst_case_triples_accuracy(one_shot):
    result, _ = one_shot
    assert len(result.scores) == 97_920
    assert len(result.frozen) == 39_168
    assert result.after.accuracy >= 3 * result.before.accuracy
    assert result.after.accuracy >= 0.05  # a prototype: 2 % → 14 %
    assert result.after.loss < result.before.loss - 0.3


def test_learned_gates_teach_it_to_add(tmp_path):
    """A third of the steps of the default; three times as many reach more (figures/searches.md)."""
    config = el.EigenpruneConfig(
        model="smollm2-135m", task="int_add", task_args=TASK, device="cpu",
        protect={}, search_args={"steps": 80},
    )  # fmt: skip
    result = pipeline.run(config, tmp_path, progress=False)
    assert result.frozen.edit == "frozen"
    assert result.frozen.fraction < 0.05
    assert result.before.accuracy < 0.1
    assert result.after.accuracy > 0.5
    assert result.comparison.p_value < 1e-4


def test_a_frozen_set_read_back_gives_the_same_numbers(one_shot):
    result, out = one_shot
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


def test_weights_in_bfloat16_run(one_shot):
    model = el.load_model("smollm2-135m", dtype=torch.bfloat16, device="cpu")
    task = el.load_task("int_add", model.tokenizer, low=10, high=30)
    found = el.evaluate(model, task.test)
    assert found.loss == pytest.approx(one_shot[0].before.loss, rel=0.05)


def test_an_edit_gives_the_same_answers_wherever_it_lives(one_shot, tmp_path):
    model = el.load_model("smollm2-135m", device="cpu")
    source = resolve("smollm2-135m")
    check_same_answers_everywhere(
        lambda folder=source: plain(folder, torch.float32),
        model,
        one_shot[0].frozen,
        el.load_task("int_add", model.tokenizer, low=10, high=30).test,
        tmp_path,
    )
