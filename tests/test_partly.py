"""Models with blocks that are not dense: what is listed is exact, and what is not is named."""

import json

import numpy as np
import pytest
import torch
from test_freezing import edited_by_hand
from test_in_memory import native
from test_pipeline import ARGS
from test_scores import gradient_of_sigma, spectra_of
from tiny_models import MIXED, PARTLY, word_tokenizer
from typer.testing import CliRunner

import eigenlens as el
from eigenlens import pipeline, run_folder
from eigenlens.architectures.oracles import check_exact
from eigenlens.blocks import UnsupportedModelError
from eigenlens.cli import app
from eigenlens.metrics import answer_logits
from eigenlens.tasks import make_batches

ATTENTION = ("W_Q", "W_K", "W_V", "W_O")
MLP = ("W_in", "W_gate", "W_out")
WANTED = {
    "mixtral": dict.fromkeys(range(2), ATTENTION),
    "qwen2_moe": dict.fromkeys(range(2), (*ATTENTION, *MLP)),
    "jamba": {0: MLP, 1: ATTENTION},
}
MISSING = {
    "mixtral": ["blocks.0.mlp.gate", "blocks.0.mlp.experts"],
    "qwen2_moe": ["blocks.0.mlp.gate", "blocks.1.mlp.experts", "blocks.1.mlp.shared_expert_gate"],
    "jamba": ["blocks.0.mamba.in_proj", "blocks.1.feed_forward.experts"],
}


def listed(model, **options):
    return el.weight_matrices(model, skip_unsupported=True, **options)


@pytest.mark.parametrize("family", PARTLY)
def test_what_is_dense_is_listed_and_the_rest_is_named(tiny, family):
    model = tiny(family)
    maps = listed(model)
    assert [m.name for m in maps] == [
        f"blocks.{layer}.{kind}" for layer, kinds in WANTED[family].items() for kind in kinds
    ]
    assert all(m.hook_in in model.hook_dict and m.hook_out in model.hook_dict for m in maps)
    assert set(MISSING[family]) <= {part.name for part in maps.left_out}
    table, text = maps.to_pandas(), repr(maps)
    rest = table[table["left out"].notna()]
    assert set(MISSING[family]) <= set(rest["name"])
    assert "no inputs and output gradients of single experts" in text
    assert all(name.split(".", 2)[2] in text for name in MISSING[family])


@pytest.mark.parametrize("family", PARTLY)
def test_every_weight_is_listed_or_left_out(tiny, family):
    """Counted in the model of transformers: no matrix of a block goes missing in silence."""
    model = tiny(family)
    maps = listed(model)
    for layer, block in enumerate(model.blocks):
        names = {part.module for part in maps.left_out if part.layer == layer}
        mine = {id(m.parameter) for m in maps if m.layer == layer}
        for name, parameter in block.original_component.named_parameters():
            owner = name.replace("_original_component.", "").rpartition(".")[0]
            if parameter.ndim > 1:
                assert (id(parameter) in mine) != (owner in names), name


def test_dense_models_leave_nothing_out(tiny):
    for family in ("gpt2", "phi3", "falcon", "llama"):
        assert el.weight_matrices(tiny(family)).left_out == ()
        assert "left out" not in el.weight_matrices(tiny(family)).to_pandas()


@pytest.mark.parametrize("family", PARTLY)
def test_scores_are_minus_sigma_times_gradient(tiny, family):
    model = tiny(family)
    spectra = spectra_of(model, skip_unsupported=True)
    scores = el.score(model, spectra, MIXED, reference="zero", batch_size=2, progress=False)
    expected = -gradient_of_sigma(model, spectra, MIXED)
    tolerance = 1e-8 * np.abs(expected).max()
    np.testing.assert_allclose(scores.delta_loss, expected, rtol=1e-8, atol=tolerance)


@pytest.mark.parametrize("family", PARTLY)
def test_freezing_is_an_edit_of_the_weights(tiny, family):
    model = tiny(family)
    spectra = spectra_of(model, skip_unsupported=True)
    scores = el.score(model, spectra, MIXED, progress=False)
    frozen = el.select(scores, 0.5)
    for batch in make_batches(MIXED, model, 2):
        with torch.no_grad(), el.freeze(model, frozen):
            hooked = answer_logits(model, batch)
        edited = edited_by_hand(model, frozen, batch)
        here = batch.answer_mask
        torch.testing.assert_close(hooked[here], edited[here], rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            assert (answer_logits(model, batch) - hooked)[here].abs().max() > 1e-3
    check_exact(model, MIXED)  # under means of zero


def test_without_the_option_the_error_names_it(tiny):
    with pytest.raises(UnsupportedModelError, match="skip_unsupported=True"):
        el.decompose(tiny("mixtral"))
    assert len(el.weight_matrices(tiny("mixtral"), ATTENTION)) == 8  # nothing of it is missing
    with pytest.raises(UnsupportedModelError, match="Layer 0 has no dense W_Q"):
        el.weight_matrices(tiny("jamba"), ["W_Q"])
    with pytest.raises(UnsupportedModelError, match="MambaMixer"):
        listed(tiny("mamba"))


def test_joint_maps_are_those_of_blocks_with_attention(tiny):
    spectra = el.decompose(tiny("jamba"), basis="qk_ov", skip_unsupported=True, progress=False)
    assert list(spectra) == ["blocks.1.QK", "blocks.1.OV"]


def test_scores_from_a_file_find_their_partial_decomposition(tiny, tmp_path):
    model = tiny("jamba")
    spectra = spectra_of(model, skip_unsupported=True)
    scores = el.score(model, spectra, MIXED, progress=False)
    scores.save(tmp_path / "scores.parquet")
    found = el.Scores.load(tmp_path / "scores.parquet").spectra_on(model)
    assert list(found) == list(spectra)


def test_the_option_of_a_run(tiny_folder, tmp_path):
    folder = tiny_folder("qwen2_moe")
    config = el.EigenpruneConfig(
        model=str(folder),
        task="int_add",
        task_args=ARGS,
        search="one_shot",
        search_args={"fractions": [0.1]},
        refine=0,
        device="cpu",
        skip_unsupported=True,
    )
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert "skip_unsupported: true" in config.to_yaml()
    out = tmp_path / "run"
    command = ["run", "--config", str(tmp_path / "config.yaml"), "--out", str(out)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "mlp.experts (Qwen2MoeExperts)" in done.output
    lines = json.loads((out / "metrics.json").read_text())["left_out"]
    result, _ = run_folder.load_run(out)
    assert list(result.left_out) == lines
    assert any("mlp.experts" in line for line in lines)
    whole = config.model_copy(update={"skip_unsupported": False})
    with pytest.raises(ValueError, match="another configuration"):
        pipeline.run(whole, out, progress=False)
    with pytest.raises(UnsupportedModelError, match="--skip-unsupported"):
        pipeline.run(whole, progress=False)
    flag = ["--skip-unsupported", "--config", str(tmp_path / "config.yaml")]
    assert CliRunner().invoke(app, ["run", *flag, "--out", str(out)]).exit_code == 0


def test_attention_only_models_are_exact():
    """TransformerLens' own models without MLPs, in every step of the toolkit."""
    model = el.load_model(native(attn_only=True).double(), word_tokenizer())
    spectra = spectra_of(model)
    assert {s.site.kind for s in spectra.values()} == set(ATTENTION)
    assert el.weight_matrices(model).left_out == ()
    scores = el.score(model, spectra, MIXED, reference="zero", batch_size=2, progress=False)
    expected = -gradient_of_sigma(model, spectra, MIXED)
    np.testing.assert_allclose(scores.delta_loss, expected, atol=1e-8 * np.abs(expected).max())
    check_exact(model, MIXED)
    frozen = el.select(scores, 0.5)
    assert not el.activation_change(model, frozen, MIXED).residual.empty
    assert len(el.circuit(model, scores, MIXED, strongest=4, progress=False).nodes) > 0


def test_nothing_is_installed(monkeypatch):
    """TransformerLens runs pip for models that see, and would put another torch in place."""
    from eigenlens.architectures.tiny_models import tiny_model

    calls = []
    monkeypatch.setattr("subprocess.check_call", lambda *args, **kwargs: calls.append(args))
    el.load_model(tiny_model("LlavaForConditionalGeneration").float(), word_tokenizer())
    assert calls == []
