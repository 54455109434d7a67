"""What scoring keeps is told, and refused where there is no room, before the first pass."""

import pytest
from tiny_models import EQUAL, dataset

import eigenlens as el
from eigenlens.costs import measured
from eigenlens.scoring import room
from eigenlens.scoring.plan import N_POSITIONS, Plan

# Of 5 positions: four times (5 + 1 answer token read + 1 for others) and six, for 8 bytes each.
N_PROMPT, N_READ = 4, 1


def kept(n_components, rows):
    return n_components * (4 * rows + 6) * 8


@pytest.mark.parametrize("reference", ["mean", "shared"])
def test_what_does_not_fit_is_refused_before_any_pass(tiny, reference):
    model = tiny("llama")
    spectra = el.decompose(model, progress=False)
    rows = N_PROMPT + N_READ + 1 if reference == "mean" else 1
    needed = kept(spectra.n_components, rows) / 1e9
    options = {"reference": reference, "criterion": "margin", "progress": False}
    with measured(model) as cost, pytest.raises(ValueError, match=r"room for .* GB: give fewer"):
        el.score(model, spectra, EQUAL, budget_gb=needed * 0.99, **options)
    assert cost.forward_passes == 0
    assert len(el.score(model, spectra, EQUAL, budget_gb=needed * 1.01, **options)) > 0


def test_much_is_told(tiny, monkeypatch, capsys):
    model = tiny("llama")
    spectra = el.decompose(model, progress=False)
    el.score(model, spectra, EQUAL)
    assert "Scoring keeps" not in capsys.readouterr().err
    monkeypatch.setattr(room, "_WORTH_SAYING", 1)
    el.score(model, spectra, EQUAL, progress=False)
    assert "Scoring keeps" not in capsys.readouterr().err
    el.score(model, spectra, EQUAL)
    said = capsys.readouterr().err
    assert f"sums of {spectra.n_components:,} components" in said
    assert "means of 6 positions" in said


def test_long_prompts_have_a_bounded_number_of_means(tiny_folder):
    import transformers as tf
    from tiny_models import CONFIGS, word_tokenizer

    config = CONFIGS["llama"]()
    config.max_position_embeddings = 300
    model = el.load_model(tf.AutoModelForCausalLM.from_config(config).eval(), word_tokenizer())
    numbers = [str(i % 50) for i in range(N_POSITIONS + 40)]
    for length, own in ((20, 20), (N_POSITIONS, N_POSITIONS), (len(numbers), N_POSITIONS + 1)):
        data = dataset([(" ".join(numbers[:length]), " 3"), (" ".join(numbers[1:length]), " 4")])
        options = {"batch_size": 2, "seed": 0}
        plan = Plan.of(data, model, "mean", None, n_positions=None, **options)
        assert len(plan.positions) == own
        every = Plan.of(data, model, "mean", None, n_positions=1000, **options)
        assert len(every.positions) == length
