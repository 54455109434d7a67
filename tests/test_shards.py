"""Scoring in parts gives what scoring at once gives, for every criterion and reference."""

import pickle

import numpy as np
import pytest
import torch
from tiny_models import EQUAL, MIXED

import eigenlens as el
from eigenlens.scoring import CRITERIA, REFERENCES
from eigenlens.scoring.accumulators import ActivationSums, CrossSums, EffectSums, merged
from eigenlens.scoring.plan import Plan
from eigenlens.scoring.scores import STATISTICS
from eigenlens.scoring.shards import InTurn

PAIRED = EQUAL.add_column("corrupt", [EQUAL[(i + 1) % 6]["prompt"] for i in range(6)])


class Sent(InTurn):
    """Jobs and sums as they are when they cross the border of a process."""

    def run(self, model, spectra, parts, *, progress):
        self.__dict__["seen"] = [job.plan.n_examples for job in parts]
        for job in parts:
            sent = pickle.loads(pickle.dumps(job))
            yield pickle.loads(pickle.dumps(sent.run(model, spectra, progress=progress)))


EVERY = [(c, r) for c in CRITERIA for r in REFERENCES]
# One sum of a pass, under all that takes a coordinate's place; sums along a path; and two sums.
FAST = [(c, r) for c, r in EVERY if c in ("mean", "eap_ig_inputs") or (c, r) == ("margin", "mean")]
SLOW = [pytest.param(*pair, marks=pytest.mark.slow) for pair in EVERY if pair not in FAST]


@pytest.mark.parametrize(("criterion", "reference"), [*FAST, *SLOW])
def test_parts_give_what_the_whole_gives(tiny, criterion, reference):
    model = tiny("llama")
    spectra = el.decompose(model, ["W_Q", "W_V", "W_out"], progress=False)
    data = PAIRED if reference == "pair" else MIXED
    given = {"criterion": criterion, "reference": reference, "batch_size": 2, "steps": 2}
    shards = Sent(3)
    whole = el.score(model, spectra, data, **given, progress=False)
    parts = el.score(model, spectra, data, **given, shards=shards, progress=False)
    # Of five examples resampling makes two batches, since none may be alone.
    assert len(shards.seen) == (2 if reference == "resample" else 3)
    assert sum(shards.seen) == len(data)
    scale = np.nanmax(np.abs(whole.delta_loss))
    assert scale > 0
    for name in STATISTICS:
        one, two = whole.components[name], parts.components[name]
        np.testing.assert_allclose(two, one, rtol=1e-9, atol=1e-11 * scale, err_msg=name)
    np.testing.assert_allclose(parts.means.table(), whole.means.table(), atol=1e-12)
    frozen = [el.FrozenSet.from_scores(s, np.argsort(s.delta_loss)[:9]) for s in (whole, parts)]
    names = [f.components.sort_values(["layer", "matrix", "head", "index"]) for f in frozen]
    assert (
        names[0][["layer", "matrix", "head", "index"]]
        .reset_index(drop=True)
        .equals(names[1][["layer", "matrix", "head", "index"]].reset_index(drop=True))
    )


def test_under_given_means_and_with_few_positions(tiny):
    model = tiny("gpt2")
    spectra = el.decompose(model, ["W_O", "W_in"], progress=False)
    scores = el.score(model, spectra, MIXED, n_positions=2, progress=False)
    given = {"means": scores, "stderr": True, "batch_size": 1, "progress": False}
    whole, parts = (el.score(model, spectra, EQUAL, **given, shards=n) for n in (1, 4))
    np.testing.assert_allclose(parts.delta_loss, whole.delta_loss, rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(parts.stderr, whole.stderr, rtol=1e-9)


def test_batches_and_partners_do_not_depend_on_the_parts(tiny):
    model = tiny("llama")
    options = {"batch_size": 2, "n_positions": None, "seed": 3}
    plan = Plan.of(MIXED, model, "resample", None, **options)
    for count in (1, 2, 100):
        parts = plan.parts(count)
        assert len(parts) == min(count, len(plan.batches))
        assert [id(b) for part in parts for b in part.batches] == [id(b) for b in plan.batches]
        assert [roll for part in parts for roll in part.rolls] == plan.rolls


def test_merging_by_hand():
    one, two = (
        EffectSums(*(torch.tensor([[float(n), n]]) for _ in range(4)), *worst)
        for n, worst in (
            (1, (torch.tensor([[1.0, 2.0]]), torch.tensor([[-torch.inf, 5.0]]))),
            (2, (torch.tensor([[0.5, 0.5]]), torch.tensor([[3.0, 4.0]]))),
        )
    )
    one.merge(two)
    assert one.total.tolist() == one.margin_square.tolist() == [[3, 3]]
    assert one.position_square.tolist() == [[1.5, 2.5]]
    assert one.worst.tolist() == [[3, 5]]
    assert two.total.tolist() == [[2, 2]]


def test_merged_adds_what_each_part_found():
    parts = [{"means": {"m": ActivationSums(torch.full((1, 1, 2), float(n)))}} for n in (1, 2, 4)]
    assert merged(parts)["means"]["m"].total.tolist() == [[[7, 7]]]


def test_sums_of_another_form_are_refused():
    whole = CrossSums(torch.zeros(1, 2, 2), None)
    with pytest.raises(TypeError, match="of products cannot take in CrossSums of projected"):
        whole.merge(CrossSums(None, torch.zeros(1, 2)))
    with pytest.raises(TypeError, match="cannot take in ActivationSums"):
        whole.merge(ActivationSums(torch.zeros(1, 1, 2)))


@pytest.mark.parametrize("shards", [0, -1])
def test_a_number_of_shards_that_is_none(tiny, shards):
    model = tiny("llama")
    spectra = el.decompose(model, ["W_Q"], progress=False)
    with pytest.raises(ValueError, match=f"shards={shards}: at least 1"):
        el.score(model, spectra, EQUAL, shards=shards, progress=False)


def test_an_example_is_named_by_its_place_in_the_whole(tiny, monkeypatch):
    model = tiny("llama")
    spectra = el.decompose(model, ["W_Q"], progress=False)

    def metric(logits, batch):
        bad = torch.tensor([5 in batch.indices[i : i + 1] for i in range(len(batch))])
        return torch.where(bad, torch.nan, logits.sum((1, 2)))

    with pytest.raises(ValueError, match=r"[Ee]xample 5"):
        el.score(model, spectra, EQUAL, metric=metric, batch_size=1, shards=6, progress=False)
