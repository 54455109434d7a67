"""Groups of components: the clustering, first-order effects, and joint effects by brute force."""

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import EQUAL, MIXED

import eigenlens as el
from eigenlens.circuits.groups import clustered, edit_effects
from eigenlens.exact import joint_effects
from eigenlens.frozen_set import FrozenSet
from eigenlens.positions import prompt_ends_at
from eigenlens.scoring import single_effects
from eigenlens.tasks import make_batches


@pytest.fixture(scope="module")
def edit(tiny_folder):
    """Twelve components of a tiny model, half of them attenuated."""
    model = el.load_model(tiny_folder("llama"), dtype=torch.float64, device="cpu")
    spectra = el.decompose(model, progress=False)
    scores = el.score(model, spectra, MIXED, progress=False)
    rows = np.arange(5, len(scores), len(scores) // 12)[:12]
    frozen = FrozenSet.from_scores(scores, rows, np.where(np.arange(12) % 2, 1.0, 0.3))
    return model, scores, rows, frozen


def by_hand(model, data, frozen):
    """Loss of every example under an edit: one at a time, the plain model, softmax by hand."""
    losses = []
    for row in data:
        prompt, answer = (model.tokenizer(row[part])["input_ids"] for part in ("prompt", "answer"))
        n = len(prompt)
        with el.freeze(model, frozen), prompt_ends_at(model, n), torch.no_grad():
            p = model(torch.tensor([prompt + answer]))[0].softmax(-1)
        losses.append(-sum(p[n - 1 + i, token].log().item() for i, token in enumerate(answer)))
    return np.array(losses)


def test_planted_groups_are_found():
    """Two causes drive two sets of components by factors of any size; one does nothing new."""
    rng = np.random.default_rng(0)
    causes = rng.normal(size=(2, 40))
    planted = np.array([0, 1, 1, 0, 1, 0, 0, 1])
    size = 10.0 ** rng.uniform(-4, 1, 8)
    noise = rng.normal(size=(8, 40)) * 0.1
    effects = size[:, None] * (causes[planted] + noise + rng.normal(size=(8, 1)))
    found = clustered(effects, 2)
    assert len(set(zip(planted, found, strict=True))) == 2
    constant = np.full((1, 40), 0.1)
    opposite = clustered(np.concatenate([effects, -effects, constant]), 5)
    assert len(set(zip(planted, opposite[:8], opposite[8:16], strict=True))) == 2
    assert len(set(opposite)) == 5  # those against a cause, and what never changes, are apart
    assert clustered(effects[:1], 3).tolist() == [0]
    assert len(set(clustered(effects, 100))) == 8


def test_first_order_effects_are_those_of_the_scores(edit):
    model, scores, rows, frozen = edit
    found = edit_effects(model, frozen, MIXED, batch_size=2, progress=False)
    expected = single_effects(model, scores, MIXED, rows, progress=False).effects.numpy().T
    strength = frozen.components["strength"].to_numpy()[:, None]
    np.testing.assert_allclose(found, expected * strength, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("means", [pytest.param("position", marks=pytest.mark.slow), "shared"])
def test_joint_effects_equal_brute_force(edit, means):
    model, scores, _, frozen = edit
    frozen = frozen if means == "position" else frozen.shared()
    found = el.groups(
        model, scores.spectra, frozen, MIXED, count=3, singles=True, batch_size=2, progress=False
    )
    before = by_hand(model, MIXED, frozen.scaled(0.0))
    sets = {}
    for group in (1, 2, 3):
        rows = np.flatnonzero(found.members["group"] == group)
        sets[group] = FrozenSet(
            frozen.components.iloc[rows].reset_index(drop=True),
            frozen.means[rows],
            frozen.n_candidates,
            frozen.provenance,
        )
        change = by_hand(model, MIXED, sets[group]) - before
        row = found.table.iloc[group - 1]
        assert row["group"] == group
        assert row["components"] == len(rows) > 0
        assert row["joint"] == pytest.approx(change.mean())
        assert row["stderr"] == pytest.approx(change.std(ddof=1) / np.sqrt(len(MIXED)))
    whole = by_hand(model, MIXED, frozen) - before
    assert found.together["joint"] == pytest.approx(whole.mean())
    assert list(found.table["joint"]) == sorted(found.table["joint"])
    assert abs(found.table["joint"].sum() - whole.mean()) > 1e-6  # groups interact, too
    for total in ("first_order", "single"):
        summed = found.members.groupby("group")[total].sum()
        np.testing.assert_allclose(found.table[total], summed)
        assert found.together[total] == pytest.approx(summed.sum())
    alone = FrozenSet(
        frozen.components.iloc[4:5], frozen.means[4:5], frozen.n_candidates, frozen.provenance
    )
    change = (by_hand(model, MIXED, alone) - before).mean()
    assert found.members["single"][4] == pytest.approx(change)
    both = joint_effects(model, [sets[2], alone], MIXED, batch_size=3, progress=False)
    np.testing.assert_allclose(both[0], by_hand(model, MIXED, sets[2]) - before, atol=1e-12)


def test_the_model_is_as_it_was_and_the_result_the_same(edit):
    model, scores, _, frozen = edit
    (batch,) = make_batches(EQUAL, model, 9)
    before = model(batch.tokens)
    one, two = (
        el.groups(model, scores.spectra, frozen, EQUAL, count=4, progress=False) for _ in range(2)
    )
    pd.testing.assert_frame_equal(one.table, two.table, check_exact=True)
    pd.testing.assert_frame_equal(one.members, two.members, check_exact=True)
    assert torch.equal(model(batch.tokens), before)
    assert one.table["single"].isna().all()
    assert one.members[["layer", "matrix", "head", "index", "strength"]].equals(frozen.components)


def test_a_group_of_one_is_named_by_what_it_reads_and_writes(edit):
    model, scores, _, frozen = edit
    found = el.groups(model, scores.spectra, frozen, MIXED, count=12, top=3, progress=False)
    assert len(found) == 12
    for _, row in found.table.iterrows():
        member = found.members[found.members["group"] == row["group"]].iloc[0]
        layer, matrix, head, index = member[["layer", "matrix", "head", "index"]]
        assert row["where"] == f"L{layer}.{matrix} 1"
        place = (int(layer), matrix, int(head), int(index))
        told = el.readout(model, scores.spectra, *place, top=64)
        by_size = told.reads.sort_values("score", key=abs, ascending=False)["token"]
        assert row["reads"].split() == [token.strip() for token in by_size[:3]]
        if matrix in ("W_Q", "W_K"):
            assert row["writes"] == ""
        elif told.writes["through"].nunique() == 1:
            by_size = told.writes.sort_values("score", key=abs, ascending=False)["token"]
            assert row["writes"].split() == [token.strip() for token in by_size[:3]]


def test_results_show_and_are_saved(edit, tmp_path, capsys):
    model, scores, _, frozen = edit
    found = el.groups(model, scores.spectra, frozen, MIXED, count=3, progress=False)
    found.show()
    printed = capsys.readouterr().out
    assert "12 components in 3 groups, 5 examples" in printed
    assert "single" not in printed  # was not measured
    found.save(tmp_path / "groups.json")
    back = el.Groups.load(tmp_path / "groups.json")
    pd.testing.assert_frame_equal(back.table, found.table)
    pd.testing.assert_frame_equal(back.members, found.members)
    assert back._repr_html_() == found._repr_html_()
    assert back.n_examples == 5
    assert np.isnan(back.together["single"])


def test_what_cannot_be_grouped_is_refused(edit):
    model, scores, _, frozen = edit
    few, nothing = MIXED.select([0, 1]), frozen.scaled(0.0)
    for own, data, options, message in (
        (nothing, MIXED, {}, "Nothing is frozen"),
        (frozen, few, {}, "2 examples tell no correlation"),
        (frozen, MIXED, {"count": 0}, "count=0"),
        (frozen, MIXED, {"limit": 11}, "12 components are more than limit=11"),
    ):
        with pytest.raises(ValueError, match=message):
            el.groups(model, scores.spectra, own, data, progress=False, **options)
