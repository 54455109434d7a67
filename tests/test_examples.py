"""Passages where a coordinate is largest and smallest, against a loop over single examples."""

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import MIXED, dataset, in_families

import eigenlens as el
from eigenlens.tasks import make_batches


def by_hand(model, spectra, place, data):
    """``(coordinate, example, position)`` of every token that is read, one example at a time."""
    layer, matrix, head, index = place
    s = spectra[f"blocks.{layer}.{matrix}"]
    found = []
    for row in range(len(data)):
        (batch,) = make_batches(data.select([row]), model, 1)
        seen = []
        with (
            torch.no_grad(),
            model.hooks(
                fwd_hooks=[(s.site.hook, lambda value, hook, seen=seen: seen.append(value))]
            ),
        ):
            model(batch.tokens)
        h = seen[0].reshape(batch.tokens.shape[1], s.site.n_heads, s.site.width)[:, head]
        values = (h @ s.read[head, :, index]).tolist()
        found += [(v, row, p) for v, p in zip(values, batch.positions, strict=True)]
    return found


@in_families(["gpt2", "llama"])
@pytest.mark.parametrize("place", [(1, "W_O", 2, 3), (0, "W_out", 0, 5), (1, "W_Q", 1, 0)])
def test_extremes_equal_brute_force(tiny, family, place):
    model = tiny(family)
    spectra = el.decompose(model, progress=False)
    found = el.examples(model, spectra, place, MIXED, top=3, batch_size=2, progress=False)
    every = by_hand(model, spectra, place, MIXED)
    for end, sign in (("largest", -1), ("smallest", 1)):
        best = {}
        for value, row, position in sorted(every, key=lambda e, sign=sign: sign * e[0]):
            best.setdefault(row, (value, position))
        rows = found.passages[found.passages["end"] == end]
        assert list(rows["example"]) == list(best)[:3]
        assert list(rows["position"]) == [best[r][1] for r in list(best)[:3]]
        np.testing.assert_allclose(rows["coordinate"], [best[r][0] for r in list(best)[:3]])
    values = {(row, position): value for value, row, position in every}
    for _, row in found.passages.iterrows():
        start = row["position"] - row["at"]
        expected = [values[row["example"], start + i] for i in range(len(row["tokens"]))]
        np.testing.assert_allclose(row["coordinates"], expected)
        text = (MIXED[row["example"]]["prompt"] + MIXED[row["example"]]["answer"]).split()
        assert [t.strip() for t in row["tokens"]] == text[: len(row["tokens"])]


def test_a_window_is_cut_around_the_extreme_token(tiny):
    model = tiny("gpt2")
    spectra = el.decompose(model, progress=False)
    found = el.examples(model, spectra, (0, "W_in", 0, 0), MIXED, top=2, around=1, progress=False)
    for _, row in found.passages.iterrows():
        assert len(row["tokens"]) <= 3
        assert row["coordinates"][row["at"]] == row["coordinate"]


def test_a_block_is_described_by_its_length(tiny):
    model = tiny("llama")
    with torch.no_grad():  # the first two singular values of a head become equal
        weight = spectra_weight(model)
        before = weight.clone()
        u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
        sigma[1] = sigma[0]
        weight.copy_(u @ torch.diag(sigma) @ vh)
    try:
        spectra = el.decompose(model, matrices=["W_out"], progress=False, cache=False)
        found = el.examples(model, spectra, (0, "W_out", 0, 1), MIXED, top=1, progress=False)
        both = [by_hand(model, spectra, (0, "W_out", 0, i), MIXED) for i in (0, 1)]
        lengths = [np.hypot(a[0], b[0]) for a, b in zip(*both, strict=True)]
        assert found.passages["coordinate"].tolist() == pytest.approx([max(lengths), min_of(both)])
        assert "0–1" in found.node
    finally:
        with torch.no_grad():
            weight.copy_(before)


def min_of(both):
    return min(np.hypot(a[0], b[0]) for a, b in zip(*both, strict=True))


def spectra_weight(model):
    return el.weight_matrices(model, ["W_out"], [0])[0].flat_weight


def test_results_show_and_are_saved(tiny, tmp_path, capsys):
    model = tiny("gpt2")
    spectra = el.decompose(model, progress=False)
    row = spectra.components.iloc[7]
    found = el.examples(model, spectra, row, MIXED, top=2, progress=False)
    same = el.examples(model, spectra, tuple(row[:4]), MIXED, top=2, progress=False)
    pd.testing.assert_frame_equal(found.passages, same.passages)
    found.show()
    printed = capsys.readouterr().out
    assert printed.count("[[") == 4
    found.save(tmp_path / "examples.json")
    back = el.Examples.load(tmp_path / "examples.json")
    pd.testing.assert_frame_equal(back.passages, found.passages)
    assert back._repr_html_() == found._repr_html_()


def test_tokens_are_escaped(tiny):
    model = tiny("gpt2")
    spectra = el.decompose(model, progress=False)
    data = dataset([("<s> 1 + 2 =", " 3")])
    shown = el.examples(model, spectra, (0, "W_in", 0, 0), data, progress=False)._repr_html_()
    assert "<s>" not in shown
    assert "&lt;s&gt;" in shown


def test_what_does_not_fit_is_refused(tiny):
    model = tiny("gpt2")
    spectra = el.decompose(model, progress=False)
    for component, options, message in (
        ((0, "W_in", 0, 999), {}, "there is no head 0, index 999"),
        ((0, "W_in", 0), {}, "A component has layer"),
        ({"layer": 0}, {}, "A component has layer"),
        ((0, "W_in", 0, 0), {"top": 0}, "top=0"),
    ):
        with pytest.raises(ValueError, match=message):
            el.examples(model, spectra, component, MIXED, progress=False, **options)
