"""Trained baselines: merged against live, peft on a plain transformers model, gradients."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import MIXED, in_families
from transformers import AutoModelForCausalLM

import eigenlens as el
from eigenlens import baselines as bl
from eigenlens.baselines import training
from eigenlens.baselines.adapters import LowRankAdapter, ScaleAdapter
from eigenlens.baselines.bias import TrainableBias
from eigenlens.baselines.calibration import answer_statistics
from eigenlens.baselines.svf import TrainableFactors
from eigenlens.metrics import answer_logits, answer_loss
from eigenlens.provenance import model_fingerprint
from eigenlens.search import protection
from eigenlens.tasks import make_batches
from eigenlens.tasks.own_text import own_text

peft = pytest.importorskip("peft")

TRAINED = [
    bl.Lora(ranks=(2,), learning_rates=(1e-2,), epochs=4),
    bl.Ia3(learning_rates=(1e-1,), epochs=4),
    bl.Svf(learning_rates=(1e-2,), epochs=4),
    bl.LastLayerBias(learning_rates=(1e-1,), epochs=4),
    bl.LearnedCalibration(learning_rates=(1e-1,), epochs=4),
]


def logits(model, data=MIXED):
    (batch,) = make_batches(data, model, len(data))
    with torch.no_grad():
        return answer_logits(model, batch)[batch.answer_mask]


def loss(model, data=MIXED):
    (batch,) = make_batches(data, model, len(data))
    return answer_loss(answer_logits(model, batch), batch).sum()


def adapter(model, kind):
    """An adapter with random numbers in it."""
    names = [m.name.replace(".", "-") for m in el.weight_matrices(model)]
    if kind == "lora":
        config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=names)
        made = LowRankAdapter(el.weight_matrices(model), config, 0)
    else:
        config = peft.IA3Config(target_modules=names, feedforward_modules=names[::2])
        made = ScaleAdapter(el.weight_matrices(model), config, 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters:
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += 0.3 * noise.to(parameter)
    return made


def trainables(model):
    yield adapter(model, "lora")
    yield adapter(model, "ia3")
    factors = TrainableFactors(model, el.decompose(model, progress=False))
    for i, parameter in enumerate(factors.parameters):
        parameter.data += 0.3 * torch.sin(torch.arange(parameter.numel()) + i).view_as(parameter)
    yield factors
    for hook, width in (("blocks.1.hook_out", model.cfg.d_model), ("unembed.hook_out", 64)):
        bias = TrainableBias(model, hook, width)
        bias.bias.data += torch.sin(torch.arange(width))
        yield bias


FAMILIES = ("gpt2", "llama", "phi3", "gemma2", "opt", "bloom", "falcon")


@in_families(FAMILIES)
def test_merged_logits_are_those_of_the_live_layers(tiny, family):
    model = tiny(family)
    before, first = logits(model), model_fingerprint(model)
    for trainable in trainables(model):
        with trainable.live(model):
            live = logits(model)
        assert torch.equal(logits(model), before)
        with trainable.edit().applied(model):
            merged = logits(model)
        assert not torch.allclose(live, before, atol=1e-3)
        torch.testing.assert_close(merged, live, rtol=1e-9, atol=1e-9)
        assert torch.equal(logits(model), before)
    assert model_fingerprint(model) == first


def test_a_seed_draws_an_adapter_and_nothing_else(tiny, monkeypatch):
    """torch.manual_seed would also seed every GPU, and nothing would put that back."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("GPUs were seeded"))
    model, before = tiny("llama"), torch.get_rng_state()
    matrices = el.weight_matrices(model, ["W_K"])
    config = peft.LoraConfig(r=2, target_modules=[m.name.replace(".", "-") for m in matrices])
    first, again, other = (LowRankAdapter(matrices, config, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.parameters[0], again.parameters[0])
    assert not torch.equal(first.parameters[0], other.parameters[0])


NAMES = {
    "W_Q": "self_attn.q_proj",
    "W_K": "self_attn.k_proj",
    "W_V": "self_attn.v_proj",
    "W_O": "self_attn.o_proj",
    "W_in": "mlp.up_proj",
    "W_gate": "mlp.gate_proj",
    "W_out": "mlp.down_proj",
}


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_merged_logits_are_pefts_on_a_plain_model(tiny, tiny_folder, kind):
    """The same numbers in a PeftModel around transformers' own model, unmerged."""
    model = tiny("llama")
    made = adapter(model, kind)
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"), dtype=torch.float64)
    names = {m: f"model.layers.{m.layer}.{NAMES[m.kind]}" for m in made.layers}
    if kind == "lora":
        config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=list(names.values()))
    else:
        inputs = [names[m] for m, layer in made.layers.items() if layer.is_feedforward]
        config = peft.IA3Config(target_modules=list(names.values()), feedforward_modules=inputs)
    wrapped = peft.get_peft_model(plain, config).eval()
    for matrix, layer in made.layers.items():
        theirs = wrapped.base_model.model.get_submodule(names[matrix])
        for part in ("lora_A", "lora_B") if kind == "lora" else ():
            getattr(theirs, part)["default"].weight.data = getattr(layer, part)["default"].weight
        if kind == "ia3":
            theirs.ia3_l["default"].data = layer.ia3_l["default"].data
    tokens = torch.tensor([[8, 3, 9, 6, 10]])
    with torch.no_grad():
        expected = wrapped(tokens).logits
        with made.edit().applied(model):
            torch.testing.assert_close(model(tokens), expected, rtol=1e-9, atol=1e-9)


def test_pissa_starts_as_the_model_and_merges_as_it_runs(tiny_folder):
    model = el.load_model(tiny_folder("gpt2"), device="cpu")  # peft's PiSSA takes no float64
    before, first = logits(model), model_fingerprint(model)
    matrices = el.weight_matrices(model)
    names = [m.name.replace(".", "-") for m in matrices]
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=names, init_lora_weights="pissa")
    made = LowRankAdapter(matrices, config, 0)
    with made.live(model):
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    for matrix, layer in made.layers.items():
        product = layer.get_delta_weight("default").detach().numpy()
        u, s, vt = np.linalg.svd(matrix.module.weight.detach().numpy(), full_matrices=False)
        np.testing.assert_allclose(product, u[:, :3] * s[:3] @ vt[:3], atol=1e-4)
    for parameter in made.parameters:
        parameter.data += 0.3 * torch.sin(torch.arange(parameter.numel())).view_as(parameter)
    with made.live(model):
        live = logits(model)
    with made.edit().applied(model):
        merged = logits(model)
    assert not torch.allclose(live, before, atol=1e-2)
    torch.testing.assert_close(merged, live, rtol=1e-4, atol=1e-4)
    assert model_fingerprint(model) == first


def test_scaling_a_singular_value_is_scaling_it_in_numpy(tiny):
    model = tiny("llama")
    spectra = el.decompose(model, ["W_K", "W_O", "W_in"], progress=False)
    made = TrainableFactors(model, spectra)
    for parameter in made.parameters:
        parameter.data = torch.linspace(0.5, 2, parameter.numel()).view_as(parameter).double()
    edit = made.edit()
    for matrix in el.weight_matrices(model, ["W_K", "W_O", "W_in"]):
        expected = []
        for head, factors in zip(matrix.weight.numpy(), edit.tensors[matrix.name], strict=True):
            u, s, vt = np.linalg.svd(head, full_matrices=False)
            expected.append(u * (s * factors.numpy()) @ vt)
        with edit.applied(model):
            np.testing.assert_allclose(matrix.weight.numpy(), expected, atol=1e-11)


def test_gradients_of_all_numbers_are_slopes_of_the_loss(tiny):
    model = tiny("gpt2")
    for trainable in trainables(model):
        with trainable.live(model), torch.enable_grad():
            loss(model).backward()
        for parameter in list(trainable.parameters)[::5]:
            row = int(parameter.grad.abs().argmax())
            values = []
            for step in (1e-5, -2e-5):
                parameter.data.view(-1)[row] += step
                with trainable.edit().applied(model), torch.no_grad():
                    values.append(loss(model))
            parameter.data.view(-1)[row] += 1e-5
            slope = float(values[0] - values[1]) / 2e-5
            assert float(parameter.grad.view(-1)[row]) == pytest.approx(slope, rel=1e-4)
        assert all(p.grad is None for p in model.parameters())


@pytest.fixture(scope="module")
def arith():
    model = el.load_model("arith-tiny", device="cpu")
    task = el.load_task("ambiguous", model.tokenizer, n_train=60, n_validation=40, n_test=40)
    return model, el.decompose(model, progress=False), task


@pytest.mark.parametrize(
    "baseline",
    [
        *TRAINED[:3],
        *(
            pytest.param(baseline, marks=pytest.mark.slow)
            for baseline in (
                *TRAINED[3:],
                bl.Pissa(ranks=(2,), learning_rates=(1e-3,), epochs=4),
                bl.AveragedCalibration(),
            )
        ),
    ],
    ids=lambda b: b.name,
)
def test_training_helps_and_leaves_the_model_as_it_was(arith, baseline, tmp_path):
    model, spectra, task = arith
    first, plain = model_fingerprint(model), el.evaluate(model, task.train)
    found = baseline.fit(model, spectra, task, seed=1)
    assert model_fingerprint(model) == first
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert bl.measure(model, task.train, found.edit).loss < plain.loss
    again = bl.measure(model, task.validation, found.edit)
    assert again.examples.equals(found.validation.examples)
    assert (again.accuracy, -again.loss) == max(
        zip(found.trace["accuracy"], -found.trace["loss"], strict=True)
    )
    found.edit.save(tmp_path / "edit.safetensors")
    loaded = bl.load_edit(tmp_path / "edit.safetensors")
    assert bl.measure(model, task.validation, loaded).examples.equals(again.examples)
    repeated = baseline.fit(model, spectra, task, seed=1)
    assert repeated.trace.equals(found.trace)


def test_costs_of_training_are_those_of_its_epochs(arith):
    model, spectra, task = arith
    lora = bl.Lora(ranks=(2, 4), learning_rates=(1e-2,), epochs=3, patience=2)
    found = lora.fit(model, spectra, task)
    epochs = len(found.trace)
    assert found.cost.backward_examples == epochs * 60
    assert found.cost.forward_examples == epochs * (60 + 40)
    assert found.cost.backward_passes == epochs * 2
    rank = 2 if found.edit.tensors["blocks.0.W_Q.reads"].shape[1] == 2 else 4
    widths = sum(sum(m.flat_weight.shape) for m in el.weight_matrices(model))
    assert found.cost.parameters_changed == rank * widths


def test_early_stopping_waits_for_the_patience(arith):
    model, spectra, task = arith
    baseline = bl.LastLayerBias(learning_rates=(1e-1,), epochs=40, patience=2)
    trace = baseline.fit(model, spectra, task).trace
    keys = list(zip(trace["accuracy"], -trace["loss"], strict=True))
    best = keys.index(max(keys))
    assert len(trace) == 40 or len(trace) == best + 1 + 2


def test_averaged_calibration_from_counts_by_hand(arith):
    model, spectra, task = arith
    frequency, probability = answer_statistics(bl.Search(model, spectra, task))
    texts = [row["prompt"] + row["answer"] for row in task.train]
    ids = [model.tokenizer.encode(text)[-1] for text in texts]
    assert frequency.tolist() == pytest.approx(
        (np.bincount(ids, minlength=len(frequency)) / len(ids)).tolist()
    )
    encode = lambda p: model.tokenizer.encode(p, add_special_tokens=False)  # noqa: E731
    bos = [model.tokenizer.bos_token_id] if model.cfg.default_prepend_bos else []
    prompts = torch.tensor([bos + encode(p) for p in task.train["prompt"]])
    with torch.no_grad():
        by_hand = model.original_model(prompts).logits[:, -1].double().softmax(-1).mean(0)
    torch.testing.assert_close(probability, by_hand, rtol=1e-4, atol=1e-7)


def test_float64_and_a_missing_peft_are_refused_before_anything(tiny, monkeypatch):
    model = tiny("gpt2")
    spectra = el.decompose(model, progress=False)
    task = el.Task("t", MIXED, MIXED, MIXED)
    with pytest.raises(ValueError, match="float32"):
        bl.Pissa().fit(model, spectra, task)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match=r"eigenlens\[peft\]"):
        bl.Lora()


def test_half_precision_trains_in_float32(tiny_folder):
    model = el.load_model(tiny_folder("llama"), dtype="bfloat16", device="cpu")
    first = model_fingerprint(model)
    made = adapter(model, "lora")
    assert {p.dtype for p in made.parameters} == {torch.float32}
    task = el.Task("t", MIXED, MIXED, MIXED)
    spectra = el.decompose(model, progress=False)
    for baseline in (TRAINED[0], TRAINED[1], TRAINED[2], TRAINED[3]):
        found = baseline.fit(model, spectra, task)
        assert found.trace["train_loss"].iloc[-1] < found.trace["train_loss"].iloc[0]
    assert model_fingerprint(model) == first


@pytest.mark.parametrize("baseline", TRAINED, ids=lambda b: b.name)
def test_half_an_edit_is_halfway_to_its_weights(arith, baseline, tmp_path):
    model, spectra, task = arith
    edit = baseline.fit(model, spectra, task).edit
    half = edit.scaled(0.5)
    half.save(tmp_path / "half.safetensors")
    prompts = model.to_tokens(list(task.test["prompt"])[:4], prepend_bos=False)

    def state(change):
        with torch.no_grad(), change.applied(model):
            return [p.clone() for p in model.parameters()], model(prompts)

    before = [p.detach().clone() for p in model.parameters()]
    (whole, logits), (part, _) = state(edit), state(half)
    for first, last, middle in zip(before, whole, part, strict=True):
        assert torch.allclose(middle, (first + last) / 2, atol=1e-6)
    assert torch.allclose(state(edit.scaled(1.0))[1], logits, atol=1e-6)
    assert torch.equal(state(bl.load_edit(tmp_path / "half.safetensors"))[1], state(half)[1])
    with torch.no_grad():
        assert torch.equal(state(edit.scaled(0.0))[1], model(prompts))


def divergence(model, before, data):
    """``KL(unedited ‖ edited)`` per answer token, from log-probabilities by hand."""
    after = logits(model, data).log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.fixture
def sums(tiny, monkeypatch):
    """A tiny model, a task, and a text that it wrote itself, whose other half decides."""
    model = tiny("llama")
    text = own_text(model, n_examples=12, n_tokens=9)
    monkeypatch.setattr(protection, "own_text", lambda model: text)
    rows = MIXED.select_columns(["prompt", "answer"])
    task = el.Task("mixed", rows, rows, rows, {})
    return model, el.decompose(model, progress=False), task, text


def test_a_bound_scales_an_edit_back_until_the_other_half_of_the_text_is_within(sums):
    model, spectra, task, text = sums
    checked = text.select(range(1, len(text), 2))
    before = logits(model, checked).log_softmax(-1)
    free = bl.Lora(ranks=(2,), learning_rates=(1e-1,), epochs=3)
    with torch.no_grad(), free.fit(model, spectra, task).edit.applied(model):
        bound = divergence(model, before, checked) / 3
    found = replace(free, bound=bound).fit(model, spectra, task)
    with found.edit.applied(model):
        assert 0 < divergence(model, before, checked) <= bound
    (row,) = found.trace.to_dict("records")
    assert (row["looks"], row["strength"]) == (3, found.edit.strength)
    assert row["accuracy"] == found.validation.accuracy
    strengths = training._STRENGTHS
    more = strengths[strengths.index(found.edit.strength) - 1]
    with found.edit.scaled(more / found.edit.strength).applied(model):
        assert divergence(model, before, checked) > bound


@pytest.mark.parametrize("price", [0.0, 1.0])
def test_gates_are_chosen_among_steps_within_the_bound(arith, monkeypatch, price):
    model, spectra, task = arith
    text = own_text(model, n_examples=12, n_tokens=4)
    monkeypatch.setattr(protection, "own_text", lambda model: text)
    checked = text.select(range(1, len(text), 2))
    before = logits(model, checked).log_softmax(-1)

    def diverges(edit):
        with torch.no_grad(), edit.applied(model):
            return divergence(model, before, checked)

    free = bl.Learned(price=price, reference="shared", options={"steps": 30, "every": 2, "lr": 1.0})
    far = diverges(free.fit(model, spectra, task).edit)
    near = diverges(replace(free, bound=far / 2).fit(model, spectra, task).edit)
    assert near <= far / 2 < far


def test_a_penalty_is_the_divergence_that_it_holds_down(sums):
    model, spectra, task, text = sums
    steered = text.select(range(0, len(text), 2))
    before = logits(model, steered).log_softmax(-1)
    found = []
    for weight in (0.0, 30.0):
        lora = bl.Lora(ranks=(2,), learning_rates=(1e-2,), epochs=6, patience=6, weight=weight)
        with lora.fit(model, spectra, task).edit.applied(model):
            found.append(divergence(model, before, steered))
    assert found[1] < found[0] / 2
    protect = el.Protection(model, {"own": text}, price=0.0, weight=2.0, batch_size=16)
    assert float(protect.penalty(0)) == pytest.approx(0, abs=1e-12)
    with lora.fit(model, spectra, task).edit.applied(model):
        expected = 2.0 * divergence(model, before, steered)
        assert float(protect.penalty(0)) == pytest.approx(expected, rel=1e-9)
