"""The command line of lm-evaluation-harness on edited models, against our own evaluation."""

import json
import subprocess
import sys
from functools import partial

import lm_eval.tasks
import pytest
import torch
import yaml
from test_freezing import frozen_half
from tiny_models import dataset

import eigenlens as el
import eigenlens.lm_eval
from eigenlens.positions import prompt_ends_at

SUMS = [("1 + 2 =", 3), ("9 x 4 + 1 =", 37), ("7 + 7 + 7 + 7 =", 28), ("3 x 9 =", 27)]
# As of CB: answers of one and of several words. "4" after "1 = 3" reads what "3 4" does after
# "1 =", so that the tokens alone do not say where the prompt ends.
CHOICES = [
    *({"prompt": p, "choices": [f"{n}", f"{n} 3", "5 6 7"], "label": n % 3} for p, n in SUMS),
    {"prompt": "1 =", "choices": ["3 4", "9", "8 8"], "label": 0},
    {"prompt": "1 = 3", "choices": ["4", "9 4", "0"], "label": 1},
]
TEXTS = [f"{a} + {b} = {a + b} x {n} ? 7" for a, b, n in [(1, 2, 9), (20, 4, 3), (5, 5, 40)]]
WRITTEN = [{"prompt": prompt, "answer": f"{n} {n} 5"} for prompt, n in SUMS]
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    },
    "answers": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{' ' + answer}}",
        "metric_list": [{"metric": "perplexity"}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "written": {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5},
        "metric_list": [{"metric": "exact_match"}],
    },
}
ROWS = {
    "choices": CHOICES,
    "answers": WRITTEN,
    "texts": [{"text": text} for text in TEXTS],
    "written": WRITTEN,
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of task definitions over local files."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, definition in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
        files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        definition = {"task": name, "test_split": "test", **files, **definition}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(definition))
    return folder


@pytest.fixture(scope="module")
def edit(tiny_folder, tmp_path_factory):
    """The files of edits under both kinds of means, and the bridge that they were made on."""
    bridge = el.load_model(tiny_folder("llama"), dtype="float32", device="cpu")
    data = dataset([(prompt, f" {n} {n} 5") for prompt, n in SUMS])
    frozen = frozen_half(bridge, data, 0.3)
    folder = tmp_path_factory.mktemp("edit")
    sets = {"position": frozen, "shared": frozen.shared()}
    for name, own in sets.items():
        own.save(folder / f"{name}.safetensors")
    return folder, bridge, sets


@pytest.fixture
def run(monkeypatch, tasks, tmp_path):
    """Runs the harness' own command line; its results by task, and its samples."""

    def run(*model_args):
        out = tmp_path / "out.json"
        words = ["--model", "eigenlens", "--model_args", ",".join(model_args), "--device", "cpu"]
        words += ["--tasks", ",".join(TASKS), "--include_path", tasks, "--output_path", out]
        words += ["--batch_size", 4, "--log_samples"]
        # The 14,000 files of its own tasks take it ten seconds to list.
        ours_alone = partial(lm_eval.tasks.TaskManager, include_defaults=False)
        monkeypatch.setattr(lm_eval.tasks, "TaskManager", ours_alone)
        monkeypatch.setattr(sys, "argv", ["lm-eval", *map(str, words)])
        eigenlens.lm_eval.main()
        (found,) = tmp_path.glob("out_*.json")
        samples = {
            name: list(map(json.loads, path.read_text().splitlines()))
            for name in TASKS
            for path in tmp_path.glob(f"*{name}*.jsonl")
        }
        return json.loads(found.read_text())["results"], samples

    return run


def measured(bridge):
    """The numbers of the tasks as eigenlens measures them."""
    rows = [
        {
            "prompt": row["prompt"],
            "answer": f" {row['choices'][row['label']]}",
            "candidates": [f" {choice}" for choice in row["choices"]],
        }
        for row in CHOICES
    ]
    data = type(dataset(SUMS[:0])).from_list(rows)
    answers = dataset([(row["prompt"], f" {row['answer']}") for row in WRITTEN])
    choices = dataset([(row["prompt"], f" {c}") for row in CHOICES for c in row["choices"]])
    return {
        "acc": el.evaluate(bridge, data, progress=False).choice_accuracy,
        "losses": el.evaluate(bridge, choices, progress=False).examples["loss"].tolist(),
        "perplexity": el.perplexity(bridge, answers),
        "word_perplexity": el.perplexity(bridge, dataset([("<s>", f" {t}") for t in TEXTS])),
        "written": [written(bridge, row["prompt"]) for row in WRITTEN],
    }


def written(bridge, prompt):
    tokens = torch.tensor([bridge.tokenizer.encode(prompt)])
    n_prompt = tokens.shape[1]
    for _ in range(5):
        with torch.no_grad(), prompt_ends_at(bridge, n_prompt):
            best = bridge(tokens)[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, best], 1)
    return bridge.tokenizer.decode(tokens[0, n_prompt:], skip_special_tokens=True)


def check_same(found, samples, wanted):
    n_tokens = 3  # of every answer
    assert found["choices"]["acc,none"] == pytest.approx(wanted["acc"])
    assert found["answers"]["perplexity,none"] ** (1 / n_tokens) == pytest.approx(
        wanted["perplexity"], rel=1e-5
    )
    assert found["texts"]["word_perplexity,none"] == pytest.approx(
        wanted["word_perplexity"], rel=1e-5
    )
    assert [s["filtered_resps"][0] for s in samples["written"]] == wanted["written"]
    losses = [-float(nats) for s in samples["choices"] for nats, _ in s["filtered_resps"]]
    assert losses == pytest.approx(wanted["losses"], rel=1e-5)


def test_numbers_are_ours_unedited(run, edit, tiny_folder):
    _, bridge, _ = edit
    found, samples = run(f"pretrained={tiny_folder('llama')}")
    check_same(found, samples, measured(bridge))


@pytest.mark.parametrize("means", ["position", "shared"])
def test_numbers_are_ours_edited(run, edit, means):
    folder, bridge, sets = edit
    with el.freeze(bridge, sets[means]):
        wanted = measured(bridge)
    plain = measured(bridge)
    assert wanted["perplexity"] != pytest.approx(plain["perplexity"], rel=1e-3)
    found, samples = run(f"edit={folder / means}.safetensors")
    check_same(found, samples, wanted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("edit={edit}/none.safetensors", "none.safetensors"),
        ("pretrained={other},edit={edit}/shared.safetensors", "other weights"),
        ("shared=True", "pretrained=MODEL, edit=FILE or both"),
        ("edit={edit}/shared.safetensors,dtype=bfloat16", "allow_dtype=True"),
    ],
)
def test_bad_input_is_one_sentence(run, edit, tiny_folder, capsys, arguments, message):
    folder, _, _ = edit
    with pytest.raises(SystemExit) as stop:
        run(arguments.format(edit=folder, other=tiny_folder("gpt2")))
    assert stop.value.code == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if "Error:" in line]
    assert message in sentence


@pytest.mark.slow
def test_the_command_starts_the_harness():
    command = [sys.executable, "-m", "eigenlens.lm_eval", "run", "--help"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--model_args" in found.stdout


@pytest.mark.slow
def test_without_the_harness_its_extra_is_named():
    code = "import sys; sys.modules['lm_eval'] = None; import eigenlens.lm_eval"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'eigenlens[lm-eval]'" in found.stderr.splitlines()[-1]
