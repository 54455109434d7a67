"""Studies of methods: cells are what they say, go on after an interruption, and add up."""

import json

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from tiny_models import EQUAL

import eigenlens as el
from eigenlens import baselines as bl
from eigenlens.baselines.baseline import Baseline
from eigenlens.files import FileFormatError, load_table, read_yaml, save_table
from eigenlens.metrics import answer_logits
from eigenlens.monitors import output_statistics
from eigenlens.paper.studies import EXPERIMENTS
from eigenlens.paper.studies.config import CONFIGS, StudyConfig
from eigenlens.paper.studies.grid import cells, run_grid
from eigenlens.paper.studies.views import changes, pooled
from eigenlens.statistics import repeated_interval
from eigenlens.tasks import make_batches

SIZES = {"n_train": 40, "n_validation": 20, "n_test": 20}
CONFIG = {
    "models": ["arith-tiny"],
    "seeds": [0, 1],
    "tasks": {"product": {"task": "ambiguous", "arguments": {"reading": "product", **SIZES}}},
    "methods": {
        "before": {"kind": "zero_shot"},
        "ranked": {"kind": "one_shot", "arguments": {"fractions": [0.01, 0.05]}},
        "random": {"kind": "random_components", "like": "ranked", "draws": 2},
        "zero": {"kind": "freezing_part", "arguments": {"part": "zero"}, "like": "ranked"},
        "keys": {"kind": "one_shot", "arguments": {"fractions": [0.1]}, "matrices": ["W_K"]},
        "LASER": {"kind": "laser", "arguments": {"keep": [0.5], "layers": [0]}},
    },
    "probes": {"plus": {"task": "int_add", "arguments": {"high": 20, "n_test": 10}}},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    return run_grid(StudyConfig(**CONFIG), folder), folder


@pytest.fixture(scope="module")
def arith():
    model = el.load_model("arith-tiny", device="cpu")
    return model, el.decompose(model, progress=False)


def test_a_cell_is_the_method_by_hand(run, arith):
    table, _ = run
    model, spectra = arith
    task = el.load_task("ambiguous", reading="product", seed=1, **SIZES)
    found = bl.OneShot(fractions=(0.01, 0.05)).fit(model, spectra, task, seed=1)
    test = bl.measure(model, task.test, found.edit)
    own = table[(table["data"] == "") & (table["seed"] == 1)].set_index("method")
    row = own.loc["ranked"]
    assert row["right"] == test.examples["correct"].sum()
    assert row["n"] == 20
    assert row["loss"] == pytest.approx(test.loss, rel=1e-5)
    assert row["components"] == len(found.edit.frozen)
    assert json.loads(row["chosen"])["components"] == row["components"]
    assert row["forward_examples"] == found.cost.forward_examples
    # the control is matched to that very set, and the keys are all that "keys" may touch
    assert (own.loc["random", "components"] == row["components"]).all()
    assert own.loc["keys", "components"] == round(0.1 * spectra.select(["W_K"]).n_components)
    assert pd.isna(own.loc["LASER", "components"])


def test_a_probe_is_measured_under_the_edit(run, arith):
    table, folder = run
    model, _ = arith
    plus = el.load_task("int_add", high=20, n_test=10, seed=0).test
    rows = table[(table["data"] == "plus") & (table["seed"] == 0)].set_index("method")
    for name in ("before", "ranked", "LASER"):
        cell = rows.loc[name, "cell"]
        edit = bl.load_edit(folder / f"{cell}.safetensors")
        test = bl.measure(model, plus, edit)
        assert rows.loc[name, "right"] == test.examples["correct"].sum()
        assert rows.loc[name, "loss"] == pytest.approx(test.loss, rel=1e-5)
    assert rows.loc["before", "right"] == 10


def test_finished_cells_are_not_made_again(run, monkeypatch):
    table, folder = run

    def refuse(*_, **__):
        raise AssertionError("fitted again")

    monkeypatch.setattr(Baseline, "fit", refuse)
    again = run_grid(StudyConfig(**CONFIG), folder)
    pd.testing.assert_frame_equal(again, table)


@pytest.mark.slow
def test_an_interrupted_study_goes_on_to_the_same_table(run, tmp_path, monkeypatch):
    table, _ = run
    fit, count = Baseline.fit, [0]

    def breaks_off(self, *args, **kwargs):
        count[0] += 1
        if count[0] == 5:
            raise KeyboardInterrupt
        return fit(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Baseline, "fit", breaks_off)
        with pytest.raises(KeyboardInterrupt):
            run_grid(StudyConfig(**CONFIG), tmp_path)
    again = run_grid(StudyConfig(**CONFIG), tmp_path)
    measured = ["method", "seed", "draw", "cell", "data", "right", "components", "correct"]
    pd.testing.assert_frame_equal(again[measured], table[measured])


def test_another_setting_is_another_cell():
    base = {cell.key for cell in cells(StudyConfig(**CONFIG))}
    assert len(base) == 2 * 7
    task = CONFIG["tasks"]["product"]
    changed = [
        {"tasks": {"product": {**task, "batch_size": 7}}},
        {"tasks": {"product": {**task, "n_positions": 2}}},
        {"tasks": {"product": {"task": "ambiguous", "arguments": {"reading": "sum"}}}},
        {"seeds": [2, 3]},
    ]
    for change in changed:
        assert not base & {cell.key for cell in cells(StudyConfig(**{**CONFIG, **change}))}
    # options of one method leave the others, but not those made like it, as they are
    option = {"product": {**task, "options": {"ranked": {"fractions": [0.02]}}}}
    other = {cell.key for cell in cells(StudyConfig(**{**CONFIG, "tasks": option}))}
    kept = {cell.name for cell in cells(StudyConfig(**CONFIG)) if cell.key in other}
    assert kept == {"before", "keys", "LASER"}


GRIDS = sorted(path for path in CONFIGS.glob("*.yaml") if "methods" in read_yaml(path))


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_the_shipped_studies_are_valid(path):
    planned = list(cells(StudyConfig.read(path)))
    assert len({cell.key for cell in planned}) == len(planned)


def test_transfer_and_monitors_use_the_cells_of_the_paper_table():
    made = {name: list(cells(StudyConfig.read(CONFIGS / f"{name}.yaml"))) for name in STUDIES}
    table = {cell.key for cell in made["paper-table"]}
    assert {cell.key for cell in made["monitors"]} <= table
    others = [cell for cell in made["transfer"] if cell.key not in table]
    assert {cell.label for cell in others} == {"a + b", "a x b"}  # arith-tiny's own


STUDIES = ("paper-table", "transfer", "monitors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": {"x": {"kind": "magic"}}}, "Unknown method 'magic'; choose from"),
        (
            {"methods": {"x": {"kind": "laser", "arguments": {"rank": 3}}}},
            "laser does not take rank; it takes keep",
        ),
        ({"methods": {"x": {"kind": "random_components", "like": "y"}}}, "no method above it"),
        ({"tasks": {"x": {"task": "sums"}}}, "unknown task 'sums'"),
        ({"speed": 3}, "speed: Extra inputs"),
    ],
)
def test_a_wrong_study_is_refused_before_it_starts(tmp_path, change, message):
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps({**CONFIG, **change}), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        StudyConfig.read(path)


def test_a_file_that_is_no_study(tmp_path):
    with pytest.raises(FileNotFoundError):
        StudyConfig.read(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("[1, 2]", encoding="utf-8")
    with pytest.raises(FileFormatError, match="mapping"):
        StudyConfig.read(tmp_path / "list.yaml")


def test_seeds_and_draws_are_no_independent_examples():
    def row(seed, draw, right, prompts=None):
        fields = {"model": "m", "label": "t", "method": "x", "seed": seed, "draw": draw}
        told = " ".join(f"{10 * (seed if prompts is None else prompts) + i}" for i in range(10))
        measured = {"right": right, "n": 10, "loss": 1.0, "choice_right": None}
        return {**fields, "prompts": told, **measured}

    def found(*rows):
        (cell,) = pooled(pd.DataFrame(rows)).to_dict("records")
        assert np.isnan(cell["choice"])
        return cell["accuracy"], (cell["low"], cell["high"]), cell["each"]

    wilson = scipy.stats.binomtest(3, 10).proportion_ci(0.95, method="wilson")
    one = found(row(0, 0, 3))
    assert (one[0], one[2]) == (0.3, "30")
    assert one[1] == pytest.approx((wilson.low, wilson.high))
    two = found(row(0, 0, 3), row(1, 0, 5))
    assert two == (0.4, repeated_interval([3, 5], [10, 10], 20), "30 / 50")
    same = found(row(0, 0, 3, prompts=0), row(1, 0, 5, prompts=0))
    assert same == (0.4, repeated_interval([3, 5], [10, 10], 10), "30 / 50")
    drawn = [row(s, d, r) for s, d, r in ((0, 0, 3), (1, 0, 5), (0, 1, 1), (1, 1, 1))]
    assert found(*drawn) == (0.25, repeated_interval([2, 3], [10, 10], 20), "10 to 30 / 10 to 50")
    draws = [row(0, d, r) for d, r in enumerate((3, 1, 5))]
    assert found(*draws) == (0.3, repeated_interval([3, 1, 5], [10] * 3, 10), "10 to 50")
    untold = pd.DataFrame([row(0, 0, 3), row(1, 0, 5)]).drop(columns="prompts")
    assert pooled(untold)["high"].item() == same[1][1]  # as if seeds shared their prompts


def test_changes_are_paired_by_seed_and_example():
    rows = [
        {"method": "before", "seed": 0, "correct": "0011"},
        {"method": "before", "seed": 1, "correct": "0000"},
        {"method": "after", "seed": 0, "correct": "1101"},
        {"method": "after", "seed": 1, "correct": "1100"},
    ]
    table = pd.DataFrame(rows).assign(model="m", label="t", draw=0, data="", n=4)
    prompts = table["seed"].map({0: "a b c d", 1: "e f g h"})
    found = changes(table.assign(prompts=prompts)).set_index("method").loc["after"]
    assert (found["gained"], found["lost"]) == (4, 1)
    assert found["p"] == pytest.approx(2 * (1 + 5) / 2**5)  # both tails of five fair coins
    # Of shared prompts, the third was lost once and the first two gained twice.
    shared = changes(table.assign(prompts="a b c d")).set_index("method").loc["after"]
    assert (shared["gained"], shared["lost"]) == (2, 1)
    assert shared["p"] == pytest.approx(1.0)


def test_output_statistics_are_those_of_the_distribution(tiny):
    model = tiny("gpt2")
    found = output_statistics(model, EQUAL, batch_size=4)
    (batch,) = make_batches(EQUAL, model, len(EQUAL))
    with torch.no_grad():
        p = answer_logits(model, batch)[:, 0].double().softmax(-1).numpy()
    entropies = [scipy.stats.entropy(row) for row in p]
    mean = p.mean(0)
    divergences = [scipy.stats.entropy(row, mean) for row in p]
    tokens = np.bincount(p.argmax(-1))
    assert found.entropy == pytest.approx(np.mean(entropies), rel=1e-5)
    assert found.variance == pytest.approx(p.var(0).sum(), rel=1e-4)
    assert found.information == pytest.approx(np.mean(divergences), rel=1e-3)
    assert found.most_common == tokens.max() / len(EQUAL)
    assert found.n == len(EQUAL)


def test_constant_outputs_carry_no_information(tiny):
    model = tiny("gpt2")
    one = EQUAL.select([0, 0, 0])
    found = output_statistics(model, one)
    assert found.information == pytest.approx(0, abs=1e-9)
    assert found.variance == pytest.approx(0, abs=1e-9)
    assert found.most_common == 1.0


def test_learned_is_the_search_of_that_name(arith):
    model, spectra = arith
    task = el.load_task("ambiguous", reading="sum", **SIZES)
    options = {"steps": 20, "every": 5}
    found = bl.Learned(options=options).fit(model, spectra, task, seed=3)
    scores = el.score(model, spectra, task.train, criterion="mean", progress=False)
    config = el.LearnedConfig(seed=3, **options)
    by_hand = el.learned(model, scores, task.train, task.validation, config, progress=False)
    pd.testing.assert_frame_equal(found.edit.frozen.components, by_hand.frozen.components)
    with pytest.raises(ValueError, match="basis='fourier': choose from svd, qk_ov, random"):
        bl.Learned(basis="fourier")


@pytest.mark.parametrize(
    "basis",
    ["pca", *(pytest.param(b, marks=pytest.mark.slow) for b in ("random", "qk_ov", "neurons"))],
)
def test_gates_go_on_every_basis_and_are_read_back(arith, basis, tmp_path):
    model, spectra = arith
    task = el.load_task("ambiguous", reading="sum", **SIZES)
    options = {"steps": 20, "every": 5, "lr": 1.0}
    learned = bl.Learned(basis=basis, options=options)
    assert learned.name == f"eigenpruning, learned, frozen, {basis} basis"
    edit = learned.fit(model, spectra, task, seed=3).edit
    assert edit.frozen.basis == basis
    assert len(edit.frozen) > 0
    edit.save(tmp_path / "edit.safetensors")
    again = bl.load_edit(tmp_path / "edit.safetensors")
    one, two = (bl.measure(model, task.test, e).examples["loss"] for e in (edit, again))
    np.testing.assert_allclose(one, two, rtol=1e-4)


def test_parts_of_a_given_set_need_no_ranking(arith):
    model, spectra = arith
    task = el.load_task("ambiguous", reading="sum", **SIZES)
    scores = el.score(model, spectra, task.train, progress=False)
    frozen = el.select(scores, count=7)
    found = bl.FreezingPart(part="zero", like=(frozen,)).fit(model, spectra, task)
    assert found.cost.backward_passes == 0
    assert found.edit.frozen.means.is_shared
    pd.testing.assert_frame_equal(found.edit.frozen.components, frozen.components)


def test_draws_share_scores_that_do_not_depend_on_them(arith):
    model, spectra = arith
    task = el.load_task("ambiguous", reading="sum", **SIZES)
    frozen = el.select(el.score(model, spectra, task.train, progress=False), count=7)
    shared = {}
    fits = [
        bl.RandomComponents(like=(frozen,)).fit(model, spectra, task, seed=seed, shared=shared)
        for seed in (0, 1)
    ]
    assert [fit.cost.backward_passes for fit in fits] == [1, 0]
    first, second = (fit.edit.frozen.components for fit in fits)
    assert not first.equals(second)
    alone = bl.RandomComponents(like=(frozen,)).fit(model, spectra, task, seed=1)
    pd.testing.assert_frame_equal(alone.edit.frozen.components, second)


@pytest.mark.parametrize(
    "name",
    [
        "paper-table",
        "multiplication",
        "compare",
        "ablations",
        "architectures",
        "transfer",
        "monitors",
    ],
)
def test_a_study_shows_what_was_measured_also_from_its_file(run, tmp_path, name):
    table, _ = run
    study = EXPERIMENTS[name]
    save_table(tmp_path / "study.parquet", "experiment", table, {})
    stored, _ = load_table(tmp_path / "study.parquet", "experiment")
    page = study.summary(table).to_markdown()
    assert study.summary(stored).to_markdown() == page
    assert study.text(stored) == study.text(table)
    assert study.figure(stored).to_dict() == study.figure(table).to_dict()
    rows = table[table["data"] == ("plus" if name in ("transfer", "monitors") else "")]
    right, n = rows[rows["method"] == "ranked"][["right", "n"]].sum()
    assert f"{right / n:.1%}" in page


def test_transfer_is_the_change_against_the_unedited_model(run):
    table, _ = run
    probed = table[(table["data"] == "plus") & (table["draw"] == 0)]
    kept = table["method"].isin(["before", "zero"])
    (trace,) = EXPERIMENTS["transfer"].figure(table[kept]).data
    shares = probed.groupby("method")[["right", "n"]].sum()
    shares = shares["right"] / shares["n"]
    assert trace.z[0][0] == pytest.approx(100 * (shares["zero"] - shares["before"]))


def test_fraction_orders_shares_by_ranking():
    def row(method, right):
        fields = {"model": "m", "label": "t", "seed": 0, "draw": 0, "data": "", "loss": 1.0}
        return {**fields, "method": method, "right": right, "n": 10, "choice_right": None}

    rows = [row("before", 1), row("max, p = 0.01", 2), row("max, p = 0.4", 5)]
    table = pd.DataFrame([*rows, row("random, p = 0.4", 3)])
    page = EXPERIMENTS["fraction"].summary(table).set_index("ranking")
    assert page.loc["before", "before"].startswith("10.0%")
    assert page.loc["max", "p = 0.01"].startswith("20.0%")
    assert page.loc["random", "p = 0.01"] == ""
    lines = {line.name: line for line in EXPERIMENTS["fraction"].figure(table).data}
    assert list(lines["max"].x) == [0.01, 0.4]
    assert list(lines["max"].y) == [0.2, 0.5]


def harmful(cells):
    """Cells of two splits: right answers of 100, and perplexities of text, by method."""
    rows = []
    for method, (right, perplexities) in cells.items():
        for seed, perplexity in enumerate(perplexities):
            names = {"model": "m", "label": "t", "seed": seed, "draw": 0, "method": method}
            measured = {"right": right[seed], "n": 100, "loss": 1.0, "choice_right": None}
            row = {**names, **measured, "cell": f"{method} {seed}"}
            rows.append({**row, "data": ""})
            rows.append({**row, "data": "text", "perplexity": perplexity})
    return pd.DataFrame(rows)


def test_harm_says_what_methods_reach_within_a_bound():
    cells = {
        "before": ((0, 10), (10.0, 20.0)),
        "frozen, within 0.05": ((80, 70), (10.1, 20.0)),
        "LoRA, within 0.03": ((90, 84), (10.0, 20.6)),
        "one-shot, means by position": ((40, 40), (15.0, 30.0)),
        "one-shot, one mean": ((50, 60), (11.0, 22.0)),
    }
    said = EXPERIMENTS["harm"].text(harmful(cells))
    lora, frozen = np.log(20.6 / 20), np.log(10.1 / 10)
    assert (
        f"t: LoRA 87% at {lora / 2:.3f} (at most {lora:.3f}); frozen 75% at {frozen / 2:.3f} "
        f"(at most {frozen:.3f}). Under one mean (by position): t, one-shot, 55% (40%)." in said
    )


def test_means_are_compared_pair_by_pair():
    cells = {
        "before": ((0,), (10.0,)),
        "by position, frozen": ((30,), (40.0,)),
        "one mean, frozen": ((50,), (20.0,)),
        "by position, attenuated": ((60,), (11.0,)),
        "one mean, attenuated": ((55,), (12.0,)),
    }
    said = EXPERIMENTS["means"].text(harmful(cells))
    assert said.startswith(
        "One mean for all positions does less harm in 1 of 2 comparisons, by a factor of 2 to 2."
    )
    assert f"t, frozen, 50 of 100 right at {np.log(2):.2f} nats" in said
    assert f"(60 at {np.log(1.1):.2f})" in said
