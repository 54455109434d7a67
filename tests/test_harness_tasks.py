"""CB, COPA, RTE and WikiText-2 as the harness defines tasks, against our own evaluation of them."""

import json
import math
import os
import random
from pathlib import Path

import lm_eval
import numpy as np
import pytest
import torch
import transformers as tf
from lm_eval.tasks import TaskManager
from test_cli_edits import run_cli
from test_superglue import ROWS
from tiny_models import _GROUPED
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import eigenlens as el
import eigenlens.lm_eval
from eigenlens.architectures.tiny_models import enlarge
from eigenlens.models.known import resolve
from eigenlens.tasks import write_harness_tasks
from eigenlens.tasks.batches import tokenise
from eigenlens.tasks.sources import MissingDataError

CHOICES = ("cb", "copa", "rte")
NAMES = [f"eigenlens_{name}" for name in (*CHOICES, "wikitext", "wikitext_rolling")]


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """A folder as that of the official files, with rows of our own."""
    folder = tmp_path_factory.mktemp("data")
    for name, rows in ROWS.values():
        (folder / name).mkdir()
        for split in ("train", "val"):
            lines = (
                json.dumps({**row, "premise": f"{row['premise']} {split} {{{{ 1 }}}} é"})
                for row in rows
            )
            (folder / name / f"{split}.jsonl").write_text("\n".join(lines), "utf-8")
    for split in ("valid", "test"):
        draw = random.Random(split)
        words = [draw.choice(["cats", "and", "[ 12", ".", "\n \n", "é"]) for _ in range(14_000)]
        (folder / f"{split}.txt").write_text(" ".join(words), "utf-8")
    return folder


@pytest.fixture(scope="module", params=["made up", "official"])
def data(request):
    if request.param == "made up":
        return request.getfixturevalue("made_up")
    if not os.environ.get("EIGENLENS_DATA"):
        pytest.skip("EIGENLENS_DATA names no folder")
    return Path(os.environ["EIGENLENS_DATA"])


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A random model that reads any text, of contexts long enough for these prompts."""
    folder = tmp_path_factory.mktemp("model")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>"],
        show_progress=False,
    )
    texts = [text for task in CHOICES for text in _words_of(task)]
    core.train_from_iterator(texts, trainer)
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="<s>", pad_token="<s>"
    )
    torch.manual_seed(0)
    widths = {"vocab_size": len(tokenizer), "max_position_embeddings": 2048}
    model = tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**_GROUPED | widths)).eval()
    enlarge(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _words_of(task):
    form = eigenlens.tasks.superglue.FORMATS[task]
    return [form.template, *form.answers.values(), *form.questions.values()]


def examples(data, n):
    """The first ``n`` test examples of each task."""
    return {
        name: el.load_task(name, data=data).test.select(range(n)) for name in (*CHOICES, "wikitext")
    }


def measured(bridge, rows):
    """What eigenlens measures on them."""
    begin = bridge.tokenizer.bos_token
    whole = rows["wikitext"].map(
        lambda row: {"prompt": begin, "answer": row["prompt"] + row["answer"]}
    )
    return {
        **{
            name: el.evaluate(bridge, own, batch_size=8, progress=False)
            for name, own in rows.items()
        },
        "perplexity": el.perplexity(bridge, rows["wikitext"], batch_size=8),
        "rolling": el.perplexity(bridge, whole, batch_size=8),
        "answer tokens": n_answer_tokens(bridge, rows["wikitext"]),
        "tokens": n_answer_tokens(bridge, whole),
    }


def n_answer_tokens(bridge, own):
    return sum(len(example.answer) for example in tokenise(own, bridge.tokenizer))


def harness(folder, n, **model_args):
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(
        model="eigenlens",
        model_args={**model_args, "device": "cpu", "dtype": "float32"},
        tasks=["eigenlens"],  # the tag of all
        task_manager=tasks,
        batch_size=8,
        limit=n,
        log_samples=True,
        bootstrap_iters=0,
    )


def check_same(found, rows, ours):
    """Numbers of the harness, and what it read and found of each example, are ours."""
    results, samples = found["results"], found["samples"]
    assert sorted(samples) == sorted(NAMES)
    for name in CHOICES:
        task = f"eigenlens_{name}"
        assert results[task]["acc,none"] == pytest.approx(ours[name].choice_accuracy)
        own = sorted(samples[task], key=lambda sample: sample["doc_id"])
        assert len(own) == len(rows[name])
        for row, told, sample in zip(
            rows[name], ours[name].examples.itertuples(), own, strict=True
        ):
            requests = list(sample["arguments"])
            assert [text for text, _ in requests] == [row["prompt"]] * len(row["candidates"])
            assert [answer for _, answer in requests] == row["candidates"]
            nats = [-float(value) for value, _ in sample["filtered_resps"]]
            right = row["candidates"].index(row["answer"])
            assert nats[right] == pytest.approx(told.loss, rel=1e-4, abs=1e-4)
            assert row["candidates"][int(np.argmin(nats))] == told.choice
    text, rolling = (results[f"eigenlens_{name}"] for name in ("wikitext", "wikitext_rolling"))
    n = len(rows["wikitext"])
    nats = math.log(text["perplexity,none"])
    assert nats == pytest.approx(ours["wikitext"].loss, rel=1e-4)
    assert text["acc,none"] == pytest.approx(ours["wikitext"].accuracy)
    assert math.exp(nats * n / ours["answer tokens"]) == pytest.approx(ours["perplexity"], rel=1e-4)
    passages = [row["prompt"] + row["answer"] for row in rows["wikitext"]]
    n_bytes = sum(len(passage.encode()) for passage in passages)
    per_token = math.log(rolling["byte_perplexity,none"]) * n_bytes / ours["tokens"]
    assert math.exp(per_token) == pytest.approx(ours["rolling"], rel=1e-4)


def check_edited_and_not(source, bridge, data, n, frozen, folder):
    """The harness on definitions of ``data``, before and after an edit."""
    assert write_harness_tasks(folder / "tasks", data) == NAMES
    frozen.save(folder / "frozen.safetensors")
    rows = examples(data, n)
    before = measured(bridge, rows)
    check_same(harness(folder / "tasks", n, pretrained=str(source)), rows, before)
    with el.freeze(bridge, frozen):
        after = measured(bridge, rows)
    edit = str(folder / "frozen.safetensors")
    check_same(harness(folder / "tasks", n, pretrained=str(source), edit=edit), rows, after)
    for name, own in before.items():
        if isinstance(own, el.Evaluation):
            changed = (own.examples["loss"] - after[name].examples["loss"]).abs()
            assert changed.mean() > 0.02, name
    assert abs(math.log(before["rolling"] / after["rolling"])) > 1e-3


def frozen_part(bridge, calibration, matrices):
    """Half of the components of some matrices, under means by position."""
    spectra = el.decompose(bridge, matrices, progress=False)
    return el.select(el.score(bridge, spectra, calibration, progress=False), 0.5)


def test_numbers_are_ours_edited_and_not(tiny_model, data, tmp_path):
    bridge = el.load_model(tiny_model, dtype="float32", device="cpu")
    calibration = el.load_task("copa", data=data).train.select(range(6))
    frozen = frozen_part(bridge, calibration, ["W_K", "W_out"])
    check_edited_and_not(tiny_model, bridge, data, 5, frozen, tmp_path)


@pytest.mark.real
def test_numbers_are_ours_on_smollm2(tmp_path):
    if not os.environ.get("EIGENLENS_DATA"):
        pytest.skip("EIGENLENS_DATA names no folder")
    data = Path(os.environ["EIGENLENS_DATA"])
    source = resolve("smollm2-135m")
    bridge = el.load_model(source, dtype="float32", device="cpu")
    calibration = el.load_task("copa", data=data).train.select(range(8))
    frozen = frozen_part(bridge, calibration, ["W_K"])
    check_edited_and_not(source, bridge, data, 3, frozen, tmp_path)


def test_the_command_writes_what_the_function_does(made_up, tmp_path, monkeypatch):
    names = write_harness_tasks(tmp_path / "a", made_up)
    written = run_cli("harness-tasks", "--data", made_up, "--out", tmp_path / "b")
    assert written.exit_code == 0, written.output
    assert ", ".join(names) in written.stdout
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert len(files) == len(names) + 1
    for name, text in files.items():
        there = (tmp_path / "b" / name).read_bytes()
        assert there.replace(b"/b/", b"/a/") == text
    rows = list(map(json.loads, (tmp_path / "a" / "wikitext.jsonl").read_text().splitlines()))
    wanted = el.load_task("wikitext", data=made_up).test
    assert rows == [{name: row[name] for name in ("prompt", "answer")} for row in wanted]
    monkeypatch.setenv("EIGENLENS_DATA", str(made_up))
    assert write_harness_tasks(tmp_path / "c") == names


def test_without_the_files_nothing_is_written(made_up, tmp_path, monkeypatch):
    monkeypatch.delenv("EIGENLENS_DATA", raising=False)
    with pytest.raises(MissingDataError, match="name their folder with data= or EIGENLENS_DATA"):
        write_harness_tasks(tmp_path / "tasks")
    part = tmp_path / "part"
    part.mkdir()
    for name in ("CB", "COPA", "RTE", "valid.txt"):
        (part / name).symlink_to(made_up / name)
    refused = run_cli("harness-tasks", "--data", part, "--out", tmp_path / "tasks")
    assert refused.exit_code == 2
    assert "test.txt" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "tasks").exists()
