"""Scores against autograd, stored activations and hand computation."""

import numpy as np
import pytest
import torch
from tiny_models import EQUAL, MIXED, dataset, in_families
from transformers.pytorch_utils import Conv1D

import eigenlens as el
from eigenlens.exact import exact_effects
from eigenlens.far_side import input_vectors, output_vectors
from eigenlens.metrics import answer_logits, answer_loss, kl_to_unedited, logit_diff
from eigenlens.passes import FiniteCheck, forward_backward
from eigenlens.position_means import Positions
from eigenlens.scoring import single_effects
from eigenlens.scoring.accumulators import ActivationSums, CrossSums, EffectSums, margin_effect
from eigenlens.scoring.by_cache import effects_by_cache
from eigenlens.scoring.scorer import varying_positions
from eigenlens.tasks import make_batches


def quiet(model, spectra, data, **options):
    return el.score(model, spectra, data, progress=False, **options)


def spectra_of(model, **options):
    return el.decompose(model, progress=False, **options)


def gradient_of_sigma(model, spectra, data):
    """``σ_i ∂L/∂σ_i`` of the mean loss, by autograd through the weights themselves."""
    matrices = [s.site.find(model) for s in spectra.values()]
    weights = [m.module.weight for m in matrices]
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
    for spectrum, m, grad in zip(spectra.values(), matrices, grads, strict=True):
        flat = grad if isinstance(m.module, Conv1D) else grad.T
        if m.head_axis == "out":
            per_head = flat.unflatten(1, (m.n_heads, m.d_out)).transpose(0, 1)
        else:
            per_head = flat.unflatten(0, (m.n_heads, m.d_in))
        component = input_vectors(model, spectrum), per_head, output_vectors(model, spectrum)
        found.append(torch.einsum("hir,hio,hro->hr", *component).flatten())
    return torch.cat(found).numpy() / len(data)


@in_families()
@pytest.mark.parametrize("data", [EQUAL, MIXED], ids=["equal", "padded"])
def test_zero_reference_is_minus_sigma_times_gradient(tiny, family, data):
    model = tiny(family)
    spectra = spectra_of(model)
    scores = quiet(model, spectra, data, reference="zero", batch_size=2)
    expected = -gradient_of_sigma(model, spectra, data)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(scores.delta_loss, expected, rtol=1e-8, atol=1e-8 * scale)


@in_families()
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
    errors = scores.with_criterion("mean").stderr
    np.testing.assert_allclose(errors, example.std(0) / len(EQUAL) ** 0.5, atol=1e-10)
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


def one_pass(model, spectra, data, batch_size=8):
    """Coordinates and slopes of every site, batch by batch."""
    found = []
    for batch in make_batches(data, model, batch_size):
        sites = {s.site.name: s for s in spectra}
        seen = {}

        def keep(site, h, g, values, sites=sites, seen=seen):
            s = sites[site.name]
            seen[site.name] = s.coordinates(h), s.slopes(g)

        forward_backward(model, [s.site for s in spectra], batch, answer_loss, keep, FiniteCheck())
        found.append((batch, seen))
    return found


def test_resample_equals_swapping_by_hand(tiny):
    model = tiny("gpt2")
    spectra = spectra_of(model, matrices=["W_out"], layers=[1])
    pair = EQUAL.select([0, 1])
    ((_, seen),) = one_pass(model, spectra.values(), pair)
    a, g = seen["blocks.1.W_out"]
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


@pytest.mark.parametrize("whole", [True, False])
def test_halves_merge_to_the_whole(tiny, whole):
    model = tiny("qwen3")
    spectrum = spectra_of(model, matrices=["W_K"], layers=[1])["blocks.1.W_K"]
    batches = make_batches(MIXED, model, 1)
    positions = Positions.of(batches)

    def sums(part):
        slopes = ActivationSums.zeros(spectrum, len(positions) + 1)
        cross = CrossSums.zeros(spectrum, whole=whole)
        single = EffectSums.zeros(spectrum, by_position=whole)
        for batch in part:
            rows = positions.of_batch(batch)

            def add(site, h, g, values, rows=rows, batch=batch):
                slopes.update(rows, g)
                cross.update(spectrum, h, g)
                effect = -spectrum.coordinates(h) * spectrum.slopes(g)
                single.update(effect, batch.attention_mask, values)

            forward_backward(model, [spectrum.site], batch, answer_loss, add, FiniteCheck())
        return slopes, cross, single

    halves = sums(batches[:2])
    for mine, other in zip(halves, sums(batches[2:]), strict=True):
        mine.merge(other)
    for one, two in zip(sums(batches), halves, strict=True):
        for name in vars(one):
            torch.testing.assert_close(
                getattr(one, name), getattr(two, name), rtol=1e-12, atol=1e-14
            )


@in_families(["gpt2", "llama", "falcon"])
@pytest.mark.parametrize("reference", ["mean", "shared", "zero", "resample"])
def test_projecting_batch_by_batch_gives_the_same(tiny, family, reference):
    """Where there is no room for the sums of outer products."""
    model = tiny(family)
    spectra = spectra_of(model)
    roomy, narrow = (
        quiet(model, spectra, MIXED, reference=reference, batch_size=3, memory_gb=memory)
        for memory in (1.0, 0.0)
    )
    scale = np.abs(roomy.delta_loss).max()
    np.testing.assert_allclose(narrow.delta_loss, roomy.delta_loss, atol=1e-12 * scale)


def test_shared_means_are_over_all_tokens(tiny):
    model = tiny("llama")
    spectra = spectra_of(model)
    scores = quiet(model, spectra, MIXED, reference="shared", batch_size=3)
    plain = quiet(model, spectra, MIXED, batch_size=3)
    assert scores.means.is_shared
    assert not plain.means.is_shared
    np.testing.assert_allclose(scores.means.fallback, plain.means.fallback, atol=1e-12)
    np.testing.assert_allclose(plain.means.shared().fallback, scores.means.fallback, atol=1e-12)
    total, n = 0, 0
    for batch, seen in one_pass(model, spectra.values(), MIXED, 2):
        c = torch.cat([c.flatten(2) for c, _ in seen.values()], 2) if len(seen) > 1 else 0
        order = [spectra[name] for name in spectra]
        c = torch.cat([seen[s.name][0].flatten(2) for s in order], 2)
        total = total + c[batch.attention_mask].sum(0)
        n += int(batch.attention_mask.sum())
    np.testing.assert_allclose(scores.means.fallback, total / n, atol=1e-10)
    # The score is the slope of the loss along the strength of such a freeze.
    row = int(np.argmax(np.abs(scores.delta_loss)))
    frozen = el.FrozenSet.from_scores(scores, np.array([row]), strength=1e-6)
    base = el.evaluate(model, MIXED, progress=False).loss
    with el.freeze(model, frozen):
        slope = (el.evaluate(model, MIXED, progress=False).loss - base) / 1e-6
    assert slope == pytest.approx(scores.delta_loss[row], rel=1e-3)


def test_margins_are_the_exact_change_of_a_binary_loss():
    """A logistic loss whose log-odds really move linearly, from lost to saturated."""
    odds = torch.tensor([-30.0, -3.0, 0.0, 2.0, 17.0, 25.0, 60.0], dtype=torch.float64)
    move = torch.tensor([[-40.0, -1.0, -1e-9, 1e-9, 0.3, 40.0]], dtype=torch.float64)
    loss = torch.nn.functional.softplus(-odds)
    wrong = torch.sigmoid(-odds)[:, None]
    expected = torch.nn.functional.softplus(-(odds[:, None] - move)) - loss[:, None]
    for dtype, rtol in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
        found = margin_effect((move * wrong).to(dtype), loss)
        torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=1e-12)
    assert margin_effect(torch.full((1, 1), 1e-40), torch.zeros(1)).item() == pytest.approx(1e-40)


def test_margin_of_a_saturated_answer(tiny_folder):
    """A lead of 25: float32 had a loss of exactly 0, and margins of +40 nats for no effect."""
    model = el.load_model(tiny_folder("gpt2"), dtype=torch.float32, device="cpu")
    data = dataset([("1 + 2 =", " 3"), ("9 + 4 =", " 13")])
    answer = model.tokenizer.encode(" 3", add_special_tokens=False)[0]
    logits = torch.zeros(1, 1, 64)
    logits[0, 0, answer] = 25.0
    (batch,) = make_batches(data.select([0]), model, 1)
    loss = answer_loss(logits, batch)
    assert float(loss) == pytest.approx(63 * np.exp(-25.0), rel=1e-5)
    model.ln_final.original_component.weight.data *= 1e7
    spectra = spectra_of(model)
    task = dataset([(p, "") for p in ("1 + 2 =", "9 + 4 =")])
    sure = dataset([(p, " " + predicted(model, p)) for p in task["prompt"]])
    assert el.evaluate(model, sure, progress=False).loss < 1e-6
    scores = quiet(model, spectra, sure, criterion="margin")
    assert np.isfinite(scores.delta_loss).all()
    rows = np.argsort(-np.abs(scores.delta_loss))[:10]
    exact = exact_effects(model, scores, rows, sure, progress=False).mean(1)
    assert np.abs(scores.delta_loss[rows]).max() <= max(1.0, 3 * np.abs(exact).max())


def predicted(model, prompt):
    """The most likely next word."""
    tokens = torch.tensor([model.tokenizer.encode(prompt, add_special_tokens=False)])
    with torch.no_grad():
        return model.tokenizer.decode([int(model(tokens)[0, -1].argmax())])


def test_standard_errors_are_those_of_the_criterion(tiny):
    model = tiny("llama")
    scores = quiet(model, spectra_of(model), EQUAL, criterion="margin")
    single = single_effects(model, scores, EQUAL, progress=False)
    margins = single.margins.numpy()
    np.testing.assert_allclose(scores.delta_loss, margins.mean(0), atol=1e-12)
    expected = margins.std(0, ddof=1) / len(EQUAL) ** 0.5
    np.testing.assert_allclose(scores.stderr, expected, atol=1e-9)
    for criterion in ("fisher", "ucb"):
        assert np.isnan(scores.with_criterion(criterion).stderr).all()


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
            np.testing.assert_allclose(together.means.values, alone.means.values, atol=1e-9)


def test_means_are_over_all_batches_and_the_tokens_that_are_there(tiny):
    """Pitfall 6: means came from the last batch only, with padding in them."""
    model = tiny("gpt2")
    spectra = spectra_of(model, matrices=["W_in"], layers=[0])
    spectrum = spectra["blocks.0.W_in"]
    scores = quiet(model, spectra, MIXED, batch_size=2)
    sums = {}
    for row in range(len(MIXED)):
        (batch,) = make_batches(MIXED.select([row]), model, 1)
        _, cache = model.run_with_cache(batch.tokens, names_filter=[spectrum.site.hook])
        h = spectrum.site.split(cache[spectrum.site.hook], batch.tokens.shape[1])
        for position, c in zip(batch.positions, spectrum.coordinates(h)[0], strict=True):
            sums.setdefault(position, []).append(c.flatten())
    means = scores.means
    assert list(means.positions.range) == sorted(sums)
    for column, position in enumerate(means.positions.range):
        assert means.count[column] == len(sums[position])
        np.testing.assert_allclose(
            means.values[:, column], torch.stack(sums[position]).mean(0), atol=1e-10
        )


def test_constant_positions_do_not_hide_harm(tiny):
    """Pitfall 2: with an identical first token among the positions no maximum is below zero."""
    model = tiny("gpt2")
    data = dataset([(f"x 3 + {a}", f" {a + 2}") for a in (1, 5, 9)])
    batches = make_batches(data, model, 2)
    varies = varying_positions(batches, Positions.of(batches)).tolist()
    assert varies[:-1] == [False, False, False, True]
    scores = quiet(model, spectra_of(model), data, criterion="max")
    assert (scores.delta_loss < 0).any()
    blind = quiet(model, spectra_of(model), data, criterion="max_everywhere")
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
        (batch,) = make_batches(EQUAL, model, len(EQUAL))
        matrices = el.weight_matrices(model)
        names = [n for m in matrices for n in (m.hook_in, m.hook_out)]
        _, cache = model.run_with_cache(batch.tokens, names_filter=names)
        for matrix in matrices:
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
    assert all(s.dtype == torch.float32 for s in spectra.values())
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
    np.testing.assert_array_equal(again.means.values, scores.means.values)
    assert el.select(again, 0.2).to_pandas().equals(el.select(scores, 0.2).to_pandas())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "median"}, "Unknown criterion 'median'"),
        ({"reference": "noise"}, "Unknown reference 'noise'"),
        ({"n_positions": -1}, "n_positions=-1 is negative"),
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


@in_families(["gpt2", "llama", "phi"])
def test_processed_weights_of_the_bridge_score_like_any(tiny_folder, family):
    """Under TransformerLens' compatibility mode, which folds norms, scoring was a bare KeyError."""
    model = el.load_model(tiny_folder(family), dtype=torch.float64, device="cpu")
    model.enable_compatibility_mode()
    scores = quiet(model, spectra_of(model), EQUAL)
    base = el.evaluate(model, EQUAL, progress=False).loss
    for row in np.argsort(-np.abs(scores.delta_loss))[:3]:
        frozen = el.FrozenSet.from_scores(scores, np.array([row]), strength=1e-5)
        with el.freeze(model, frozen):
            slope = (el.evaluate(model, EQUAL, progress=False).loss - base) / 1e-5
        assert slope == pytest.approx(scores.delta_loss[row], rel=1e-2, abs=1e-6)
