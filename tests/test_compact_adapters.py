"""Adapters of few numbers: merged against live, files against peft's own, training."""

import numpy as np
import pandas as pd
import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import MIXED, in_families
from transformers import AutoModelForCausalLM

import eigenlens as el
from eigenlens import baselines as bl
from eigenlens.metrics import answer_logits
from eigenlens.paper.studies import adapters
from eigenlens.provenance import model_fingerprint
from eigenlens.tasks import make_batches

ADAPTERS = [
    bl.Vera(rank=8, epochs=4, learning_rates=(1e-1,)),
    bl.TinyLora(epochs=4, learning_rates=(1e-1,)),
    bl.UniLora(length=64, epochs=4, learning_rates=(1e-1,)),
    bl.Psoft(rank=4, epochs=4, learning_rates=(1e-2,)),
    bl.Beft(epochs=4, learning_rates=(1e-1,)),
]
NAMES = {
    "W_Q": "self_attn.q_proj",
    "W_K": "self_attn.k_proj",
    "W_V": "self_attn.v_proj",
    "W_O": "self_attn.o_proj",
    "W_in": "mlp.up_proj",
    "W_gate": "mlp.gate_proj",
    "W_out": "mlp.down_proj",
}


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    """Float32, since peft computes some of these adapters in it."""
    return {name: el.load_model(tiny_folder(name), device="cpu") for name in ("llama", "gpt2")}


def logits(model):
    (batch,) = make_batches(MIXED, model, len(MIXED))
    with torch.no_grad():
        return answer_logits(model, batch)[batch.answer_mask]


def moved(model, baseline):
    """Its trainable, away from its start."""
    search = bl.Search(model, el.decompose(model, progress=False), el.Task("t", *[MIXED] * 3))
    ((_, made),) = baseline.trainables(search)
    for i, parameter in enumerate(made.parameters):
        parameter.data += 0.3 * torch.sin(torch.arange(parameter.numel()) + i + 1).view_as(
            parameter
        )
    return made


@in_families(["llama", "gpt2"])
@pytest.mark.parametrize("baseline", ADAPTERS, ids=lambda b: b.name)
def test_an_edit_does_what_the_live_layers_do_and_a_file_holds_all_of_it(
    loaded, family, baseline, tmp_path
):
    model = loaded[family]
    before, first = logits(model), model_fingerprint(model)
    made = moved(model, baseline)
    with made.live(model):
        live = logits(model)
    edit = made.edit()
    for parameter in made.parameters:
        parameter.data *= 2  # further training is not in the edit
    with edit.applied(model):
        merged = logits(model)
    edit.save(tmp_path / "edit.safetensors")
    with bl.load_edit(tmp_path / "edit.safetensors").applied(model):
        again = logits(model)
    assert not torch.allclose(live, before, atol=1e-2)
    torch.testing.assert_close(merged, live, rtol=1e-4, atol=1e-4)
    assert torch.equal(again, merged)
    assert torch.equal(logits(model), before)
    assert model_fingerprint(model) == first
    held = sum(part.numel() for part in load_file(tmp_path / "edit.safetensors").values())
    assert held == edit.parameters_changed == made.n_trained


@pytest.mark.parametrize("baseline", ADAPTERS, ids=lambda b: b.name)
@pytest.mark.filterwarnings("ignore:Specified to not save")
@pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias")
def test_numbers_and_logits_are_those_of_pefts_own_file(loaded, tiny_folder, baseline, tmp_path):
    """A PeftModel around transformers' own model, saved without what a seed makes again."""
    model = loaded["llama"]
    made = moved(model, baseline)
    kind = {"VeRA": "Vera", "TinyLoRA": "TinyLora", "UniLoRA": "UniLora", "PSOFT": "Psoft"}
    options = baseline.options()
    if baseline.name in ("VeRA", "TinyLoRA"):
        options["save_projection"] = False
    names = {m: f"model.layers.{m.layer}.{NAMES[m.kind]}" for m in made.layers}
    config = getattr(peft, f"{kind.get(baseline.name, 'Beft')}Config")
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"))
    wrapped = peft.get_peft_model(plain, config(target_modules=list(names.values()), **options))
    wrapped.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    # Singular vectors of the weights, which whoever has the weights has.
    own = [part for name, part in saved.items() if not name.endswith(("tinylora_A", "tinylora_B"))]
    assert sum(part.numel() for part in own) == made.edit().parameters_changed
    if baseline.name in ("UniLoRA", "TinyLoRA"):
        return  # which of their random numbers a map gets depends on the order of maps
    for matrix, layer in made.layers.items():
        theirs = wrapped.base_model.model.get_submodule(names[matrix])
        mine = dict(layer.named_parameters())
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.data = mine[name].data
    tokens = torch.tensor([[8, 3, 9, 6, 10]])
    with torch.no_grad(), made.edit().applied(model):
        torch.testing.assert_close(model(tokens), wrapped(tokens).logits, rtol=1e-4, atol=1e-4)


def test_bias_of_the_values_by_hand(loaded):
    """In llama attention mixes values with weights that add up to 1: the bias comes through W_O."""
    model = loaded["llama"]
    edit = moved(model, ADAPTERS[-1]).edit()
    matrices = el.weight_matrices(model, ["W_V"])
    assert set(edit.tensors) == {matrix.hook_out for matrix in matrices}
    seen = []
    hook = [("blocks.0.attn.hook_out", lambda value, hook: seen.append(value))]
    tokens = torch.tensor([[8, 3, 9, 6, 10]])
    with torch.no_grad(), model.hooks(fwd_hooks=hook):
        model(tokens)
        with edit.applied(model):
            model(tokens)
    bias = edit.tensors[matrices[0].hook_out].view(matrices[0].n_heads, -1)
    w_o = el.weight_matrices(model, ["W_O"])[0].weight
    by_group = bias.repeat_interleave(len(w_o) // len(bias), 0)
    expected = torch.einsum("hd,hdm->m", by_group, w_o)
    torch.testing.assert_close(seen[1] - seen[0], expected.expand_as(seen[0]), atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def arith():
    model = el.load_model("arith-tiny", device="cpu")
    task = el.load_task("ambiguous", model.tokenizer, n_train=60, n_validation=40, n_test=40)
    return model, el.decompose(model, progress=False), task


@pytest.mark.parametrize("baseline", ADAPTERS, ids=lambda b: b.name)
def test_training_lowers_the_loss_and_leaves_the_model_as_it_was(arith, baseline):
    model, spectra, task = arith
    first, plain = model_fingerprint(model), el.evaluate(model, task.train, progress=False)
    found = baseline.fit(model, spectra, task, seed=1)
    assert model_fingerprint(model) == first
    assert bl.measure(model, task.train, found.edit).loss < plain.loss
    assert found.trace["train_loss"].iloc[-1] < found.trace["train_loss"].iloc[0]
    np.testing.assert_allclose(
        bl.measure(model, task.validation, found.edit).loss, found.validation.loss
    )


def test_float64_is_refused(tiny):
    model = tiny("llama")
    task = el.Task("t", MIXED, MIXED, MIXED)
    with pytest.raises(ValueError, match="VeRA takes no float64"):
        bl.Vera().fit(model, el.decompose(model, progress=False), task)


def test_the_page_of_a_study_by_hand():
    names = {"before": (10, 0.0, 1.0), "small": (75, 50.0, 1.5), "large": (80, 5000.0, 2.0)}
    rows = []
    for method, (right, numbers, perplexity) in names.items():
        cell = {"model": "m", "label": "t", "seed": 0, "draw": 0, "method": method, "cell": method}
        measured = {"right": right, "n": 100, "loss": 1.0, "choice_right": None}
        cost = {"parameters_changed": numbers, "candidates": 3, "seconds": 1.0}
        rows.append({**cell, "data": "", **measured, **cost})
        rows.append({**cell, "data": "text", **measured, "perplexity": perplexity})
    table = pd.DataFrame(rows)
    page = adapters.summary(table).set_index("method")
    assert page["numbers set"].to_dict() == {"before": "0", "small": "50", "large": "5,000"}
    assert page.loc["large", "harm (nats per token)"] == f"{np.log(2):.3f}"
    found = "t: large reaches 80% with 5,000 numbers; small, with 50, is within its interval (75%)."
    assert adapters.text(table).startswith(found)
    alone = table[table["method"] != "small"]
    assert "numbers, and none with fewer is within its interval." in adapters.text(alone)
    points = {trace.name: trace for trace in adapters.figure(table).data if trace.xaxis == "x"}
    assert [points["small"].x[0], points["small"].y[0]] == [50, 0.75]
