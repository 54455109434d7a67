"""Earlier positions that share one mean, and padding that has no influence."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_freezing import edited_by_hand
from test_scores import one_pass
from tiny_models import MIXED, dataset, in_families

import eigenlens as el
from eigenlens.gates import Gates
from eigenlens.metrics import answer_logits
from eigenlens.position_means import PositionMeans, Positions
from eigenlens.positions import prompt_ends_at
from eigenlens.scoring import plan
from eigenlens.tasks import make_batches

LONG = dataset(
    [
        *zip(MIXED["prompt"], MIXED["answer"], strict=True),
        ("9 x 3 + 1 x 1 + 7 + 8 + 2 x 6 + 5 x 5 + 4 + 3 x 2 =", " 56 1"),
    ]
)


def scores_of(model, data, matrices=("W_V", "W_out"), **options):
    spectra = el.decompose(model, matrices, progress=False)
    return el.score(model, spectra, data, progress=False, **options)


def by_hand(model, spectra, data, n_positions):
    """Means and effects where one loop over examples and tokens sorts tokens into buckets."""
    reads, examples = {}, []
    for row in range(len(data)):
        ((batch, seen),) = one_pass(model, list(spectra.values()), data.select([row]))
        a, g = (torch.cat([seen[name][i][0].flatten(1) for name in spectra], dim=1) for i in (0, 1))
        buckets = [max(position, -n_positions - 1) for position in batch.positions]
        for bucket, value in zip(buckets, a, strict=True):
            reads.setdefault(bucket, []).append(value)
        examples.append((buckets, a, g))
    means = {bucket: torch.stack(values).mean(0) for bucket, values in reads.items()}
    effects = [
        sum((means[bucket] - a[t]) * g[t] for t, bucket in enumerate(buckets))
        for buckets, a, g in examples
    ]
    counts = {bucket: len(values) for bucket, values in reads.items()}
    return means, counts, torch.stack(effects)


@pytest.mark.parametrize("n_positions", [0, 3])
def test_means_and_effects_by_hand(tiny, n_positions):
    model = tiny("llama")
    spectra = el.decompose(model, ["W_V", "W_O", "W_out"], [1], progress=False)
    means, counts, effects = by_hand(model, spectra, LONG, n_positions)
    for batch_size, criterion in ((4, "mean"), (4, "ucb")):
        scores = el.score(
            model,
            spectra,
            LONG,
            n_positions=n_positions,
            batch_size=batch_size,
            criterion=criterion,
            progress=False,
        )
        known = scores.means
        assert list(known.positions.range) == sorted(means)
        assert known.positions.start == -n_positions - 1
        assert (known.positions.bucketed, known.positions.n_positions) == (True, n_positions)
        for column, position in enumerate(known.positions.range):
            assert known.count[column] == counts[position]
            mean = known.values[:, column]
            np.testing.assert_allclose(mean, means[position], atol=1e-10)
        found = scores.components
        np.testing.assert_allclose(found["effect"], effects.mean(0), atol=1e-10)
        if criterion == "ucb":
            np.testing.assert_allclose(found["std"], effects.std(0), atol=1e-9)


@pytest.mark.parametrize("criterion", ["mean", "max"])
def test_enough_positions_are_as_without_buckets(tiny, criterion):
    model = tiny("gpt2")
    plain = scores_of(model, MIXED, criterion=criterion)
    longest = -plain.means.positions.start
    for n_positions in (longest, longest + 3):
        found = scores_of(model, MIXED, criterion=criterion, n_positions=n_positions)
        assert found.means.positions == plain.means.positions
        assert not found.means.positions.bucketed
        np.testing.assert_array_equal(found.means.count, plain.means.count)
        np.testing.assert_array_equal(found.means.values, plain.means.values)
        np.testing.assert_array_equal(found.delta_loss, plain.delta_loss)
    # A bucket of one position differs from it in name only.
    one = scores_of(model, MIXED, criterion=criterion, n_positions=longest - 1)
    assert one.means.positions == replace(plain.means.positions, bucketed=True)
    np.testing.assert_array_equal(one.delta_loss, plain.delta_loss)
    with pytest.raises(ValueError, match="n_positions=-1 is negative"):
        scores_of(model, MIXED, n_positions=-1)


@in_families(["gpt2", "llama", "bloom"])
def test_a_much_longer_neighbour_has_no_influence(tiny, family):
    model = tiny(family)
    for criterion in ("mean", "max"):
        options = {"criterion": criterion, "n_positions": 3}
        alone = scores_of(model, LONG, batch_size=1, **options)
        together = scores_of(model, LONG, batch_size=6, **options)
        scale = np.abs(alone.delta_loss).max()
        np.testing.assert_allclose(together.delta_loss, alone.delta_loss, atol=1e-9 * scale)
        np.testing.assert_allclose(together.means.values, alone.means.values, atol=1e-9)
        np.testing.assert_array_equal(together.means.count, alone.means.count)


@pytest.mark.parametrize("n_positions", [None, 2])
@pytest.mark.parametrize("criterion", ["mean", "max"])
def test_more_padding_has_no_influence(tiny, monkeypatch, n_positions, criterion):
    """Columns of tokens that are masked in every row: only their positions are new."""
    model = tiny("llama")
    plain = scores_of(model, MIXED, n_positions=n_positions, criterion=criterion)

    def padded_further(data, model, batch_size, **options):
        return [
            replace(
                batch,
                tokens=torch.cat([torch.randint(3, 60, (len(batch), 7)), batch.tokens], dim=1),
                attention_mask=torch.cat(
                    [torch.zeros(len(batch), 7, dtype=torch.bool), batch.attention_mask], dim=1
                ),
                n_prompt=batch.n_prompt + 7,
                is_padded=True,
            )
            for batch in make_batches(data, model, batch_size, **options)
        ]

    monkeypatch.setattr(plan, "make_batches", padded_further)
    padded = scores_of(model, MIXED, n_positions=n_positions, criterion=criterion)
    extra = len(padded.means.positions) - len(plain.means.positions)
    assert extra == (7 if n_positions is None else 0)
    assert not padded.means.count[:extra].any()
    np.testing.assert_array_equal(padded.means.count[extra:], plain.means.count)
    scale = np.abs(plain.delta_loss).max()
    np.testing.assert_allclose(padded.delta_loss, plain.delta_loss, atol=1e-9 * scale)
    np.testing.assert_allclose(
        padded.means.values[:, extra:], plain.means.values, rtol=1e-9, atol=1e-10
    )


def test_frozen_outputs_are_means_over_the_bucket(tiny, tmp_path):
    """With all of W_out frozen, its output is the mean output of the bucket, also further back."""
    model = tiny("gpt2")
    name, outputs = "blocks.1.mlp.out.hook_out", {}
    for row in range(len(MIXED)):
        (batch,) = make_batches(MIXED.select([row]), model, 1)
        _, cache = model.run_with_cache(batch.tokens, names_filter=[name])
        for position, y in zip(batch.positions, cache[name][0], strict=True):
            outputs.setdefault(max(position, -3), []).append(y)
    spectra = el.decompose(model, ["W_out"], [1], progress=False)
    frozen = el.select(el.score(model, spectra, MIXED, n_positions=2, progress=False), 1.0)
    frozen.save(tmp_path / "frozen.safetensors")
    again = el.FrozenSet.load(tmp_path / "frozen.safetensors", model)
    tokens = torch.randint(3, 60, (1, 20))  # a prompt of 18, longer than any that was seen
    for edit in (frozen, again):
        with el.freeze(model, edit), prompt_ends_at(model, 18):
            _, after = model.run_with_cache(tokens, names_filter=[name])
        for column, y in enumerate(after[name][0]):
            mean = torch.stack(outputs[max(column - 18, -3)]).mean(0)
            torch.testing.assert_close(y, mean, rtol=1e-9, atol=1e-10)


def test_a_bucket_equals_its_mean_at_every_position(tiny):
    model = tiny("llama")
    frozen = el.select(scores_of(model, LONG, n_positions=3), 0.3)
    (longest,) = make_batches(LONG.select([len(LONG) - 1]), model, 1)
    spread = longest.n_prompt - 4
    known = frozen.means
    columns = [0] * spread + list(range(len(known.positions)))
    spelled_out = replace(
        frozen,
        means=PositionMeans(
            Positions(known.positions.start - spread, known.positions.stop),
            known.count[columns],
            known.values[:, columns],
            known.fallback,
        ),
    )
    for batch in make_batches(LONG, model, 2):
        with torch.no_grad(), el.freeze(model, frozen):
            hooked = answer_logits(model, batch)
        edited = edited_by_hand(model, spelled_out, batch)
        here = batch.answer_mask
        torch.testing.assert_close(hooked[here], edited[here], rtol=1e-10, atol=1e-10)


def test_saved_scores_and_gates_keep_the_buckets(tiny, tmp_path):
    model = tiny("llama")
    spectra = el.decompose(model, ["W_in"], progress=False)
    scores = el.score(model, spectra, LONG, n_positions=2, progress=False)
    scores.save(tmp_path / "scores.parquet")
    again = el.Scores.load(tmp_path / "scores.parquet")
    assert again.means.positions == scores.means.positions
    assert again.means.positions.n_positions == 2
    np.testing.assert_array_equal(again.means.values, scores.means.values)
    with Gates(model, scores) as gates:
        # At zero the gradient by the gates is the score itself.
        slopes = [gates.gradient(batch)[1] for batch in make_batches(LONG, model, 3)]
        found = torch.stack(slopes).sum(0) / len(LONG)
        np.testing.assert_allclose(found, scores.delta_loss, atol=1e-10)
        # Closed, they freeze.
        (batch,) = make_batches(LONG, model, 6)
        gates.set(torch.ones(len(scores), dtype=torch.float64))
        with torch.no_grad():
            gated = answer_logits(model, batch)
    with torch.no_grad(), el.freeze(model, el.select(scores, 1.0)):
        frozen = answer_logits(model, batch)
    torch.testing.assert_close(
        gated[batch.answer_mask], frozen[batch.answer_mask], rtol=1e-9, atol=1e-9
    )
