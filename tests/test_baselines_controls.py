"""Baselines that freeze other components, or only part of a freeze; k-shot prompting."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import EQUAL, dataset, in_families

import eigenlens as el
from eigenlens import baselines as bl
from eigenlens.baselines import baseline
from eigenlens.baselines.freezing_parts import zeroed
from eigenlens.baselines.random_components import matched
from eigenlens.baselines.ranked import shuffled_answers
from eigenlens.far_side import input_vectors, output_vectors
from eigenlens.files import FileFormatError
from eigenlens.freezing import Freeze
from eigenlens.metrics import answer_logits
from eigenlens.provenance import model_fingerprint
from eigenlens.tasks import Task, make_batches

MATRIX = ["layer", "matrix"]


@pytest.fixture(scope="module")
def arith():
    model = el.load_model("arith-tiny", dtype=torch.float64, device="cpu")
    task = el.load_task("ambiguous", model.tokenizer, n_train=40, n_validation=20, n_test=20)
    return model, el.decompose(model, progress=False), task


def logits(model, data=EQUAL):
    (batch,) = make_batches(data, model, len(data))
    with torch.no_grad():
        return answer_logits(model, batch)


def energy(frozen, scores):
    table = frozen.to_pandas().merge(scores.components, on=[*MATRIX, "head", "index"])
    return (table.assign(e=(table.strength * table.sigma) ** 2)).groupby(MATRIX)["e"].sum()


@pytest.fixture(scope="module")
def scored(arith):
    model, spectra, task = arith
    return el.score(model, spectra, task.train, criterion="margin", progress=False)


FROZEN = [
    bl.OneShot(fractions=(0.01, 0.05)),
    bl.ShuffledLabels(fractions=(0.01,)),
    bl.RandomBasis(fractions=(0.01,)),
    bl.RandomComponents("energy"),
    bl.FreezingPart(fractions=(0.01,), part="bias only"),
    bl.ZeroShot(),
]


@pytest.mark.parametrize("baseline", FROZEN, ids=lambda b: b.name)
def test_the_chosen_edit_is_the_best_of_the_trace_and_the_model_is_restored(
    arith, scored, baseline
):
    model, spectra, task = arith
    before, first = model_fingerprint(model), el.evaluate(model, task.test).examples
    if isinstance(baseline, bl.RandomComponents):
        baseline = replace(baseline, like=(el.select(scored, 0.01), el.select(scored, 0.1)))
    found = baseline.fit(model, spectra, task, seed=3)
    assert model_fingerprint(model) == before
    assert el.evaluate(model, task.test).examples.equals(first)
    again = bl.measure(model, task.validation, found.edit)
    ranks = list(zip(found.trace["accuracy"], -found.trace["loss"], strict=True))
    assert (again.accuracy, -again.loss) == max(ranks)
    assert again.examples.equals(found.validation.examples)
    assert found.cost.forward_examples >= len(found.trace) * len(task.validation)
    assert found.cost.saved_bytes > 0


def test_one_shot_is_the_pipeline_by_hand(arith, scored):
    model, spectra, task = arith
    found = bl.OneShot(fractions=(0.01,)).fit(model, spectra, task)
    with el.freeze(model, el.select(scored, 0.01)):
        by_hand = el.evaluate(model, task.test)
    assert bl.measure(model, task.test, found.edit).examples.equals(by_hand.examples)
    assert found.cost.backward_examples == len(task.train)


def test_opposite_sign_freezes_what_scores_best(arith, scored):
    model, spectra, task = arith
    edit = bl.OppositeSign(fractions=(0.02,)).fit(model, spectra, task).edit
    best = np.sort(np.argsort(-scored.delta_loss, kind="stable")[: len(edit.frozen)])
    expected = scored.components.iloc[best][[*MATRIX, "head", "index"]].reset_index(drop=True)
    assert edit.frozen.to_pandas().drop(columns="strength").equals(expected)


@pytest.mark.parametrize("largest", [False, True])
def test_magnitude_freezes_the_extreme_singular_values(arith, largest):
    model, spectra, task = arith
    frozen = bl.Magnitude(fractions=(0.05,), largest=largest).fit(model, spectra, task).edit.frozen
    every = np.concatenate(
        [torch.linalg.svdvals(m.weight).flatten().numpy() for m in el.weight_matrices(model)]
    )
    table = frozen.to_pandas().merge(spectra.to_pandas(), on=[*MATRIX, "head", "index"])
    every = np.sort(every)[::-1] if largest else np.sort(every)
    np.testing.assert_allclose(
        np.sort(table["sigma"]), np.sort(every[: len(frozen)]), rtol=1e-9, atol=1e-12
    )


def test_random_by_count_matches_each_matrix(scored):
    like = el.select(scored, 0.1)
    drawn = matched(scored, like, "count", np.random.default_rng(0))
    sizes = [f.to_pandas().groupby(MATRIX).size() for f in (like, drawn)]
    pd.testing.assert_series_equal(*sizes)
    other = matched(scored, like, "count", np.random.default_rng(1))
    same = matched(scored, like, "count", np.random.default_rng(0))
    assert same.to_pandas().equals(drawn.to_pandas())
    assert not other.to_pandas().equals(drawn.to_pandas())


@pytest.mark.parametrize("seed", range(3))
def test_random_by_energy_matches_each_matrix(scored, seed):
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(len(scored), 100, replace=False))
    like = el.FrozenSet.from_scores(scored, rows, rng.uniform(0.3, 1, 100))
    drawn = matched(scored, like, "energy", rng)
    wanted, got = energy(like, scored), energy(drawn, scored)
    table = scored.components.merge(drawn.to_pandas(), how="left", on=[*MATRIX, "head", "index"])
    for key, budget in wanted.items():
        missing = budget - got.get(key, 0.0)
        mine = table[(table.layer == key[0]) & (table.matrix == key[1]) & table.strength.isna()]
        assert -1e-6 * budget <= missing < (mine.sigma**2).min() * (1 + 1e-9)
    assert set(got.index) <= set(wanted.index)


def test_random_keeps_strengths_by_count(scored):
    rows = np.arange(0, len(scored), 40)
    like = el.FrozenSet.from_scores(scored, rows, np.linspace(0.1, 1, len(rows)))
    drawn = matched(scored, like, "count", np.random.default_rng(0))
    for key, mine in drawn.to_pandas().groupby(MATRIX):
        given = like.to_pandas().set_index(MATRIX).loc[[key], "strength"]
        assert sorted(mine["strength"]) == sorted(given)


def test_random_keeps_the_kind_of_means(scored):
    """Else a control would differ from what it controls in two things."""
    like = el.FrozenSet.from_scores(scored, np.arange(0, len(scored), 40))
    by_position = matched(scored, like, "count", np.random.default_rng(0))
    one_mean = matched(scored, like.shared(), "count", np.random.default_rng(0))
    assert not by_position.means.is_shared
    np.testing.assert_array_equal(
        one_mean.means.at(range(3)), by_position.means.fallback[:, None].repeat(3, 1)
    )


@in_families(["gpt2", "llama"])
def test_a_random_basis_spans_the_same_matrix(tiny, family):
    model = tiny(family)
    spectra = el.decompose(model, progress=False)
    drawn = bl.Search(model, spectra, Task("t", EQUAL, EQUAL, EQUAL)).in_basis("random").spectra
    assert drawn.n_components == spectra.n_components
    for name, s in drawn.items():
        matrix = s.site.find(model)
        reads, writes = input_vectors(model, s), output_vectors(model, s)
        torch.testing.assert_close(reads @ writes, matrix.weight, rtol=1e-10, atol=1e-12)
        eye = torch.eye(matrix.rank, dtype=s.dtype).expand(matrix.n_heads, -1, -1)
        torch.testing.assert_close(s.read.mT @ s.read, eye, rtol=0, atol=1e-10)
        far = writes if s.site.side == "in" else reads.mT
        torch.testing.assert_close(far.norm(dim=-1), s.sigma, rtol=1e-10, atol=1e-12)
        assert (s.read * spectra[name].read).sum(1).abs().max() < 0.99
    # all components together are the matrix, in whatever basis
    sets = [
        el.select(el.score(model, basis, EQUAL, progress=False), 1.0) for basis in (spectra, drawn)
    ]
    outputs = []
    for frozen in sets:
        with el.freeze(model, frozen):
            outputs.append(logits(model))
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)


def test_a_random_basis_is_read_back_from_its_seed(arith, tmp_path):
    model, spectra, task = arith
    few = spectra.select(matrices=["W_K", "W_out"])
    edit = bl.RandomBasis(fractions=(0.05,)).fit(model, few, task, seed=4).edit
    assert set(edit.frozen.components["matrix"]) <= {"W_K", "W_out"}
    edit.save(tmp_path / "edit.safetensors")
    again = bl.load_edit(tmp_path / "edit.safetensors")
    assert (again.frozen.basis, again.frozen.seed, again.frozen.spectra) == ("random", 4, None)
    one, two = (bl.measure(model, task.test, e).examples for e in (edit, again))
    pd.testing.assert_frame_equal(one, two, rtol=1e-9)


def test_adding_the_means_alone_is_no_frozen_set_file(arith, scored, tmp_path):
    model, spectra, task = arith
    edit = bl.FreezingPart(fractions=(0.01,)).fit(model, spectra, task).edit
    edit.save(tmp_path / "edit.safetensors")
    with pytest.raises(FileFormatError, match="another kind"):
        el.FrozenSet.load(tmp_path / "edit.safetensors")


def test_bases_have_the_components_of_the_same_matrices(arith):
    model, spectra, task = arith
    search = bl.Search(model, spectra.select(["W_V", "W_O", "W_out"], [1]), task)
    names = {basis: list(search.in_basis(basis).spectra) for basis in ("qk_ov", "neurons", "pca")}
    assert names == {
        "qk_ov": ["blocks.1.OV"],
        "neurons": ["blocks.1.W_out"],
        "pca": ["blocks.1.W_V", "blocks.1.W_O", "blocks.1.W_out"],
    }
    assert search.in_basis("svd") is search
    with pytest.raises(ValueError, match="QK, OV"):
        bl.Search(model, spectra.select(["W_Q"]), task).in_basis("qk_ov")


@pytest.mark.parametrize(("kind", "module"), [("W_out", "mlp.out"), ("W_O", "attn.o")])
def test_parts_of_a_freeze_add_up(tiny, kind, module):
    """y + bias, y − x E, and y − x E + bias: in one linear map, changes are additive."""
    model = tiny("gpt2")
    spectra = el.decompose(model, [kind], [1], progress=False)
    frozen = el.select(el.score(model, spectra, EQUAL, progress=False), 0.4)
    hook = f"blocks.1.{module}.hook_out"
    (batch,) = make_batches(EQUAL, model, 6)

    def output(edit=None):
        with torch.no_grad():
            if edit is None:
                return model.run_with_cache(batch.tokens, names_filter=[hook])[1][hook]
            with edit:
                return output()

    plain = output()
    bias = output(Freeze(model, frozen, bias_only=True)) - plain
    zero = output(el.freeze(model, zeroed(model, frozen))) - plain
    both = output(el.freeze(model, frozen)) - plain
    torch.testing.assert_close(bias + zero, both, rtol=1e-10, atol=1e-12)
    assert bias.std(0).max() < 1e-12 < bias.abs().max()  # the same for all examples
    search = bl.Search(model, spectra, Task("t", EQUAL, EQUAL, EQUAL))
    shared = bl.FreezingPart(part="position-free").edit(frozen, search).frozen
    assert shared.means.is_shared
    flat = output(el.freeze(model, shared)) - plain - zero
    assert flat.flatten(0, 1).std(0).max() < 1e-12 < bias[0].std(0).max()


def test_shuffled_labels_keep_prompts_and_answers_apart(arith):
    _, _, task = arith
    shuffled = shuffled_answers(task.train, 0)
    assert list(shuffled["prompt"]) == list(task.train["prompt"])
    assert sorted(shuffled["answer"]) == sorted(task.train["answer"])
    assert list(shuffled["answer"]) != list(task.train["answer"])


def test_few_shot_prompts_hold_k_solved_training_examples(tiny):
    model = tiny("gpt2")  # a context of 32 tokens, 6 per example
    make = lambda start: dataset([(f"{a} + 2 =", f" {a + 2}") for a in range(start, start + 6)])  # noqa: E731
    task = Task("plus two", make(0), make(10), make(20))
    spectra = el.decompose(model, progress=False)
    found = bl.FewShot(shots=(1, 2, 4, 8), separator=" ").fit(model, spectra, task)
    assert found.trace["shots"].tolist() == [1, 2, 4]
    k = found.trace.sort_values(["accuracy", "loss"], ascending=[False, True])["shots"].iloc[0]
    prompt = found.edit.transform(task.test)["prompt"][0]
    known = [row["prompt"] + row["answer"] + " " for row in task.train]
    solved = prompt.removesuffix("20 + 2 =")
    assert solved.count("=") == k
    for _ in range(k):
        (example,) = {text for text in known if solved.startswith(text)}
        solved = solved.removeprefix(example)
    assert solved == ""
    measured = bl.measure(model, task.test, found.edit)
    assert list(measured.examples["prompt"]) == list(task.test["prompt"])
    by_hand = el.evaluate(model, dataset([(prompt, " 22")]))
    assert measured.examples["loss"][0] == pytest.approx(by_hand.loss, rel=1e-9)
    assert found.cost.backward_passes == 0


def test_few_shot_without_room_says_so(arith):
    with pytest.raises(ValueError, match="fits the context of 8 tokens"):
        bl.FewShot().fit(arith[0], arith[1], arith[2])


def test_edits_end_after_an_error(tiny):
    model = tiny("gpt2")
    spectra = el.decompose(model, progress=False)
    frozen = el.select(el.score(model, spectra, EQUAL, progress=False), 0.2)
    before, during = logits(model), []

    def fail():
        during.append(logits(model))
        raise KeyError

    with pytest.raises(KeyError), bl.FrozenEdit(frozen).applied(model):
        fail()
    assert not torch.equal(during[0], before)
    assert torch.equal(logits(model), before)


def test_choices_are_made_by_accuracy_then_loss(arith):
    model, spectra, task = arith
    search = bl.Search(model, spectra, task)
    search.consider(bl.NoEdit(), row=0)
    first = search.best
    search.consider(bl.NoEdit(), row=1)
    assert search.best is first  # a tie leaves the earlier one
    assert [row["row"] for row in search.trace] == [0, 1]


def test_a_model_in_training_mode_is_refused(tiny_folder):
    model = el.load_model(tiny_folder("gpt2"), device="cpu")
    spectra = el.decompose(model, progress=False)
    task = Task("t", EQUAL, EQUAL, EQUAL)
    model.train()
    with pytest.raises(ValueError, match=r"model\.eval"):
        bl.ZeroShot().fit(model, spectra, task)


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="count, energy"):
        bl.RandomComponents("sigma")
    with pytest.raises(ValueError, match="position-free"):
        bl.FreezingPart(part="half")
    assert replace(bl.OneShot(), criterion="mean").name == "eigenpruning, mean, one-shot"


def test_of_equals_on_validation_the_fewest_components_are_kept(tiny, monkeypatch):
    model = tiny("gpt2")
    task = el.load_task("int_add", model.tokenizer, high=10, n_train=8, n_validation=4, n_test=4)
    spectra = el.decompose(model, matrices=["W_V"], progress=False)
    scores = el.score(model, spectra, task.train, progress=False)
    many, few, worse = (bl.FrozenEdit(el.select(scores, count=count)) for count in (5, 2, 1))
    found = el.evaluate(model, task.validation, progress=False)
    lossier = replace(found, examples=found.examples.assign(loss=found.examples["loss"] + 1))
    measured = {id(many): found, id(few): found, id(worse): lossier}
    monkeypatch.setattr(baseline, "measure", lambda model, data, edit, **_: measured[id(edit)])
    for order in ((many, few, worse), (worse, few, many)):
        search = baseline.Search(model, spectra, task)
        for edit in order:
            search.consider(edit)
        assert search.best[0] is few
