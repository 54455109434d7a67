"""Searches: gradients of gates, guards that hold, resumption, a model left as it was."""

import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import EQUAL, MIXED, in_families

import eigenlens as el
from eigenlens import provenance
from eigenlens.gates import Gates
from eigenlens.metrics import answer_logits, answer_loss
from eigenlens.search import (
    GuardedConfig,
    LearnedConfig,
    Protection,
    guarded,
    iterative,
    learned,
    one_shot,
)
from eigenlens.search.checked_steps import _hold_out, _try
from eigenlens.search.gate_training import gated
from eigenlens.search.ranking import scores_under
from eigenlens.tasks import make_batches, tokenising

SMALL = {"batch_size": 60, "progress": False}


def learn(*data, protect=None, checkpoint=None, keep=False, **options):
    config = LearnedConfig(batch_size=SMALL["batch_size"], **options)
    return learned(*data, config, keep=keep, protect=protect, checkpoint=checkpoint, progress=False)


def guard(*data, protect=None, checkpoint=None, **options):
    config = GuardedConfig(batch_size=SMALL["batch_size"], **options)
    return guarded(*data, config, protect=protect, checkpoint=checkpoint, progress=False)


NONE = np.array([], dtype=int)


@pytest.fixture(scope="module")
def arith():
    model = el.load_model("arith-tiny", dtype=torch.float64, device="cpu")
    task = el.load_task("ambiguous", model.tokenizer, n_train=60, n_validation=40, n_test=40)
    spectra = el.decompose(model, progress=False)
    base = el.score(model, spectra, task.train, criterion="margin", progress=False)
    return model, base, task


def loss(model, data):
    with torch.no_grad():
        values = [
            answer_loss(answer_logits(model, b), b).sum() for b in make_batches(data, model, 60)
        ]
    return float(sum(values)) / len(data)


def gate_slopes(model, base, data, z, batch_size=50):
    with Gates(model, base) as gates:
        gates.z = z
        return sum(gates.gradient(b)[1] for b in make_batches(data, model, batch_size)) / len(data)


def test_the_gradient_of_a_gate_is_the_slope_of_the_loss(arith):
    model, base, task = arith
    z = torch.tensor(np.random.default_rng(0).uniform(0.05, 0.3, len(base)))
    slopes = gate_slopes(model, base, task.train, z).numpy()
    for row in np.argsort(-np.abs(slopes))[:200:40]:
        values = []
        for step in (-1e-5, 1e-5):
            moved = z.clone()
            moved[row] += step
            with el.freeze(model, gated(base, moved)):
                values.append(loss(model, task.train))
        assert (values[1] - values[0]) / 2e-5 == pytest.approx(slopes[row], rel=1e-4, abs=1e-7)


@in_families(["gpt2", "llama", "phi", "gemma2", "opt", "falcon"])
@pytest.mark.parametrize("data", [EQUAL, MIXED])
def test_gates_do_what_freezing_does(tiny, family, data):
    """Logits under gates equal those of a FrozenSet with the same strengths, also with padding."""
    model = tiny(family)
    base = el.score(model, el.decompose(model, progress=False), data, progress=False)
    z = torch.tensor(np.random.default_rng(1).uniform(0, 1, len(base))).round(decimals=1)
    (batch,) = make_batches(data, model, len(data))
    own = [vars(m.module).get("forward") for m in el.weight_matrices(model)]
    with torch.no_grad():
        before = answer_logits(model, batch)
        with el.freeze(model, gated(base, z)):
            frozen = answer_logits(model, batch)
        with Gates(model, base) as gates:
            gates.set(z)
            through_gates = answer_logits(model, batch)
        after = answer_logits(model, batch)
    torch.testing.assert_close(through_gates, frozen, rtol=1e-9, atol=1e-9)
    assert torch.equal(before, after)
    assert own == [vars(m.module).get("forward") for m in el.weight_matrices(model)]
    assert (frozen - before).abs().max() > 1e-6


@in_families(["gpt2", "llama", "phi"])
@pytest.mark.parametrize("criterion", ["mean", "fisher"])
@pytest.mark.parametrize("n_positions", [None, 2])
def test_scores_under_an_edit_are_the_gradients_of_its_gates(tiny, family, criterion, n_positions):
    """Means stay those of the unedited model: what they are under the edit does not matter.

    To freeze what is frozen changes nothing, so its score is zero, whatever the slope of its gate.
    """
    model = tiny(family)
    base = el.score(
        model,
        el.decompose(model, progress=False),
        MIXED,
        criterion=criterion,
        n_positions=n_positions,
        progress=False,
    )
    rows = np.random.default_rng(2).permutation(len(base))[: len(base) // 2]
    z = torch.zeros(len(base), dtype=torch.float64)
    z[rows] = 1
    under = scores_under(model, base, rows, MIXED, batch_size=2)
    open_ = 1 - z
    expected = open_ * gate_slopes(model, base, MIXED, z)
    np.testing.assert_allclose(under.with_criterion("mean").delta_loss, expected, atol=1e-10)
    part = MIXED.select([0, 1])  # on fewer examples, with positions that these lack
    some = scores_under(model, base, rows, part, batch_size=2)
    expected = open_ * gate_slopes(model, base, part, z)
    np.testing.assert_allclose(some.with_criterion("mean").delta_loss, expected, atol=1e-10)


def test_means_of_other_components_are_refused(tiny):
    model = tiny("gpt2")
    spectra = el.decompose(model, progress=False)
    base = el.score(model, spectra.select(["W_Q"]), MIXED, progress=False)
    with pytest.raises(ValueError, match="The means are of"):
        el.score(model, spectra.select(["W_O"]), MIXED, means=base, progress=False)


@in_families(["gpt2", "llama", "phi"])
def test_at_closed_gates_the_gradient_is_the_score(tiny, family):
    model = tiny(family)
    base = el.score(model, el.decompose(model, progress=False), MIXED, progress=False)
    slopes = gate_slopes(model, base, MIXED, torch.zeros(len(base), dtype=torch.float64))
    np.testing.assert_allclose(slopes, base.delta_loss, atol=1e-10)


def test_gates_leave_the_model_after_an_exception(arith):
    model, base, task = arith
    before = loss(model, task.validation)

    def fail():
        with Gates(model, base) as gates:
            gates.set(torch.ones(len(base), dtype=torch.float64))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert loss(model, task.validation) == before
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize("attenuate", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_learned_gates_help_and_leave_the_model_as_it_was(arith, attenuate):
    model, base, task = arith
    before = loss(model, task.validation)
    found = learn(
        model,
        base,
        task.train,
        task.validation,
        steps=60,
        lr=0.3,
        attenuate=attenuate,
    )
    assert loss(model, task.validation) == before
    strength = found.frozen.to_pandas()["strength"]
    assert (strength < 1).any() if attenuate else (strength == 1).all()
    assert ("attenuated" in found.method) == attenuate
    with el.freeze(model, found.frozen):
        after = el.evaluate(model, task.validation)
    chosen = found.trace[found.trace["chosen"]].iloc[0]
    assert after.accuracy == chosen["validation_accuracy"] == found.trace.validation_accuracy.max()
    assert after.loss == pytest.approx(chosen["validation_loss"])
    assert after.accuracy > found.trace["validation_accuracy"][0] + 0.2


@pytest.mark.parametrize(
    "options",
    [
        {"relax": "hard_concrete", "dropout": 0.0, "sparsity": 1.0},
        pytest.param({"relax": "penalised"}, marks=pytest.mark.slow),
        pytest.param({"spread": 2.0}, marks=pytest.mark.slow),
    ],
)
def test_other_ways_to_train_gates_help_too(arith, options):
    model, base, task = arith
    data = (model, base, task.train, task.validation)
    found = learn(*data, steps=60, lr=0.3, **options)
    assert (found.frozen.components["strength"] == 1).all()
    assert found.trace["validation_accuracy"].max() > found.trace["validation_accuracy"][0] + 0.2


def test_gates_start_in_the_order_of_the_scores(arith, monkeypatch):
    """The first look under open gates, before any step of length, shows how they started."""
    model, base, task = arith
    shown, show = [], Gates.set
    monkeypatch.setattr(Gates, "set", lambda self, z: (shown.append(z), show(self, z)))
    options = {"steps": 1, "lr": 1e-9, "start": 0.2, "spread": 1.0, "sharpness": 1.0}
    learn(model, base, task.train, task.validation, attenuate=True, **options)
    z = shown[-1].double().numpy()[np.argsort(base.delta_loss)]
    assert (np.diff(z) < 0).all()
    logits = np.log(z / (1 - z))
    assert logits[[0, -1]] == pytest.approx(np.log(0.25) + np.array([1, -1]), abs=1e-5)


def test_one_shot_takes_the_best_fraction(arith):
    model, base, task = arith
    found = one_shot(model, base, task.validation, fractions=(0.5, 0.01))
    assert found.trace["fraction"].tolist() == [0, 0.01, 0.5]
    for fraction, accuracy in found.trace[["fraction", "validation_accuracy"]].to_numpy():
        with el.freeze(model, el.select(base, fraction)):
            assert el.evaluate(model, task.validation).accuracy == accuracy
    assert len(found.frozen) == found.trace[found.trace["chosen"]]["components"].iloc[0]


def test_one_shot_may_freeze_nothing(arith):
    model, base, task = arith
    worst = base.with_criterion("mean")
    worst = replace(worst, components=worst.components.assign(effect=-worst.delta_loss))
    harmful = {"fractions": (0.02, 0.1)}
    assert len(one_shot(model, worst, task.validation, **harmful).frozen) == 0
    assert len(one_shot(model, worst, task.validation, or_nothing=False, **harmful).frozen) > 0


def test_iterative_takes_the_best_step_of_its_trace(arith):
    model, base, task = arith
    found = iterative(model, base, task.train, task.validation, step=4, steps=4, **SMALL)
    assert found.trace["components"].tolist() == [0, 4, 8, 12, 16]
    with el.freeze(model, found.frozen):
        after = el.evaluate(model, task.validation)
    assert after.accuracy == found.trace["validation_accuracy"].max()
    with el.freeze(model, el.select(base, count=4)):
        first = el.evaluate(model, task.validation)
    assert found.trace["validation_accuracy"][1] == first.accuracy


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 100),
    step=st.sampled_from([1, 5, 40, 200]),
    share=st.sampled_from([0.3, 0.5]),
    family=st.sampled_from(["gpt2", "llama"]),
)
def test_guarded_never_ends_with_a_higher_calibration_loss(tiny, seed, step, share, family):
    """On random models, where first-order scores are as often wrong as right."""
    model = tiny(family)
    data = MIXED
    base = el.score(model, el.decompose(model, progress=False), data, progress=False)
    found = guard(model, base, data, data, step=step, steps=4, calibration=share, seed=seed)
    _, held_out = _hold_out(data, share, seed)
    before = el.evaluate(model, held_out).loss
    with el.freeze(model, found.frozen):
        after = el.evaluate(model, held_out).loss
    assert after <= before
    losses = found.trace["calibration_loss"]
    assert losses[0] == pytest.approx(before)
    assert (losses.diff().dropna() <= 0).all()
    assert el.evaluate(model, held_out).loss == before


@pytest.mark.parametrize(
    ("harm", "kept", "blamed"),
    [
        ([], [0, 1, 2, 3, 4, 5, 6, 7], []),  # all help: all kept
        ([6], [0, 1, 2, 3, 4, 5, 7], [6]),  # only the one that harms is left out
        ([0, 1], [2, 3, 4, 5, 6, 7], [0, 1]),
        ([0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11], [0, 1, 2, 3, 4, 5, 6, 7]),  # the next are tried
    ],
)
def test_a_step_is_halved_until_it_helps(harm, kept, blamed):
    def check(rows, loss):
        found = 1.0 - 0.1 * len(rows) + 10 * np.isin(rows, harm).sum()
        return found if found < loss else None

    made = _try(NONE, np.arange(12), 8, 1.0, check)
    assert made.accepted.tolist() == kept
    assert made.blamed.tolist() == blamed
    assert made.loss == pytest.approx(1.0 - 0.1 * len(kept))


def test_a_step_that_runs_out_of_trials_blames_only_what_it_tried_alone():
    tried = []

    def check(rows, loss):
        tried.append(rows.tolist())

    made = _try(NONE, np.arange(1000), 512, 1.0, check)
    assert len(tried) == made.trials == 32
    assert made.blamed.tolist() == [rows[0] for rows in tried if len(rows) == 1]
    assert not len(made.accepted)


class Killed(Exception):
    pass


def killed_after(monkeypatch, looks):
    """Make the search die in its n-th look at data."""
    left = [looks]

    def dying(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return el.evaluate(*args, **kwargs)

    monkeypatch.setattr("eigenlens.search.result.evaluate", dying)


def run_search(name, arith, **more):
    model, base, task = arith
    data = (model, base, task.train, task.validation)
    if "protected" in name:
        more["protect"] = Protection(model, {"validation": task.test}, bound=0.5)
    if "iterative" in name:
        return iterative(*data, step=3, steps=4, **SMALL, **more)
    if "guarded" in name:
        return guard(*data, step=8, steps=3, **more)
    if "hard" in name:
        more["relax"] = "hard_concrete"
    more["keep"] = name == "kept"
    return learn(*data, steps=25, every=5, attenuate="attenuated" in name, **more)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "iterative",
        "learned",
        "guarded",
        "attenuated",
        "kept",
        "hard concrete",
        "protected guarded",
        "protected learned",
    ],
)
def test_a_killed_search_resumes_to_the_same_result(arith, monkeypatch, tmp_path, name):
    whole = run_search(name, arith)
    looks = 0
    while True:
        looks += 9 if "guarded" in name else 1  # guarded looks once for every set it tries
        state = tmp_path / f"{looks}.safetensors"
        with monkeypatch.context() as patch:
            killed_after(patch, looks)
            try:
                run_search(name, arith, checkpoint=state)
                break
            except Killed:
                pass
        resumed = run_search(name, arith, checkpoint=state)
        pd.testing.assert_frame_equal(resumed.trace, whole.trace)
        pd.testing.assert_frame_equal(resumed.frozen.to_pandas(), whole.frozen.to_pandas())
    assert looks > 4


def test_a_search_that_stopped_early_stays_where_it_stopped(arith, tmp_path):
    """Killed after its last step, before anyone kept the result: nothing is trained on top."""
    options = {"patience": 1, "lr": 1e-6, "checkpoint": tmp_path / "state.safetensors"}
    first, again = (run_search("learned", arith, **options) for _ in range(2))
    assert first.trace["step"].tolist() == [0, 5]
    pd.testing.assert_frame_equal(again.trace, first.trace)


def test_guarded_goes_on_where_a_step_ran_out_of_trials(arith, monkeypatch):
    model, base, task = arith
    monkeypatch.setattr("eigenlens.search.checked_steps._TRIALS", 1)
    found = guard(model, base, task.train, task.validation, step=len(base), steps=4)
    assert found.trace["components"].tolist()[:2] == [0, 0]
    assert found.trace["components"].iloc[-1] > 0
    assert (found.trace["calibration_loss"].diff().dropna() <= 0).all()


def test_a_resumed_optimiser_stays_where_its_parameters_are(arith, monkeypatch, tmp_path):
    """Its state came back on the CPU, whatever the device."""
    model, base, _ = arith
    state = tmp_path / "state.safetensors"
    run_search("learned", arith, checkpoint=state)
    seen = []
    load = torch.optim.Adam.load_state_dict

    def placed(self, given):
        load(self, given)
        seen.append(self.state[self.param_groups[0]["params"][0]])

    monkeypatch.setattr(torch.optim.Adam, "load_state_dict", placed)
    run_search("learned", arith, checkpoint=state)
    (found,) = seen
    assert found["exp_avg"].device == base.spectra_on(model)["blocks.0.W_Q"].device
    assert float(found["step"]) == 25


def test_weights_are_hashed_and_data_tokenised_once(arith, monkeypatch):
    """There were 84 hashes of all weights and 42 tokenisations in three steps of ``guarded``."""
    model, base, task = arith
    hashes, passes = [], []
    made, encode = provenance.hash_tensors, tokenising._encode

    def count(named):
        hashes.append(1)
        return made(named)

    monkeypatch.setattr(provenance, "hash_tensors", count)
    monkeypatch.setattr(
        tokenising, "_encode", lambda rows, t: (passes.append(len(rows)), encode(rows, t))[1]
    )
    guard(model, base, task.train, task.validation, step=8, steps=3)
    assert len(hashes) == 1
    assert sum(passes) <= len(task.train) + len(task.validation)


def test_a_step_that_accepted_nothing_is_not_scored_again(arith, monkeypatch):
    model, base, task = arith
    scored = []
    module = sys.modules["eigenlens.search.checked_steps"]
    under = module.scores_under
    monkeypatch.setattr(module, "scores_under", lambda *a: (scored.append(len(a[2])), under(*a))[1])
    monkeypatch.setattr(module, "_TRIALS", 1)
    found = guard(model, base, task.train, task.validation, step=len(base), steps=6)
    counts = found.trace["components"].tolist()
    assert counts[:2] == [0, 0]
    assert scored == list(dict.fromkeys(counts[:-1]))


def test_a_checkpoint_of_other_components_is_refused(arith, tmp_path):
    """W_Q and W_O have as many components, so the numbers of their rows alone say nothing."""
    model, base, task = arith
    state = tmp_path / "state.safetensors"
    spectra = base.spectra_on(model)

    def run(kind):
        part = el.score(model, spectra.select([kind]), task.train, progress=False)
        iterative(
            model, part, task.train, task.validation, step=3, steps=1, checkpoint=state, **SMALL
        )

    run("W_Q")
    run("W_Q")
    with pytest.raises(ValueError, match="other options"):
        run("W_O")


def test_a_checkpoint_of_another_search_is_refused(arith, tmp_path):
    model, base, task = arith
    state = tmp_path / "state.safetensors"
    iterative(model, base, task.train, task.validation, step=3, steps=1, checkpoint=state, **SMALL)
    for changed in (
        {"step": 4, "train": task.train},
        {"step": 3, "train": task.test},
    ):
        with pytest.raises(ValueError, match="other options"):
            iterative(
                model,
                base,
                changed["train"],
                task.validation,
                step=changed["step"],
                checkpoint=state,
                **SMALL,
            )


@pytest.mark.parametrize("search", [pytest.param(guard, marks=pytest.mark.slow), learn])
def test_protected_data_stay_within_their_bound(arith, search):
    """The product's rivals cost the sum most of its answers; under protection they may not."""
    model, base, task = arith
    plain = el.load_task("int_add", model.tokenizer, low=0, high=20).train.select(range(60))
    options = {"steps": 60, "lr": 0.3} if search is learn else {"steps": 4, "step": 8}
    protect = Protection(model, {"sums": plain}, bound=0.02)
    assert protect.measure()["sums"] == pytest.approx(0, abs=1e-9)
    found = search(model, base, task.train, task.validation, protect=protect, **options)
    row = found.protected.iloc[0]
    assert row["divergence"] <= 0.02
    if search is learn:
        chosen = found.trace[found.trace["chosen"]].iloc[0]
        assert 0 < chosen["divergence"] <= 0.02
        assert found.trace["divergence"].iloc[0] == 0
    checked = plain.select(range(1, 60, 2))
    assert row["loss_before"] == pytest.approx(np.log(el.perplexity(model, checked)), rel=1e-5)
    with el.freeze(model, found.frozen):
        assert protect.measure()["sums"] == pytest.approx(row["divergence"])
        assert row["loss_after"] == pytest.approx(np.log(el.perplexity(model, checked)), rel=1e-5)
    assert row["accuracy_before"] - row["accuracy_after"] < 0.1
    assert len(found.frozen) > 0


def test_results_survive_a_round_trip(arith, tmp_path):
    model, base, task = arith
    found = one_shot(model, base, task.validation, fractions=(0.01, 0.02))
    found.save(tmp_path)
    back = el.SearchResult.load(tmp_path)
    assert back.method == found.method
    pd.testing.assert_frame_equal(back.trace, found.trace)
    pd.testing.assert_frame_equal(back.frozen.to_pandas(), found.frozen.to_pandas())


def test_wrong_options_name_themselves(arith):
    model, base, task = arith
    data = (model, base, task.train, task.validation)
    with pytest.raises(ValueError, match="step=0"):
        iterative(*data, step=0)
    with pytest.raises(ValueError, match="calibration"):
        guard(*data, calibration=1.5)
    with pytest.raises(ValueError, match="start"):
        learn(*data, start=1.5)
    with pytest.raises(ValueError, match="every"):
        learn(*data, every=0)
    pca = replace(base, spectra=None, basis="pca")
    with pytest.raises(ValueError, match="follow from data"):
        iterative(model, pca, task.train, task.validation, steps=1)
    with pytest.raises(ValueError, match="bound=-1"):
        Protection(model, {"test": task.test}, bound=-1.0)
    with pytest.raises(ValueError, match="No data to protect"):
        Protection(model, {})


@in_families(["gpt2", "llama"])
@pytest.mark.parametrize("share", [0.02, 0.7])
def test_gates_of_some_components_do_what_all_gates_do_with_the_others_shut(tiny, family, share):
    model = tiny(family)
    base = el.score(model, el.decompose(model, progress=False), MIXED, progress=False)
    draws = torch.tensor(np.random.default_rng(3).uniform(0, 1, (2, len(base))))
    kept = draws[0] < share
    (batch,) = make_batches(MIXED, model, len(MIXED))
    with Gates(model, base) as gates:
        gates.z = draws[1] * kept
        values, slope = gates.gradient(batch)
        gates.z = draws[1]  # those without a gate are shut, whatever they are set to
        gates.keep(kept)
        fewer, some = gates.gradient(batch)
        gates.keep(kept & (draws[1] > 0.5))
        gates.z = torch.zeros_like(draws[1])
        shut, _ = gates.gradient(batch)
    with torch.no_grad():
        torch.testing.assert_close(shut, answer_loss(answer_logits(model, batch), batch))
    torch.testing.assert_close(fewer, values, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(some[kept], slope[kept], rtol=1e-8, atol=1e-10)
    assert not some[~kept].any()
    assert slope[kept].abs().max() > 1e-6
