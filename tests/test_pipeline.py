"""The whole job on a tiny model: run folder, resumption, reproducibility, command line."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from typer.testing import CliRunner

import eigenlens as el
from eigenlens import pipeline
from eigenlens.cli import app
from eigenlens.exact import exact_effects
from eigenlens.files import FileFormatError

ARGS = {"low": 1, "high": 12, "n_train": 40, "n_validation": 20, "n_test": 20}
FILES = [
    "after.parquet",
    "before.parquet",
    "config.yaml",
    "frozen.safetensors",
    "metrics.json",
    "protected.parquet",
    "scores.parquet",
    "trace.parquet",
]
FRACTIONS = [0.01, 0.1, 0.4]


@pytest.fixture
def config(tiny_folder):
    return el.EigenpruneConfig(
        model=str(tiny_folder("llama")),
        task="int_add",
        task_args=ARGS,
        criterion="max",
        search="one_shot",
        search_args={"fractions": FRACTIONS},
        protect={},
        device="cpu",
        batch_size=16,
    )


def test_run_folder_and_resumption(config, tmp_path, monkeypatch):
    out = tmp_path / "run"
    first = pipeline.run(config, out, progress=False)
    assert sorted(p.name for p in out.iterdir()) == FILES
    metrics = json.loads((out / "metrics.json").read_text())
    for name in ("before", "after"):
        assert {"accuracy", "loss", "n", "interval"} <= set(metrics[name])
    assert metrics["before"]["n"] == 20
    assert metrics["seed"] == 0
    assert metrics["versions"]["torch"] == torch.__version__
    assert set(metrics["seconds"]) >= {"before", "decompose", "score", "search", "after"}
    assert metrics["fingerprints"]["model"] == first.frozen.provenance.model_fingerprint
    assert metrics["search"]["method"] == "one_shot"
    assert metrics["search"]["chosen"]["components"] == len(first.frozen)
    assert first.search.trace["fraction"].tolist() == [0, *FRACTIONS]

    (out / "after.parquet").unlink()
    damaged = out / "scores.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "score", lambda *a, **k: pytest.fail("scored again"))
        again = pipeline.run(config, out, progress=False)
    assert again.after.examples.equals(first.after.examples)
    damaged.write_bytes(damaged.read_bytes()[:200])
    again = pipeline.run(config, out, progress=False)
    assert again.scores.to_pandas().equals(first.scores.to_pandas())
    other = config.model_copy(update={"criterion": "mean"})
    with pytest.raises(ValueError, match="another configuration"):
        pipeline.run(other, out, progress=False)


def test_the_command_line_draws_the_run(config, tmp_path):
    """Scores and search as pages, byte for byte the same in two undisturbed runs."""
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    pages = []
    for name in ("one", "two"):
        done = run_cli("run", "--config", tmp_path / "config.yaml", "--out", tmp_path / name)
        assert done.exit_code == 0, done.output
        pages.append([(tmp_path / name / f"{p}.html").read_bytes() for p in ("spectrum", "trace")])
    assert pages[0] == pages[1]


def test_an_interrupted_run_leaves_whole_files_only(config, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    out = tmp_path / "run"
    monkeypatch.setattr(pipeline, "one_shot", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(config, out, progress=False)
    assert sorted(p.name for p in out.iterdir()) == [
        "before.parquet",
        "config.yaml",
        "scores.parquet",
    ]
    el.Scores.load(out / "scores.parquet")


def test_config_alone_reproduces_the_run_bit_for_bit(config, tmp_path):
    one = tmp_path / "one"
    pipeline.run(config, one, progress=False)
    read = el.EigenpruneConfig.from_yaml(one / "config.yaml")
    assert read == config
    pipeline.run(read, tmp_path / "two", progress=False)
    for name in set(FILES) - {"metrics.json"}:
        assert (one / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_a_run_of_objects_says_what_was_run_and_where_it_came_from(tiny, tmp_path):
    model = tiny("gpt2")
    task = el.load_task("int_mult", model.tokenizer, **ARGS)
    config = el.EigenpruneConfig(search="one_shot", search_args={"fractions": [0.1]}, refine=0)
    result = el.eigenprune(model, task, config, out=tmp_path, progress=False)
    said = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert said["model"] == result.scores.provenance.model != config.model
    assert (said["task"], said["task_args"]["high"]) == ("int_mult", 12)
    assert said["from_memory"] == ["model", "task"]
    with pytest.raises(ValueError, match="model and task from memory"):
        pipeline.run(el.EigenpruneConfig.from_yaml(tmp_path / "config.yaml"))
    page = el.report.write_report(tmp_path, progress=False).read_text()
    assert "does not reproduce" in page
    assert "model=…, task=…" in page
    page = el.report.write_report(tmp_path, model=model, task=task, progress=False).read_text()
    assert 'id="figure-activations"' in page
    assert "model=…, task=…" not in page
    other = el.load_task("int_add", model.tokenizer, **ARGS)
    page = el.report.write_report(tmp_path, model=model, task=other, progress=False).read_text()
    assert "the test split of int_add is not that of the run" in page


@pytest.mark.parametrize("search", ["iterative", "guarded", "learned"])
def test_every_search_runs_saves_and_resumes(config, tmp_path, monkeypatch, search):
    options = {"steps": 4} | ({"every": 2} if search == "learned" else {"step": 3})
    changes = {"search": search, "search_args": options}
    if search != "iterative":
        changes["protect"] = {"int_mult": {"high": 8}}
    config = el.EigenpruneConfig(**{**config.model_dump(), **changes})
    first = pipeline.run(config, tmp_path, progress=False)
    for file in ("trace.parquet", "after.parquet"):  # killed before the end of the search
        (tmp_path / file).unlink()
    monkeypatch.setattr(pipeline, "score", lambda *a, **k: pytest.fail("scored again"))
    again = pipeline.run(config, tmp_path, progress=False)
    pd.testing.assert_frame_equal(again.search.trace, first.search.trace)
    pd.testing.assert_frame_equal(again.frozen.to_pandas(), first.frozen.to_pandas())
    assert again.after.examples.equals(first.after.examples)
    if search != "iterative":
        assert first.search.protected["data"].tolist() == ["int_mult"]
        assert (first.search.protected["divergence"] <= config.protect_bound).all()


def test_doubtful_scores_are_exact_where_one_ranking_decides(config):
    changed = {"criterion": "margin", "refine": 12}
    config = el.EigenpruneConfig(**{**config.model_dump(), **changed})
    result = pipeline.run(config, progress=False)
    model = el.load_model(config.model, device="cpu")
    task = el.load_task("int_add", model.tokenizer, **ARGS)
    plain = el.score(
        model,
        el.decompose(model, progress=False),
        task.train,
        criterion="margin",
        reference="shared",
        progress=False,
    )
    term = plain.with_criterion("fisher").delta_loss - plain.with_criterion("mean").delta_loss
    top = np.argsort(-term)[:12]
    effects = exact_effects(model, plain, top, task.train, progress=False)
    np.testing.assert_allclose(result.scores.delta_loss[top], effects.mean(1), atol=1e-5)
    rest = np.setdiff1d(np.arange(len(plain)), top)
    np.testing.assert_allclose(result.scores.delta_loss[rest], plain.delta_loss[rest], atol=1e-6)


def test_presets(config):
    paper = el.EigenpruneConfig.preset("paper", model=config.model, task="int_add")
    assert paper.search_args == {"fractions": [0.01, 0.05, 0.1], "or_nothing": False}
    assert (paper.criterion, paper.reference) == ("max", "mean")


def test_the_fraction_is_chosen_on_validation(config, tiny_folder):
    model = el.load_model(config.model, device="cpu")
    task = el.load_task("int_add", model.tokenizer, **ARGS)
    result = el.eigenprune(model, task, config, progress=False)
    losses = []
    for fraction in (0.0, *FRACTIONS):
        with el.freeze(model, el.select(result.scores, fraction)):
            found = el.evaluate(model, task.validation)
        losses.append((-found.accuracy, found.loss, fraction))
    assert len(result.frozen) == round(min(losses)[2] * len(result.scores))
    html = result._repr_html_()
    assert "before" in html
    assert "after" in html


def test_figure_shows_every_kind_and_marks_what_is_frozen(config):
    result = pipeline.run(config, progress=False)
    figure = el.plots.spectrum(result.scores, result.frozen)
    marked = [t for t in figure.data if t.name == "frozen"]
    kinds = result.frozen.to_pandas()["matrix"].value_counts()
    assert [sum(x is not None for x in t.x) for t in marked] == [
        kinds.get(k, 0) for k in ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out")
    ]
    assert all(axis.title.text for axis in figure.select_xaxes())
    assert all(axis.title.text for axis in figure.select_yaxes())


def run_cli(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_command_line(config, tmp_path):
    out = tmp_path / "cli"
    common = ["--model", config.model, "--task", "int_add", "--device", "cpu", "--batch-size", 16]
    for key, value in ARGS.items():
        common += ["--task-arg", f"{key}={value}"]
    found = run_cli(
        "run",
        *common,
        "--matrices",
        "W_K,W_in",
        "--fraction",
        0.4,
        "--criterion",
        "max",
        "--out",
        out,
    )
    assert found.exit_code == 0, found.output
    assert "before" in found.output
    assert "after" in found.output
    scores = pd.read_parquet(out / "scores.parquet")
    assert set(scores["matrix"]) == {"W_K", "W_in"}
    frozen = el.FrozenSet.load(out / "frozen.safetensors")
    assert len(frozen) == round(0.4 * len(scores))
    again = run_cli(
        "run", "--config", out / "config.yaml", "--fraction", 0.2, "--out", tmp_path / "other"
    )
    assert again.exit_code == 0, again.output
    changed = yaml.safe_load((tmp_path / "other/config.yaml").read_text())
    assert changed["search_args"] == {"fractions": [0.2], "or_nothing": False}
    both = run_cli(
        "run", "--config", out / "config.yaml", "--preset", "paper", "--out", tmp_path / "b"
    )
    assert both.exit_code == 2
    assert "give one of them" in both.output
    assert "smollm2-135m" in run_cli("models").output
    assert "int_mult" in run_cli("tasks").output


def test_options_of_the_same_search_add_up_and_of_another_do_not(config, tmp_path):
    """What a file or a preset says stands, unless the command line says otherwise."""
    file = tmp_path / "base.yaml"
    chosen = {"search": "guarded", "search_args": {"steps": 2, "step": 3}}
    file.write_text(el.EigenpruneConfig(**{**config.model_dump(), **chosen}).to_yaml())

    def settings(name, *options):
        found = run_cli("run", "--config", file, *options, "--out", tmp_path / name)
        assert found.exit_code == 0, found.output
        return yaml.safe_load((tmp_path / name / "config.yaml").read_text())

    protect = ["--protect", "int_mult", "--protect-bound", 0.2]
    same = settings("same", "--search-arg", "step=4", *protect)
    assert same["search_args"] == {"steps": 2, "step": 4}
    assert (same["protect"], same["protect_bound"]) == ({"int_mult": {}}, 0.2)
    few = ["--search-arg", "steps=1", "--search-arg", "step=1e-2"]
    other = settings("other", "--search", "iterative", *few)
    assert other["search_args"] == {"steps": 1, "step": 0.01}
    none = settings("none", "--search", "one_shot", "--reference", "resample")
    assert none["search_args"] == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fraction", "1.5"], "less than or equal to 1"),
        (["--fraction", "0.1", "--search", "learned"], "--fraction is for one_shot"),
        (["--search", "luck"], "search"),
        (["--search-arg", "stepz=3"], "stepz"),
        (["--search-arg", "steps=many"], "steps"),
        (["--search", "one_shot", "--protect", "int_add"], "cannot protect"),
        (["--preset", "fast"], "Unknown preset"),
        (["--fraction", "much"], "comma-separated"),
        (["--criterion", "median"], "criterion"),
        (["--matrices", "W_X"], "Unknown matrix kind"),
        (["--basis", "fourier"], "basis"),
        (["--basis", "qk_ov", "--matrices", "W_K"], "choose from QK, OV"),
        (["--layers", "9"], "Unknown layer 9"),
        (["--task", "int_sub"], "Unknown task"),
        (["--task-arg", "high"], "key=value"),
        (["--task-arg", "width=3"], "width"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--model", "nowhere.gguf"], "nowhere.gguf"),
        (["--dtype", "int8"], "int8"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_input_is_one_sentence_and_no_run(config, tmp_path, options, message):
    found = run_cli("run", "--model", config.model, "--out", tmp_path / "out", *options)
    assert found.exit_code == 2
    assert message in " ".join(found.output.split())
    assert "Traceback" not in found.output
    assert not (tmp_path / "out" / "scores.parquet").exists()


def test_bad_yaml(tmp_path):
    path = tmp_path / "config.yaml"
    for text, message in (
        ("[1, 2]", "mapping"),
        ("a: [", "not valid YAML"),
        ("\x00", "not valid YAML"),
    ):
        path.write_text(text)
        with pytest.raises(FileFormatError, match=message):
            el.EigenpruneConfig.from_yaml(path)
    path.write_text("fractoin: 0.1")
    with pytest.raises(ValueError, match="fractoin"):
        el.EigenpruneConfig.from_yaml(path)


@pytest.mark.slow
def test_bench_writes_its_numbers(config, tmp_path):
    out = tmp_path / "bench.json"
    found = run_cli(
        "bench",
        "--model",
        config.model,
        "--repeats",
        1,
        "--out",
        out,
        *[a for k, v in ARGS.items() for a in ("--task-arg", f"{k}={v}")],
    )
    assert found.exit_code == 0, found.output
    numbers = json.loads(out.read_text())
    assert numbers["score_to_training_step"] > 0
    assert numbers["components"] == 2 * (4 * 8 + 2 * 8 * 2 + 4 * 8 + 3 * 32)
    assert "peak_memory_mb" in numbers


@pytest.mark.parametrize(
    ("name", "message"),
    [("ambiguous", "a model of its own"), ("searches", "of gpt2"), ("gates", "for gpt2")],
)
def test_a_study_says_which_models_it_is_not_of(tmp_path, name, message):
    found = run_cli("experiment", name, "--model", "gpt2", "--parts", tmp_path, "--out", tmp_path)
    assert found.exit_code == 2
    assert message in found.output
    assert not list(tmp_path.glob("*.md"))
