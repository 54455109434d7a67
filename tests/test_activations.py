"""Activation changes against ``run_with_cache`` by hand, one example at a time."""

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import EQUAL, MIXED, dataset, in_families

import eigenlens as el
from eigenlens.files import FileFormatError
from eigenlens.frozen_set import WrongModelError
from eigenlens.tasks import make_batches

ONE_TOKEN = dataset([("1 + 2 =", " 3"), ("9 x 4 + 1 =", " 37"), ("7 + 7 + 7 + 7 =", " 28")])
STATISTICS = ["norm_before", "norm_after", "cosine", "change"]


def frozen_part(model, data=MIXED, fraction=0.3):
    spectra = el.decompose(model, progress=False)
    return el.select(el.score(model, spectra, data, progress=False), fraction)


def caches(model, frozen, data):
    """Batch of one, its cache before and its cache after, for every example."""
    for row in range(len(data)):
        (batch,) = make_batches(data.select([row]), model, 1)
        with torch.no_grad(), el.positions.prompt_ends_at(model, batch.n_prompt):
            _, before = model.run_with_cache(batch.tokens)
        ends = el.positions.prompt_ends_at
        with torch.no_grad(), el.freeze(model, frozen), ends(model, batch.n_prompt):
            _, after = model.run_with_cache(batch.tokens)
        yield batch, before, after


def statistics(one, two):
    one, two = one.numpy(), two.numpy()
    norms = np.linalg.norm(one), np.linalg.norm(two)
    return [*norms, one @ two / norms[0] / norms[1], np.linalg.norm(two - one) / norms[0]]


@in_families(["gpt2", "llama", "gemma2"])
def test_every_table_equals_single_examples_by_hand(tiny, family):
    model = tiny(family)
    frozen = frozen_part(model)
    w_o = el.weight_matrices(model, ["W_O"], [1])[0]
    rows, patterns = [], []
    for batch, before, after in caches(model, frozen, MIXED):
        for column, position in enumerate(batch.positions):

            def add(kind, one, two, place, position=position):
                rows.append([kind, place, position, *statistics(one, two)])

            for depth, point in enumerate(
                ["blocks.0.hook_in", "blocks.1.hook_in", "ln_final.hook_in"]
            ):
                add("residual", before[point][0, column], after[point][0, column], depth)
            point = "blocks.1.mlp.out.hook_out"
            add("mlp", before[point][0, column], after[point][0, column], 1)
            z = [c["blocks.1.attn.o.hook_in"].flatten(2)[0, column] for c in (before, after)]
            for head in range(w_o.n_heads):
                part = slice(head * w_o.d_in, (head + 1) * w_o.d_in)
                add("heads", *(v[part] @ w_o.flat_weight[part] for v in z), head)
            pattern = [c["blocks.1.attn.hook_pattern"][0, 0] for c in (before, after)]
            patterns += [
                [position, other, *(float(p[column, k]) for p in pattern)]
                for k, other in enumerate(batch.positions)
            ]
    expected = pd.DataFrame(rows, columns=["kind", "place", "position", *STATISTICS])
    expected = expected.groupby(["kind", "place", "position"]).mean()
    found = el.activation_change(model, frozen, MIXED, batch_size=3)
    mine = {
        "residual": found.residual.rename(columns={"depth": "place"}),
        "mlp": found.mlp[found.mlp["layer"] == 1].rename(columns={"layer": "place"}),
        "heads": found.heads[found.heads["layer"] == 1].rename(columns={"head": "place"}),
    }
    for kind, table in mine.items():
        table = table.set_index(["place", "position"])[STATISTICS].sort_index()
        pd.testing.assert_frame_equal(table, expected.loc[kind].sort_index())
    counts = pd.DataFrame(patterns, columns=["query", "key", "before", "after"])
    # Absent keys have no attention, so the mean is over the examples that have the query.
    total = counts.groupby(["query", "key"])[["before", "after"]].sum()
    n = counts[counts["query"] == counts["key"]].groupby("query").size()
    own = found.patterns[(found.patterns["layer"] == 1) & (found.patterns["head"] == 0)]
    own = own.set_index(["query", "key"])[["before", "after"]]
    for (query, key), values in total.iterrows():
        np.testing.assert_allclose(own.loc[(query, key)], values / n[query], atol=1e-12)


@in_families()
def test_at_full_depth_the_lens_is_the_model(tiny, family):
    model = tiny(family)
    frozen = frozen_part(model, ONE_TOKEN)
    found = el.activation_change(model, frozen, ONE_TOKEN, batch_size=2).lens.iloc[-1]
    before = el.evaluate(model, ONE_TOKEN)
    with el.freeze(model, frozen):
        after = el.evaluate(model, ONE_TOKEN)
    assert found["logprob_before"] == pytest.approx(-before.loss, abs=1e-6)
    assert found["logprob_after"] == pytest.approx(-after.loss, abs=1e-6)
    assert found["top_before"] == pytest.approx(before.accuracy)
    assert found["top_after"] == pytest.approx(after.accuracy)
    assert before.loss != pytest.approx(after.loss)


def test_no_edit_changes_nothing_and_an_edit_nothing_before_it(tiny):
    model = tiny("llama")
    scores = el.score(model, el.decompose(model, progress=False), EQUAL, progress=False)
    none = el.activation_change(model, el.select(scores, count=0), EQUAL)
    for table in (none.residual, none.heads, none.mlp):
        np.testing.assert_allclose(table["cosine"], 1)
        assert (table["change"] == 0).all()
    late = scores.components.index[scores.components["layer"] == 1].to_numpy()[:40]
    found = el.activation_change(model, el.FrozenSet.from_scores(scores, late), EQUAL)
    depth = found.residual.groupby("depth")["change"].max()
    assert depth[0] == depth[1] == 0 < depth[2]


def test_only_the_last_positions_are_kept(tiny):
    model = tiny("gpt2")
    frozen = frozen_part(model)
    whole = el.activation_change(model, frozen, MIXED)
    short = el.activation_change(model, frozen, MIXED, last=2)
    assert sorted(short.residual["position"].unique()) == [-2, -1, 0, 1]
    kept = whole.residual[whole.residual["position"] >= -2].reset_index(drop=True)
    pd.testing.assert_frame_equal(short.residual, kept)
    both = ["query", "key"]
    kept = whole.patterns[(whole.patterns[both] >= -2).all(axis=1)].reset_index(drop=True)
    pd.testing.assert_frame_equal(short.patterns, kept)
    with pytest.raises(ValueError, match="last=0"):
        el.activation_change(model, frozen, MIXED, last=0)


def test_saved_changes_are_the_same_and_models_are_checked(tiny, tmp_path):
    model = tiny("gpt2")
    frozen = frozen_part(model)
    found = el.activation_change(model, frozen, MIXED)
    found.save(tmp_path / "change.safetensors")
    again = el.ActivationChange.load(tmp_path / "change.safetensors")
    for name in ("residual", "heads", "mlp", "lens", "patterns"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(found, name))
    assert (again.n_examples, again.provenance) == (len(MIXED), found.provenance)
    assert f"{len(MIXED)} examples" in found._repr_html_()
    frozen.save(tmp_path / "frozen.safetensors")
    with pytest.raises(FileFormatError, match="another kind"):
        el.ActivationChange.load(tmp_path / "frozen.safetensors")
    with pytest.raises(WrongModelError):
        el.activation_change(tiny("llama"), frozen, MIXED)
