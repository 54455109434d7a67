"""The study of bases on a small scale: numbers are those of the toolkit, by hand."""

import numpy as np
import pytest

import eigenlens as el
from eigenlens.exact import exact_effects
from eigenlens.faithfulness import faithfulness_curve
from eigenlens.metrics import kl_to_unedited
from eigenlens.paper.studies import bases

STUDY = """
models: [arith-tiny]
seeds: [3]
tasks:
  product: {task: ambiguous, arguments: {n_train: 20, n_validation: 10, n_test: 12}}
  sum: {task: int_add, arguments: {n_train: 20, n_validation: 10, n_test: 12}}
held: [sum]
bases:
  OV: {basis: qk_ov, matrices: [OV]}
  principal: {basis: pca, matrices: [W_O]}
steps: 3
counts: [3]
kept: [64]
n_examples: 4
"""
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    (folder / "study.yaml").write_text(STUDY)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return bases.run(config=folder / "study.yaml", parts=folder / "parts")


def row_of(table, **wanted):
    (row,) = table[(table[list(wanted)] == list(wanted.values())).all(axis=1)].to_dict("records")
    return row


def scored(task, basis):
    model = el.load_model("arith-tiny", device="cpu")
    sizes = {"n_train": 20, "n_validation": 10, "n_test": 12}
    data = el.load_task(task, model.tokenizer, seed=3, **sizes)
    given = {"basis": "pca", "data": data.train} if basis == "pca" else {"basis": basis}
    kind = "W_O" if basis == "pca" else "OV"
    spectra = el.decompose(model, [kind], **given, **QUIET)
    options = {"criterion": "margin", "reference": "shared", **QUIET}
    return model, data, el.score(model, spectra, data.train, **options), options


@pytest.mark.slow
@pytest.mark.parametrize(("label", "basis"), [("OV", "qk_ov"), ("principal", "pca")])
def test_edits_and_agreement_are_measured_in_the_basis(found, label, basis):
    model, task, scores, options = scored("ambiguous", basis)
    frozen = el.select(scores, count=3)
    with el.freeze(model, frozen):
        after = el.evaluate(model, task.test, **QUIET)
    row = row_of(found.table, basis=label, method=bases.ONE_SHOT, components=3)
    assert (row["right"], row["n"], row["candidates"]) == (
        after.examples["correct"].sum(),
        12,
        len(scores),
    )
    few = task.train.select(range(4))
    own = el.score(model, scores.spectra, few, **options)
    exact = exact_effects(model, own, np.arange(len(own)), few, **QUIET).mean(1)
    ranks = [np.argsort(np.argsort(values)) for values in (own.delta_loss, exact)]
    by_hand = np.corrcoef(*ranks)[0, 1]
    told = row_of(found.table, basis=label, method=bases.SCORES)["spearman"]
    assert told == pytest.approx(by_hand, abs=1e-3)  # ties


def test_what_holds_a_task_is_measured_by_faithfulness(found):
    model, task, scores, _ = scored("int_add", "qk_ov")
    curve = faithfulness_curve(
        model,
        scores,
        task.test,
        values=np.abs(scores.with_criterion("mean").delta_loss),
        kept=[64 / len(scores)],
        metric=kl_to_unedited(model, task.test),
    )
    held = found.table[(found.table["basis"] == "OV") & (found.table["ranking"] == bases.RANKED)]
    np.testing.assert_allclose(held["faithfulness"], curve["faithfulness"], atol=1e-5)
    assert set(held["label"]) == {"sum"}


def test_bases_are_drawn_and_told_and_made_once(found, folder, monkeypatch):
    monkeypatch.setattr(bases, "_scored", lambda *a: pytest.fail("measured again"))
    again = bases.run(config=folder / "study.yaml", parts=folder / "parts")
    assert again.summary.equals(found.summary)
    assert list(found.summary["basis"]) == ["OV", "principal"] * 2
    assert {trace.name for trace in found.figure.data} >= {"OV", "principal"}
    before = found.table[found.table["components"] == 0].iloc[0]
    dotted = [line.y0 for line in found.figure.layout.shapes]
    assert dotted == [pytest.approx(before["right"] / before["n"])]
    assert found.text.startswith("Of 2 bases, OV is number ")


def test_a_matrix_that_a_basis_lacks_is_refused_before_anything_runs(folder):
    wrong = folder / "wrong.yaml"
    wrong.write_text(STUDY.replace("matrices: [OV]", "matrices: [W_K]"))
    with pytest.raises(ValueError, match=r"wrong.yaml .*choose from QK, OV"):
        bases.run(config=wrong)
