"""The released code's arithmetic, against loops over singular values that follow its text."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import EQUAL, FAMILIES

import eigenlens as el
from eigenlens.paper.released_code import (
    ReferenceCode,
    finetuned,
    raw_input_hook,
    score_like_reference,
    select_like_reference,
)
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


def projected(spectrum, x, head, index):
    u, s = spectrum.u[head, :, index], spectrum.sigma[head, index]
    if spectrum.matrix.head_axis == "in":
        x = x.flatten(2).unflatten(2, (spectrum.matrix.n_heads, -1))[:, :, head]
    return s * (x.flatten(2) @ u)


@pytest.mark.parametrize("family", FAMILY)
def test_scores_and_bias_equal_a_loop(tiny, family):
    model = tiny(family)
    spectra = el.decompose(model, progress=False)
    found = score_like_reference(model, spectra, EQUAL, ReferenceCode(**ALL_DATA))
    inputs, grads = cached(model)
    order = np.random.default_rng(0).permutation(len(EQUAL))  # neighbours in the shuffled batch
    table = found.components
    n_prompt = -found.positions.start
    for row in range(0, len(table), 29):
        layer, kind, head, index = table.loc[row, ["layer", "matrix", "head", "index"]]
        spectrum = spectra[f"blocks.{layer}.{kind}"]
        a = projected(spectrum, inputs[raw_input_hook(model, spectrum.matrix)], head, index)[order]
        g = grads[spectrum.matrix.hook_out].flatten(2)[order]
        if spectrum.matrix.head_axis == "out":
            g = g.unflatten(2, (spectrum.matrix.n_heads, -1))[:, :, head]
        effect = (a.roll(1, 0) - a) * (g @ spectrum.vh[head, index])
        assert found.delta_loss[row] == pytest.approx(float(effect.max()), abs=1e-9)
        per_position = a.mean(0).numpy()
        expected = per_position if kind == "W_O" else np.full(n_prompt, per_position.sum())
        np.testing.assert_allclose(found.mean_activation[row, :n_prompt], expected, atol=1e-9)


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
    np.testing.assert_allclose(found.mean_activation, ours.mean_activation, atol=1e-9)
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


@pytest.mark.parametrize("family", FAMILIES)
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
