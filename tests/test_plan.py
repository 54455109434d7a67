"""What a plan computes from shapes alone is what tensors take: by hand, and in real processes."""

import json
import subprocess
import sys

import pytest
import torch
import transformers as tf
from typer.testing import CliRunner

import eigenlens as el
from eigenlens.bench import resident
from eigenlens.bench.chain import chain
from eigenlens.bench.making import make_model
from eigenlens.bench.on_paper import OnPaper
from eigenlens.bench.plan import plan
from eigenlens.bench.stages import STAGES, ChainConfig, additions
from eigenlens.cli import app
from eigenlens.costs import measured

NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GPT2 = {"n_layer": 3, "n_embd": 48, "n_head": 3, "vocab_size": 300, "n_positions": 64}
LLAMA = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def gpt2(**other):
    return tf.GPT2Config(**{**GPT2, **NO_TOKENS, **other})


def llama():
    return tf.LlamaConfig(**LLAMA, **NO_TOKENS)


def test_bytes_are_counted_as_tensors_come_and_go():
    with OnPaper() as paper:
        one = torch.empty(1000, device="meta")
        view = one.view(10, 100).T
        assert paper.now == 4000
        product = view @ torch.empty(10, 7, dtype=torch.float32, device="meta")
        assert paper.now == 4000 + 4 * 700
        assert paper.peak == 4000 + 4 * 700 + 4 * 70
        del one, product
        assert paper.now == 4000  # the view keeps its storage
        assert view.sum().item() == 0
        assert view.cpu().shape == (100, 10)
        assert paper.now == 4000
        del view
        assert paper.now == 0


def test_a_backward_pass_holds_what_it_needs():
    """Two products: the activation between them, and the gradient of it, by hand."""
    with OnPaper() as paper:
        x, w, v = (torch.empty(size, device="meta") for size in ((8, 16), (16, 32), (32, 4)))
        x.requires_grad_()
        before = paper.now
        y = (x @ w) @ v
        assert (
            paper.now - before == 4 * 8 * 4
        )  # nothing but the result: w and v are kept as they are
        hidden = (x @ w).relu()
        held = paper.now
        loss = (hidden @ v).sum()
        del hidden
        assert paper.now - held == 4  # the loss; relu's output is held by the graph
        loss.backward()
        del y, loss
        assert paper.now - before == 4 * x.numel()  # the gradient


@pytest.mark.parametrize(
    "config",
    [pytest.param(gpt2(), id="gpt2", marks=pytest.mark.slow), pytest.param(llama(), id="llama")],
)
def test_weights_bases_sums_and_passes_by_hand(config):
    found = plan(config, examples=12, batch_size=5)
    model = tf.AutoModelForCausalLM.from_config(config)
    weights = sum(p.numel() for p in model.parameters()) * 4
    ends = [model.get_input_embeddings().weight, *model.base_model.parameters(recurse=False)]
    d, k, layers = 48, 16 if config.model_type == "gpt2" else 8, 3
    if config.model_type == "gpt2":
        heads = (3, 3, 3, 3)
        widths = [d, d]  # W_in on its input, W_out on its output
        ends += [model.transformer.wpe.weight, *model.transformer.ln_f.parameters()]
    else:
        heads = (6, 2, 2, 6)
        widths = [d, d, d]
        ends += [model.lm_head.weight, model.model.norm.weight]
    components = layers * (sum(heads) * k + sum(widths))
    directions = layers * (sum(heads) * k * k + sum(width**2 for width in widths))
    assert found.components == components
    sums = 4 * 4 * components + 4 * components  # four of effects, one of activations
    for stage in found.stages:
        # buffers, such as rotary angles, are a few bytes more
        assert weights <= stage.weights <= weights * 1.01
        if stage.stage != "evaluate":
            assert stage.bases == pytest.approx(4 * directions + 8 * components, rel=0.01)
        assert stage.sums == (sums if stage.stage == "score" else 0)
        assert stage.work > 0
    assert found.ends == pytest.approx(4 * sum(p.numel() for p in ends), rel=0.02)
    passes = {s.stage: (s.forward_passes, s.backward_passes) for s in found.stages}
    assert list(passes) == list(STAGES)
    assert passes["score"] == (6, 3)  # means and effects of three batches
    assert passes["learned"] == (2 * 2 + 1, 1)  # two looks at ten examples, one step
    assert passes["decompose"] == (0, 0)


@pytest.mark.slow
def test_a_plan_makes_the_passes_that_run(tmp_path):
    make_model(gpt2(), tmp_path / "model", progress=False)
    model = el.load_model(tmp_path / "model", device="cpu")
    task = additions(model, 12)
    spectra = el.decompose(model, progress=False)
    options = {"criterion": "margin", "reference": "shared", "batch_size": 5, "progress": False}
    with measured(model) as cost:
        el.score(model, spectra, task.train, **options)
    stage = next(s for s in plan(gpt2(), examples=12, batch_size=5).stages if s.stage == "score")
    assert (stage.forward_passes, stage.backward_passes) == (
        cost.forward_passes,
        cost.backward_passes,
    )


@pytest.mark.slow
def test_activations_grow_with_tokens_and_half_precision_halves_weights():
    small, long = (plan(gpt2(), batch_size=b, tokens=t) for b, t in ((5, 12), (5, 48)))
    work = [next(s.work for s in p.stages if s.stage == "score") for p in (small, long)]
    held = 3 * 6 * 48 * 4  # a token's coordinates of six maps in three layers, until their gradient
    assert work[1] - work[0] > (long.tokens - small.tokens) * held > 0
    assert small.stages[0].sums == long.stages[0].sums
    half = plan(gpt2(), dtype=torch.bfloat16)
    assert half.stages[0].weights == pytest.approx(small.stages[0].weights / 2, rel=0.01)
    assert half.stages[0].bases == small.stages[0].bases  # directions are float32 in any case


@pytest.mark.slow
def test_several_devices_share_whole_layers():
    found = plan(gpt2(n_layer=5))
    stage = found.stages[0]
    assert found.on_each(stage, 1) == stage.tensors
    inside = stage.tensors - found.ends
    assert found.on_each(stage, 2) == round(inside * 3 / 5) + found.ends
    assert found.on_each(stage, 5) == round(inside / 5) + found.ends


@pytest.mark.slow
def test_nothing_is_made_on_paper():
    """A layer of 7 B takes no memory here, though its weights are 0.8 GB."""
    wide = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
    config = tf.LlamaConfig(**{**LLAMA, **wide, "num_hidden_layers": 1}, **NO_TOKENS)
    before = resident.forget_peak()
    found = plan(config, examples=4)
    assert found.stages[0].weights > 0.6e9
    assert found.stages[0].bases > 0.2e9
    assert resident.peak() - before < 0.25e9


@pytest.mark.slow
def test_the_command_prints_and_writes_a_plan(tmp_path):
    file, out = tmp_path / "small.json", tmp_path / "plan.json"
    file.write_text(json.dumps({"model_type": "gpt2", **GPT2}))
    words = ["bench", "--plan", str(file), "--devices", "2", "--out", str(out)]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    written = json.loads(out.read_text())
    own = plan(gpt2())
    for stage, mine in zip(written["stages"], own.stages, strict=True):
        assert stage["weights"] == mine.weights
        assert stage["on_each_device"] == own.on_each(mine, 2)
        assert stage["peak"] == written["process"] + mine.tensors
    assert "as measured here" in " ".join(found.output.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs for minutes where there is a GPU")
def test_without_a_gpu_the_command_says_what_it_needs(tmp_path):
    found = CliRunner().invoke(app, ["bench", "--gpu", "--out", str(tmp_path / "x")])
    assert found.exit_code == 2
    said = " ".join(found.output.split())
    assert "needs an NVIDIA GPU with 60 GB of memory" in said
    assert "--plan llama-7b" in said
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_peaks_are_those_of_real_processes(tmp_path, monkeypatch):
    """200 million parameters; every stage within 15 %, in a process of its own."""
    # A plan counts tensors. Memory that was let go is given back at once and not kept by glibc,
    # which holds up to a quarter more on some machines (docs/sizes.md).
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    config = gpt2(n_layer=8, n_embd=1280, n_head=20, vocab_size=30_000)
    make_model(config, tmp_path / "model", progress=False)
    options = {"examples": 10, "batch_size": 10, "tokens": 40}
    measured_peaks = chain(
        ChainConfig(model=str(tmp_path / "model"), device="cpu", **options),
        tmp_path / "chain",
    )
    # In a process of its own as well: this one may hold what other tests imported and left.
    file, out = tmp_path / "config.json", tmp_path / "plan.json"
    file.write_text(json.dumps(config.to_dict()))
    sizes = [
        word for name, n in options.items() for word in (f"--{name}".replace("_", "-"), str(n))
    ]
    words = ["bench", "--plan", str(file), *sizes, "--out", str(out)]
    subprocess.run([sys.executable, "-m", "eigenlens", *words], check=True, capture_output=True)
    planned = {stage["stage"]: stage["peak"] for stage in json.loads(out.read_text())["stages"]}
    for stage in measured_peaks["stages"]:
        assert planned[stage["stage"]] == pytest.approx(stage["peak"], rel=0.15)
