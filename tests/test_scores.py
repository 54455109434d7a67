"""Scores against autograd, stored activations and hand computation."""

import numpy as np
import pytest
import torch
from tiny_models import EQUAL, FAMILIES, MIXED, dataset
from transformers.pytorch_utils import Conv1D

import eigenlens as el
from eigenlens.metrics import answer_logits, answer_loss, kl_to_unedited, logit_diff
from eigenlens.scoring.accumulators import CrossMoments, EffectMoments
from eigenlens.scoring.by_cache import effects_by_cache
from eigenlens.scoring.scorer import (
    forward_backward,
    position_range,
    position_rows,
    varying_positions,
)
from eigenlens.tasks import make_batches


def quiet(model, spectra, data, **options):
    return el.score(model, spectra, data, progress=False, **options)


def spectra_of(model, **options):
    return el.decompose(model, progress=False, **options)


def gradient_of_sigma(model, spectra, data):
    """``∂L/∂σ_i`` of the mean loss, by autograd through the weights themselves."""
    weights = [s.matrix.module.weight for s in spectra.values()]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            losses = [answer_loss(answer_logits(model, b), b) for b in make_batches(data, model, 2)]
            grads = torch.autograd.grad(torch.cat(losses).sum(), weights)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    found = []
    for spectrum, grad in zip(spectra.values(), grads, strict=True):
        m = spectrum.matrix
        flat = grad if isinstance(m.module, Conv1D) else grad.T
        if m.head_axis == "out":
            per_head = flat.unflatten(1, (m.n_heads, m.d_out)).transpose(0, 1)
        else:
            per_head = flat.unflatten(0, (m.n_heads, m.d_in))
        found.append(torch.einsum("hir,hio,hro->hr", spectrum.u, per_head, spectrum.vh).flatten())
    return torch.cat(found).numpy() / len(data)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("data", [EQUAL, MIXED], ids=["equal", "padded"])
def test_zero_reference_is_minus_sigma_times_gradient(tiny, family, data):
    model = tiny(family)
    spectra = spectra_of(model)
    scores = quiet(model, spectra, data, reference="zero", batch_size=2)
    expected = -scores.components["sigma"] * gradient_of_sigma(model, spectra, data)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(scores.delta_loss, expected, rtol=1e-8, atol=1e-8 * scale)


@pytest.mark.parametrize("family", FAMILIES)
def test_streaming_equals_sum_over_stored_activations(tiny, family):
    model = tiny(family)
    spectra = spectra_of(model)
    effects = effects_by_cache(model, spectra, EQUAL)
    expected = torch.cat([e.sum(1).mean(0).flatten() for e in effects.values()]).numpy()
    scores = quiet(model, spectra, EQUAL, batch_size=4)
    tolerance = 1e-10 * np.abs(expected).max()
    np.testing.assert_allclose(scores.delta_loss, expected, rtol=1e-8, atol=tolerance)


def test_criteria_equal_hand_sums(tiny):
    model = tiny("gpt2")
    spectra = spectra_of(model, matrices=["W_V", "W_O", "W_in"])
    effects = effects_by_cache(model, spectra, EQUAL)
    # The signs vary too, since they follow different numbers: no position is constant here.
    each = torch.cat([e.flatten(2) for e in effects.values()], dim=2)
    example = each.sum(1)
    scores = quiet(model, spectra, EQUAL, criterion="max", batch_size=3)
    np.testing.assert_allclose(scores.delta_loss, each.amax((0, 1)), atol=1e-12)
    np.testing.assert_allclose(scores.components["effect"], example.mean(0), atol=1e-12)
    np.testing.assert_allclose(scores.components["std"], example.std(0), atol=1e-10)
    np.testing.assert_allclose(scores.stderr, example.std(0) / len(EQUAL) ** 0.5, atol=1e-10)
    fisher = example.mean(0) + example.square().mean(0) / 2
    np.testing.assert_allclose(scores.with_criterion("fisher").delta_loss, fisher, atol=1e-9)
    losses = torch.tensor(el.evaluate(model, EQUAL).examples["loss"].to_numpy())[:, None]
    odds = torch.log(torch.exp(-losses) / (1 - torch.exp(-losses)))
    moved = odds - example / (1 - torch.exp(-losses))
    margin = (-torch.log(torch.sigmoid(moved)) - losses).mean(0)
    np.testing.assert_allclose(scores.with_criterion("margin").delta_loss, margin, atol=1e-9)
    ucb = scores.with_criterion("ucb", z=2.0)
    np.testing.assert_allclose(ucb.delta_loss, example.mean(0) + 2 * example.std(0), atol=1e-9)


def test_per_example_and_streaming_agree_for_every_reference(tiny):
    model = tiny("llama")
    spectra = spectra_of(model)
    for reference in ("mean", "zero", "resample"):
        plain = quiet(model, spectra, MIXED, reference=reference, batch_size=3)
        errors = quiet(model, spectra, MIXED, reference=reference, batch_size=3, stderr=True)
        assert np.isnan(plain.stderr).all()
        assert (errors.stderr >= 0).all()
        np.testing.assert_allclose(plain.delta_loss, errors.delta_loss, atol=1e-10)


def test_resample_equals_swapping_by_hand(tiny):
    model = tiny("gpt2")
    spectra = spectra_of(model, matrices=["W_out"], layers=[1])
    pair = EQUAL.select([0, 1])
    spectrum = spectra["blocks.1.W_out"]
    xs, gs = [], []
    for batch in make_batches(pair, model, 2):
        forward_backward(
            model,
            [spectrum],
            batch,
            answer_loss,
            lambda s, x, g, values: (xs.append(x), gs.append(g)),
        )
    a, g = spectrum.reads(xs[0]), spectrum.writes(gs[0])
    expected = ((a.flip(0) - a) * g).sum((0, 1)).flatten() / 2
    scores = quiet(model, spectra, pair, reference="resample", batch_size=2)
    np.testing.assert_allclose(scores.delta_loss, expected, atol=1e-12)


def test_first_order_matches_finite_difference_of_attenuation(tiny):
    """The derivative of the loss by the strength of a freeze, at strength 0, is the score."""
    model = tiny("llama")
    scores = quiet(model, spectra_of(model), EQUAL)
    rows = np.argsort(-np.abs(scores.delta_loss))[::40]
    step = 1e-4
    for row in rows:
        frozen = el.FrozenSet.from_scores(scores, np.array([row]), strength=step)
        base = el.evaluate(model, EQUAL).loss
        with el.freeze(model, frozen):
            slope = (el.evaluate(model, EQUAL).loss - base) / step
        assert slope == pytest.approx(scores.delta_loss[row], rel=1e-2, abs=1e-5)


def test_halves_merge_to_the_whole(tiny):
    model = tiny("qwen3")
    spectrum = spectra_of(model, matrices=["W_K"], layers=[1])["blocks.1.W_K"]
    batches = make_batches(MIXED, model, 1)
    positions = position_range(batches)

    def moments(part):
        cross = CrossMoments.zeros(spectrum, len(positions))
        single = EffectMoments.zeros(spectrum)
        for batch in part:
            rows = position_rows(batch, positions)

            def add(s, x, g, values, rows=rows, batch=batch):
                cross.update(rows, x, g)
                single.update(-s.reads(x) * s.writes(g), batch.attention_mask, values)

            forward_backward(model, [spectrum], batch, answer_loss, add)
        return cross, single

    whole, merged = (
        moments(batches),
        [a + b for a, b in zip(moments(batches[:2]), moments(batches[2:]), strict=True)],
    )
    for one, two in zip(whole, merged, strict=True):
        for name in vars(one):
            torch.testing.assert_close(
                getattr(one, name), getattr(two, name), rtol=1e-12, atol=1e-14
            )


def test_padding_has_no_influence(tiny):
    """One example per batch has no padding at all; all in one batch have much."""
    for family in ("gpt2", "llama", "opt", "bloom"):
        model = tiny(family)
        spectra = spectra_of(model)
        for criterion in ("mean", "max"):
            alone = quiet(model, spectra, MIXED, batch_size=1, criterion=criterion)
            together = quiet(model, spectra, MIXED, batch_size=5, criterion=criterion)
            scale = np.abs(alone.delta_loss).max()
            np.testing.assert_allclose(together.delta_loss, alone.delta_loss, atol=1e-9 * scale)
            np.testing.assert_allclose(together.mean_activation, alone.mean_activation, atol=1e-9)


def test_means_are_over_all_batches_and_the_tokens_that_are_there(tiny):
    """Pitfall 6: means came from the last batch only, with padding in them."""
    model = tiny("gpt2")
    spectra = spectra_of(model, matrices=["W_in"], layers=[0])
    spectrum = spectra["blocks.0.W_in"]
    scores = quiet(model, spectra, MIXED, batch_size=2)
    sums = {}
    for row in range(len(MIXED)):
        (batch,) = make_batches(MIXED.select([row]), model, 1)
        _, cache = model.run_with_cache(batch.tokens, names_filter=[spectrum.matrix.hook_in])
        for position, a in zip(
            batch.positions, spectrum.reads(cache[spectrum.matrix.hook_in])[0], strict=True
        ):
            sums.setdefault(position, []).append(a.flatten())
    assert list(scores.positions) == sorted(sums)
    for column, position in enumerate(scores.positions):
        assert scores.count[column] == len(sums[position])
        np.testing.assert_allclose(
            scores.mean_activation[:, column], torch.stack(sums[position]).mean(0), atol=1e-10
        )


def test_constant_positions_do_not_hide_harm(tiny):
    """Pitfall 2: with an identical first token among the positions no maximum is below zero."""
    model = tiny("gpt2")
    data = dataset([(f"x 3 + {a}", f" {a + 2}") for a in (1, 5, 9)])
    batches = make_batches(data, model, 2)
    assert varying_positions(batches, position_range(batches)).tolist() == [
        False,
        False,
        False,
        True,
    ]
    scores = quiet(model, spectra_of(model), data, criterion="max")
    assert (scores.delta_loss < 0).any()
    blind = quiet(model, spectra_of(model), data, criterion="max", constant_positions=True)
    assert (blind.delta_loss >= 0).all()


def test_batch_of_one_still_scores(tiny):
    """Pitfall 1: a rolled batch of one compares every example with itself."""
    model = tiny("gpt2")
    spectra = spectra_of(model)
    one = quiet(model, spectra, EQUAL, batch_size=1)
    assert np.abs(one.delta_loss).max() > 1e-6
    for options in ({"batch_size": 1}, {"batch_size": 5, "data": EQUAL.select([0])}):
        data = options.pop("data", EQUAL)
        with pytest.raises(ValueError, match="at least 2"):
            quiet(model, spectra, data, reference="resample", **options)


def test_inputs_are_what_the_matrix_multiplies(tiny):
    """Pitfall 5: inputs were taken before the norm, and W_out's before the activation."""
    for family in ("gpt2", "llama", "gemma2", "phi"):
        model = tiny(family)
        spectra = spectra_of(model)
        (batch,) = make_batches(EQUAL, model, len(EQUAL))
        names = [n for m in spectra.matrices for n in (m.hook_in, m.hook_out)]
        _, cache = model.run_with_cache(batch.tokens, names_filter=names)
        for matrix in spectra.matrices:
            x, y = cache[matrix.hook_in].flatten(2), cache[matrix.hook_out].flatten(2)
            bias = matrix.bias if matrix.bias is not None else 0
            torch.testing.assert_close(x @ matrix.flat_weight + bias, y, rtol=1e-10, atol=1e-12)


def test_no_weight_gets_a_gradient(tiny):
    model = tiny("gpt2")
    spectra = spectra_of(model)
    model.requires_grad_(True)
    try:
        quiet(model, spectra, EQUAL)
        assert all(p.grad is None for p in model.parameters())
    finally:
        model.requires_grad_(False)
    assert not any(point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.values())


def test_metrics_are_differentiated(tiny):
    """A score under any metric is the slope of that metric along the strength of a freeze."""
    model = tiny("gpt2")
    spectra = spectra_of(model, layers=[1])
    wrong = torch.arange(10, 10 + len(EQUAL))
    metric = logit_diff(wrong)

    def value():
        with torch.no_grad():
            return sum(
                metric(answer_logits(model, b), b).sum() for b in make_batches(EQUAL, model, 3)
            ) / len(EQUAL)

    scores = quiet(model, spectra, EQUAL, metric=metric)
    row = int(np.argmax(np.abs(scores.delta_loss)))
    base = value()
    with el.freeze(model, el.FrozenSet.from_scores(scores, np.array([row]), strength=1e-6)):
        slope = (value() - base) / 1e-6
    assert float(slope) == pytest.approx(scores.delta_loss[row], rel=1e-3)


def test_kl_to_the_unedited_model_is_zero_and_flat_there(tiny):
    model = tiny("llama")
    spectra = spectra_of(model)
    metric = kl_to_unedited(model, MIXED)
    np.testing.assert_allclose(quiet(model, spectra, MIXED, metric=metric).delta_loss, 0, atol=1e-4)
    scores = quiet(model, spectra, MIXED)
    with torch.no_grad(), el.freeze(model, el.select(scores, 0.5)):
        after = torch.cat(
            [metric(answer_logits(model, b), b) for b in make_batches(MIXED, model, 2)]
        )
    assert (after > 0).all()


def test_scores_of_a_bfloat16_model_accumulate_in_float32(tiny_folder):
    model = el.load_model(tiny_folder("llama"), dtype="bfloat16", device="cpu")
    exact = el.load_model(tiny_folder("llama"), dtype=torch.float32, device="cpu")
    spectra = spectra_of(model)
    assert all(s.sigma.dtype == torch.float32 for s in spectra.values())
    coarse = quiet(model, spectra, EQUAL).delta_loss
    fine = quiet(exact, spectra_of(exact), EQUAL).delta_loss
    assert np.corrcoef(coarse, fine)[0, 1] > 0.9


def test_save_and_load(tiny, tmp_path):
    model = tiny("gpt2")
    scores = quiet(model, spectra_of(model), EQUAL, criterion="max")
    scores.save(tmp_path / "scores.parquet")
    again = el.Scores.load(tmp_path / "scores.parquet")
    assert list(again.to_pandas()) == [
        "layer",
        "matrix",
        "head",
        "index",
        "sigma",
        "delta_loss",
        "stderr",
    ]
    assert again.to_pandas().equals(scores.to_pandas())
    assert again.provenance == scores.provenance
    np.testing.assert_array_equal(again.mean_activation, scores.mean_activation)
    assert el.select(again, 0.2).to_pandas().equals(el.select(scores, 0.2).to_pandas())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "median"}, "Unknown criterion 'median'"),
        ({"reference": "noise"}, "Unknown reference 'noise'"),
        ({"matrices": ["W_X"]}, "Unknown matrix kind 'W_X'"),
        ({"layers": [7]}, "Unknown layer 7"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_options_are_refused(tiny, options, message):
    model = tiny("gpt2")
    with pytest.raises(ValueError, match=message):
        quiet(model, spectra_of(model), EQUAL, **options)


def test_bad_models_and_data_are_refused(tiny, tiny_folder):
    model = el.load_model(tiny_folder("gpt2"), dtype=torch.float64, device="cpu")
    spectra = spectra_of(model)
    with pytest.raises(ValueError, match="tokenises to nothing"):
        quiet(model, spectra, dataset([("1 + 2 =", " ")]))
    with pytest.raises(ValueError, match="empty"):
        quiet(model, spectra, dataset([]))
    with pytest.raises(ValueError, match="context holds 32"):
        quiet(model, spectra, dataset([("1 " * 40 + "=", " 2")]))
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        quiet(model, spectra, EQUAL)
    model.eval()
    model.blocks[1].mlp.out.original_component.bias.data[0] = torch.inf
    with pytest.raises(ValueError, match="other weights"):
        quiet(model, spectra, EQUAL)
    with pytest.raises(ValueError, match="NaN or infinite"):
        quiet(model, spectra_of(model), EQUAL)
    model.blocks[1].mlp.out.original_component.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"blocks\.1\.W_out holds NaN"):
        spectra_of(model)
