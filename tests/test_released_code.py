"""The released code's arithmetic, against loops over singular values that follow its text."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import EQUAL, in_families

import eigenlens as el
from eigenlens.paper.released_code import (
    ReferenceCode,
    finetuned,
    raw_input_hook,
    run_like_released,
    score_like_reference,
    select_like_reference,
)
from eigenlens.provenance import model_fingerprint
from eigenlens.tasks import make_batches

ALL_DATA = {"batch_size": len(EQUAL)}
FAMILY = ["gpt2", "llama", "phi"]


def cached(model):
    """Inputs as the released code takes them, and output gradients, of one batch."""
    (batch,) = make_batches(EQUAL, model, len(EQUAL))
    matrices = el.weight_matrices(model)
    names = {raw_input_hook(model, m) for m in matrices} | {m.hook_out for m in matrices}
    inputs, grads = {}, {}
    start = ("blocks.0.hook_in", lambda v, hook: v.detach().requires_grad_())
    keep = [(n, lambda v, hook: inputs.__setitem__(hook.name, v.detach())) for n in names]
    back = [(n, lambda v, hook: grads.__setitem__(hook.name, v.detach())) for n in names]
    with torch.enable_grad(), model.hooks(fwd_hooks=[start, *keep], bwd_hooks=back):
        logits = model(batch.tokens[:, : batch.n_prompt])[:, -1]
        F.cross_entropy(logits, batch.answer[:, 0], reduction="sum").backward()
    return inputs, grads


def own_head(value, matrix, side, head):
    value = value.flatten(2)
    return (
        value.unflatten(2, (matrix.n_heads, -1))[:, :, head] if matrix.head_axis == side else value
    )


def triple(matrix, spectrum, head, index):
    """σ, u, v of one component, the sign of its direction on the small side as in the spectrum."""
    u, s, vt = np.linalg.svd(matrix.weight[head].numpy(), full_matrices=False)
    u, v = torch.tensor(u[:, index]), torch.tensor(vt[index])
    own = spectrum.read[head, :, index]
    sign = torch.sign((u if spectrum.site.side == "in" else v) @ own)
    return s[index], sign * u, sign * v


@pytest.mark.parametrize("family", FAMILY)
def test_scores_and_bias_equal_a_loop(tiny, family):
    model = tiny(family)
    spectra = el.decompose(model, progress=False)
    found = score_like_reference(model, spectra, EQUAL, ReferenceCode(**ALL_DATA))
    inputs, grads = cached(model)
    order = np.random.default_rng(0).permutation(len(EQUAL))  # neighbours in the shuffled batch
    table = found.components
    assert found.means.positions.stop == 0
    for row in range(0, len(table), 29):
        layer, kind, head, index = table.loc[row, ["layer", "matrix", "head", "index"]]
        spectrum = spectra[f"blocks.{layer}.{kind}"]
        matrix = spectrum.site.find(model)
        sigma, u, v = triple(matrix, spectrum, head, index)
        x = own_head(inputs[raw_input_hook(model, matrix)], matrix, "in", head)[order]
        a = sigma * (x @ u)
        g = own_head(grads[matrix.hook_out], matrix, "out", head)[order]
        effect = (a.roll(1, 0) - a) * (g @ v)
        assert found.delta_loss[row] == pytest.approx(float(effect.max()), abs=1e-9)
        mean = a.mean(0).numpy()
        mean = mean if kind == "W_O" else np.full(len(mean), mean.sum())
        # handed on as coordinates: those of outputs hold the bias, those of inputs have length one
        if spectrum.site.side == "in":
            mean = mean / sigma
        elif matrix.bias is not None:
            heads = matrix.bias.view(matrix.n_heads, -1)
            mean = mean + float(heads[head] @ v)
        np.testing.assert_allclose(found.means.values[row], mean, atol=1e-9)
        assert found.means.fallback[row] == pytest.approx(mean.mean(), abs=1e-9)


@pytest.mark.parametrize("family", FAMILY)
def test_with_every_switch_off_it_is_our_mean_score(tiny, family):
    model = tiny(family)
    spectra = el.decompose(model, progress=False)
    off = dict.fromkeys(
        (
            "one_batch",
            "rolled_reference",
            "worst_case",
            "first_token",
            "raw_inputs",
            "global_quota",
            "summed_bias",
        ),
        False,
    )
    found = score_like_reference(model, spectra, EQUAL, ReferenceCode(**off, batch_size=4))
    ours = el.score(model, spectra, EQUAL, progress=False)
    np.testing.assert_allclose(found.delta_loss, ours.delta_loss, atol=1e-9)
    np.testing.assert_allclose(found.means.values, ours.means.values, atol=1e-9)
    np.testing.assert_allclose(found.means.fallback, ours.means.fallback, atol=1e-9)
    chosen = select_like_reference(found, 0.25, ReferenceCode(**off))
    assert chosen.to_pandas().equals(el.select(ours, 0.25, within="matrix").to_pandas())


def test_the_quota_of_the_largest_kind_is_taken_from_one_list(tiny):
    model = tiny("llama")
    found = score_like_reference(model, el.decompose(model, progress=False), EQUAL)
    frozen = select_like_reference(found, 0.3)
    counts = found.components["matrix"].value_counts()
    assert len(frozen) == int(0.3 * counts.max()) < round(0.3 * len(found))
    lowest = np.sort(found.delta_loss)[: len(frozen)]
    merged = frozen.to_pandas().merge(found.to_pandas())
    np.testing.assert_array_equal(np.sort(merged["delta_loss"]), lowest)


def test_a_maximum_over_constant_positions_is_never_negative(tiny):
    """Pitfall 2: harm is invisible where the first token is the same for all."""
    model = tiny("gpt2")
    same = EQUAL.map(lambda row: {"prompt": "3 " + row["prompt"]})
    found = score_like_reference(model, el.decompose(model, progress=False), same)
    assert (found.delta_loss >= 0).all()


@in_families()
def test_raw_inputs_have_a_hook_in_every_family(tiny, family):
    model = tiny(family)
    names = {m.name: raw_input_hook(model, m) for m in el.weight_matrices(model)}
    assert all(name in model.hook_dict for name in names.values())
    assert all(names[m.name] != m.hook_in for m in el.weight_matrices(model) if m.kind == "W_out")


def test_finetuning_learns_and_is_taken_back(tiny):
    model = tiny("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    loss = el.evaluate(model, EQUAL).loss
    with finetuned(model, EQUAL, batch_size=2):
        assert el.evaluate(model, EQUAL).loss < loss
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert not parameter.requires_grad

    def fail():
        with finetuned(model, EQUAL):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert el.evaluate(model, EQUAL).loss == loss


def test_it_runs_as_a_whole_and_leaves_the_model_as_it_was(tiny_folder):
    """The main script: 30 % of the keys by its scores; and what its fine-tuning would do alone."""
    model = el.load_model(tiny_folder("llama"), device="cpu")
    task = el.load_task("int_add", model.tokenizer, low=1, high=12, n_train=40, n_test=12)
    plain, fingerprint = el.evaluate(model, task.test), model_fingerprint(model)
    for finetune in (False, True):
        switches = ReferenceCode(finetune=finetune)
        found = run_like_released(model, task, switches, seed=3)
        assert model_fingerprint(model) == fingerprint
        assert found.before.examples.equals(plain.examples)
        assert set(found.search.frozen.to_pandas()["matrix"]) == {"W_K"}
        assert len(found.search.frozen) == int(0.3 * len(found.scores))
        with finetuned(model, task.train, seed=3) if finetune else nullcontext():
            spectra = el.decompose(model, ["W_K"], progress=False)
            scores = score_like_reference(model, spectra, task.train, switches, seed=3)
            with el.freeze(model, select_like_reference(scores, 0.3, switches)):
                after = el.evaluate(model, task.test)
        assert found.after.examples.equals(after.examples)
        assert found.comparison.summary() == el.compare(plain, after, seed=3).summary()


def test_it_chooses_its_quota_on_validation(tiny_folder):
    model = el.load_model(tiny_folder("gpt2"), device="cpu")
    task = el.load_task("int_add", model.tokenizer, low=1, high=12, n_train=40, n_test=12)
    quotas = (0.1, 0.4, 0.8)
    found = run_like_released(model, task, fractions=quotas, matrices=None)
    losses = {}
    for quota in quotas:
        frozen = select_like_reference(found.scores, quota)
        with el.freeze(model, frozen):
            validated = el.evaluate(model, task.validation)
        losses[len(frozen)] = (-validated.accuracy, validated.loss)
    assert len(found.search.frozen) == min(losses, key=losses.get)
    assert found.search.trace["fraction"].tolist() == list(quotas)
