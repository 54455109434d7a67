"""Damaged files of every kind: a clean error that names the file, or the right result.

A case is a reader and a seed. ``FUZZ_SEED=7 pytest 'tests/test_fuzz.py::test_fuzz[scores]'`` runs
one of them alone.
"""

import json
import os
import random
import resource
import signal
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import gguf
import jaxtyping
import numpy as np
import pandas as pd
import pytest
import safetensors
import torch
import yaml
from damage import PlainGguf, damaged, plain_jsonl, plain_safetensors
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from test_gguf import write_gguf
from test_superglue import CB
from tiny_models import MIXED

import eigenlens as el
from eigenlens import cache
from eigenlens.baselines.edits import BiasEdit, load_edit
from eigenlens.circuits import Circuit, Readout
from eigenlens.files import (
    FileFormatError,
    load_record,
    load_table,
    save_record,
    save_table,
    write_json,
)
from eigenlens.models import gguf_files
from eigenlens.models.gguf_head import read_head
from eigenlens.models.peft_adapters import base_name
from eigenlens.models.weight_files import check_folder
from eigenlens.paper.studies.config import CONFIGS, StudyConfig
from eigenlens.paper.studies.result import Parts
from eigenlens.provenance import Provenance
from eigenlens.search.result import Checkpoint, SearchResult
from eigenlens.tasks.jsonl import jsonl
from eigenlens.tasks.rows import DataError
from eigenlens.tasks.superglue import cb
from eigenlens.tasks.text import text_examples

pytestmark = pytest.mark.slow
SECONDS, GIGABYTES = 10, 4  # what one case may take
PROVENANCE = Provenance(model="m", model_fingerprint="f", versions={"python": "3"})
TABLE = pd.DataFrame(
    {"node": ["a", "b", None], "effect": [0.25, np.nan, -3.5], "layer": [0, 1, 2], "on": [1, 0, 1]}
).astype({"on": bool})


@dataclass(frozen=True)
class Sample:
    """Results of a tiny model."""

    model: Any
    scores: el.Scores
    frozen: el.FrozenSet
    change: el.ActivationChange
    evaluation: el.Evaluation


@dataclass(frozen=True)
class Reader:
    """How a kind of file is written, read and compared.

    Attributes:
        cases: how often it is damaged.
        write: makes the file.
        read: what the package makes of it.
        right: whether this is what the bytes say; the second argument is what was read undamaged.
        errors: what the reader may raise.
    """

    cases: int
    file: str
    write: Callable[[Path, "Sample"], Any]
    read: Callable[[Path, "Sample"], Any]
    right: Callable[[bytes, Any, Any], bool]
    errors: tuple[type[Exception], ...] = (FileFormatError,)


def unchanged(content: bytes, found: Any, whole: Any) -> bool:
    """Of files with a checksum: what was written, or nothing."""
    return same(found, whole)


def same(one: Any, other: Any) -> bool:
    """Equality through tables, tensors and the dataclasses that hold them."""
    if type(one) is not type(other):
        return False
    if isinstance(one, pd.DataFrame):
        return one.equals(other) and (one.dtypes == other.dtypes).all()
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=True)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, el.Spectra):
        return same(dict(one), dict(other)) and same(one.provenance, other.provenance)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if hasattr(one, "__dataclass_fields__"):
        return same(dict(vars(one)), dict(vars(other)))
    if isinstance(one, float):
        return np.array_equal(one, other, equal_nan=True)
    return bool(one == other)


# What is written, and how it is read ------------------------------------------------------------

ROWS = [
    {"prompt": f"{i} +\u2028é😀 1 =", "answer": f" {i + 1}", "candidates": [f" {i + 1}", " x"]}
    for i in range(9)
]


def write_jsonl(path: Path) -> None:
    lines = [json.dumps(row, ensure_ascii=number % 2 == 0) for number, row in enumerate(ROWS)]
    path.write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")


def read_jsonl(path: Path) -> list[dict]:
    task = jsonl(path=path)
    return list(chain(task.train.to_list(), task.validation.to_list(), task.test.to_list()))


def right_jsonl(content: bytes, found: list[dict], whole: Any) -> bool:
    """The rows of the file, less those whose prompt came before in another split."""
    names = ("prompt", "answer", "candidates")
    rows = [{"candidates": [], **row} for row in plain_jsonl(content)]
    rows = [{n: row[n] if row[n] is not None else [] for n in names} for row in rows]
    prompts = [{row["prompt"] for row in some} for some in (rows, found)]
    return all(row in rows for row in found) and prompts[0] == prompts[1]


def write_cb(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    for name in ("train.jsonl", "val.jsonl"):
        lines = [json.dumps(row, ensure_ascii=False) for row in CB]
        (path.parent / name).write_text("\n".join(lines), encoding="utf-8")


def read_cb(path: Path) -> list[dict]:
    return cb(data=path.parent.parent).test.to_list()


def right_cb(content: bytes, found: list[dict], whole: Any) -> bool:
    answers = {"entailment": " entails", "contradiction": " contradicts", "neutral": " is neutral"}
    rows = plain_jsonl(content)
    return len(rows) == len(found) and all(
        made["prompt"].startswith(
            f"Premise: {row['premise']}\n\nHypothesis: {row['hypothesis']}\n\n"
        )
        and made["answer"] == answers[row["label"]]
        for row, made in zip(rows, found, strict=True)
    )


def write_text(path: Path) -> None:
    path.write_text("".join(f"Wort {i}, größer als {i - 1}.\n" for i in range(60)), "utf-8")


def right_text(content: bytes, found: Dataset, whole: Any) -> bool:
    """Passages are parts of the text, word for word and in order."""
    made = "".join(row["prompt"] + row["answer"] for row in found).split()
    return "".join(content.decode().split()).startswith("".join(made)) and len(made) > 0


CONFIG = """# my run
model: arith-tiny
task: int_add
task_args: &args {n_train: 10, "low": 1.5, names: [a, b]}
search: learned
search_args:
  steps: 20
  lr: 1e-2
protect:
  text: *args
seed: 3
"""


def right_config(content: bytes, found: el.EigenpruneConfig, whole: Any) -> bool:
    return found == el.EigenpruneConfig(**yaml.safe_load(content.decode()))


def right_study(content: bytes, found: StudyConfig, whole: Any) -> bool:
    return found == StudyConfig(**yaml.safe_load(content.decode()))


def write_weights(path: Path) -> None:
    tensors = {f"h.{i}.weight": torch.randn(3, i + 1).bfloat16() for i in range(4)}
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    check_folder(path.parent)
    with safetensors.safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def right_weights(content: bytes, found: dict[str, torch.Tensor], whole: Any) -> bool:
    plain = plain_safetensors(content)
    return plain.keys() == found.keys() and all(
        list(tensor.shape) == plain[name][1]
        and tensor.view(torch.uint8).numpy().tobytes() == plain[name][2]
        for name, tensor in found.items()
    )


def write_index(path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        write_weights(path.parent / name)
    weights = {f"h.{i}.weight": "ab"[i % 2] + ".safetensors" for i in range(6)}
    path.write_text(json.dumps({"metadata": {"total_size": 9}, "weight_map": weights}, indent=1))


def right_index(content: bytes, found: None, whole: Any) -> bool:
    """Every file that it lists is there."""
    return set(json.loads(content)["weight_map"].values()) <= {"a.safetensors", "b.safetensors"}


def write_adapter(path: Path) -> None:
    path.write_text(json.dumps({"base_model_name_or_path": "gpt2", "r": 4, "peft_type": "LORA"}))


def right_adapter(content: bytes, found: str, whole: str) -> bool:
    return found == json.loads(content)["base_model_name_or_path"]


def write_head(path: Path) -> None:
    """Every kind of value and next to no weights, so that damage hits the head."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_float64("a.f64", 0.1)
    writer.add_int8("a.i8", -3)
    writer.add_uint64("a.u64", 2**40)
    writer.add_bool("a.bool", True)
    writer.add_array("a.ints", [1, 2, 3])
    writer.add_array("a.floats", [0.5, 1.5])
    writer.add_array("a.bools", [True, False])
    writer.add_token_list(["<s>", "größer", "Ġ"])
    for number, kind in enumerate((np.float32, np.float16, np.int32)):
        writer.add_tensor(f"blk.{number}.weight", np.arange(6, dtype=kind).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: Path) -> gguf.GGUFReader:
    return read_head(path)


def right_gguf(content: bytes, found: gguf.GGUFReader, whole: Any) -> bool:
    """Names, values, shapes and places are those of the head."""
    if found.byte_order == "S":
        return False
    plain = PlainGguf(content)
    values = {k: f.contents() for k, f in found.fields.items() if not k.startswith("GGUF.")}
    tensors = {
        t.name: (t.shape.tolist(), int(t.tensor_type), int(t.data_offset)) for t in found.tensors
    }
    parts = sorted((int(t.data_offset), int(t.data_offset) + t.n_bytes) for t in found.tensors)
    apart = all(stop <= start for (_, stop), (start, _) in pairwise(parts))
    inside = all(stop <= len(content) for _, stop in parts)
    return repr(values) == repr(plain.values) and tensors == plain.tensors and apart and inside


def write_parts(path: Path) -> None:
    write_gguf(path.parent / "tiny.gguf", parts=4)


def read_parts(path: Path) -> dict[str, torch.Tensor]:
    """Weights of the whole model, through transformers."""
    folder = gguf_files.dequantised(path)
    with safetensors.safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def right_parts(content: bytes, found: dict[str, torch.Tensor], whole: dict) -> bool:
    """Tensors of the same names and shapes: other weights are what the bytes say."""
    shapes = [{name: tensor.shape for name, tensor in some.items()} for some in (found, whole)]
    return shapes[0] == shapes[1]


def write_kept(path: Path) -> None:
    cache.kept("abc", tensors)
    assert path.is_file()


def tensors() -> dict[str, torch.Tensor]:
    return {"u": torch.arange(12.0).view(3, 4), "none": torch.zeros(0, 2), "n": torch.tensor(7)}


def write_checkpoint(path: Path, sample: Sample) -> None:
    checkpoint(path, sample).save({"rows": np.arange(9)}, {"trace": [{"step": 0, "loss": np.nan}]})


def checkpoint(path: Path, sample: Sample) -> Checkpoint:
    return Checkpoint(path, sample.scores, MIXED, MIXED, {"steps": 3})


def write_search(path: Path, sample: Sample) -> None:
    SearchResult("one_shot", sample.frozen, TABLE, TABLE).save(path.parent)


def write_edit(path: Path, sample: Sample) -> None:
    BiasEdit({"bias": torch.randn(24).half()}, {"hook": "blocks.0.hook_out"}).save(path)


READERS = {
    "jsonl": Reader(
        1500,
        "mine.jsonl",
        lambda path, _: write_jsonl(path),
        lambda path, _: read_jsonl(path),
        right_jsonl,
        (DataError, ValueError),
    ),
    "cb": Reader(
        500,
        "CB/val.jsonl",
        lambda path, _: write_cb(path),
        lambda path, _: read_cb(path),
        right_cb,
        (DataError,),
    ),
    "text": Reader(
        300,
        "mine.txt",
        lambda path, _: write_text(path),
        lambda path, _: text_examples(path, n_prompt_tokens=4, n_answer_tokens=2),
        right_text,
        (DataError, ValueError),
    ),
    "part of a study": Reader(
        300,
        "m_t.json",
        lambda path, _: write_json(path, [{"loss": 0.5, "label": "frozen"}]),
        lambda path, _: Parts(path.parent).do("m_t", list),
        lambda content, found, _: same(found, json.loads(content)),
    ),
    "config": Reader(
        1000,
        "config.yaml",
        lambda path, _: path.write_text(CONFIG),
        lambda path, _: el.EigenpruneConfig.from_yaml(path),
        right_config,
        (FileFormatError, ValueError),
    ),
    "study": Reader(
        300,
        "study.yaml",
        lambda path, _: path.write_bytes((CONFIGS / "transfer.yaml").read_bytes()),
        lambda path, _: StudyConfig.read(path),
        right_study,
        (FileFormatError, ValueError),
    ),
    "frozen set": Reader(
        1000,
        "frozen.safetensors",
        lambda path, sample: sample.frozen.save(path, directions=True),
        lambda path, _: el.FrozenSet.load(path),
        unchanged,
    ),
    "spectra": Reader(
        500,
        "spectra.safetensors",
        lambda path, sample: sample.scores.spectra.save(path),
        lambda path, sample: el.Spectra.load(path, sample.model),
        unchanged,
    ),
    "edit": Reader(300, "edit.safetensors", write_edit, lambda path, _: load_edit(path), unchanged),
    "activations": Reader(
        300,
        "change.safetensors",
        lambda path, sample: sample.change.save(path),
        lambda path, _: el.ActivationChange.load(path),
        unchanged,
    ),
    "checkpoint": Reader(
        400,
        "state.safetensors",
        write_checkpoint,
        lambda path, sample: checkpoint(path, sample).load(),
        unchanged,
        (FileFormatError, ValueError),
    ),
    "scores": Reader(
        1000,
        "scores.parquet",
        lambda path, sample: sample.scores.save(path),
        lambda path, _: el.Scores.load(path),
        unchanged,
    ),
    "evaluation": Reader(
        600,
        "test.parquet",
        lambda path, sample: sample.evaluation.save(path),
        lambda path, _: el.Evaluation.load(path),
        unchanged,
    ),
    "search": Reader(
        300,
        "trace.parquet",
        write_search,
        lambda path, _: SearchResult.load(path.parent),
        unchanged,
    ),
    "table": Reader(
        500,
        "table.parquet",
        lambda path, _: save_table(path, "experiment", TABLE, {"settings": {"seeds": [1, 2]}}),
        lambda path, _: load_table(path, "experiment"),
        unchanged,
    ),
    "circuit": Reader(
        500,
        "circuit.json",
        lambda path, _: Circuit(TABLE, TABLE, TABLE, TABLE, "frozen", 3, PROVENANCE).save(path),
        lambda path, _: Circuit.load(path),
        unchanged,
    ),
    "readout": Reader(
        300,
        "readout.json",
        lambda path, _: Readout("L0", TABLE, TABLE, TABLE, TABLE, PROVENANCE).save(path),
        lambda path, _: Readout.load(path),
        unchanged,
    ),
    "metrics": Reader(
        500,
        "metrics.json",
        lambda path, _: save_record(path, "metrics", {"seconds": {"score": 0.1}, "seed": None}),
        lambda path, _: load_record(path, "metrics"),
        unchanged,
    ),
    "cached decomposition": Reader(
        500,
        "cache/bases/ab/abc.safetensors",
        lambda path, _: write_kept(path),
        lambda path, _: cache.kept("abc", tensors),
        unchanged,
        (),
    ),
    "weights": Reader(
        600,
        "model.safetensors",
        lambda path, _: write_weights(path),
        lambda path, _: read_weights(path),
        right_weights,
    ),
    "index of weights": Reader(
        400,
        "model.safetensors.index.json",
        lambda path, _: write_index(path),
        lambda path, _: check_folder(path.parent),
        right_index,
    ),
    "adapter": Reader(
        300,
        "adapter_config.json",
        lambda path, _: write_adapter(path),
        lambda path, _: base_name(path.parent),
        right_adapter,
    ),
    "gguf": Reader(
        2500,
        "tiny.gguf",
        lambda path, _: write_head(path),
        lambda path, _: read_gguf(path),
        right_gguf,
    ),
    "whole gguf": Reader(
        600,
        "tiny.gguf",
        lambda path, _: write_gguf(path),
        lambda path, _: read_parts(path),
        right_parts,
    ),
    "parts of gguf": Reader(
        400,
        "tiny-00001-of-00003.gguf",
        lambda path, _: write_parts(path),
        lambda path, _: read_parts(path),
        right_parts,
    ),
}


# The cases --------------------------------------------------------------------------------------


class Hang(BaseException):
    """Not an ``Exception``, so that no reader takes it for damage."""


@contextmanager
def limited():
    """Little time and memory."""

    def ring(*_: Any) -> None:
        raise Hang(f"took more than {SECONDS} s")

    with Path("/proc/self/statm").open() as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, ring), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + GIGABYTES * 2**30, before[1][1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before[0])
        resource.setrlimit(resource.RLIMIT_AS, before[1])


def complaint(reader: Reader, path: Path, content: bytes, whole: Any, sample: Sample) -> str | None:
    """What is wrong with how damaged bytes are read, if anything."""
    try:
        with limited():
            found = reader.read(path, sample)
    except reader.errors as error:
        text = str(error)
        if type(error) not in reader.errors:
            return f"raises {error!r}"
        if path.parent.name not in text or "\n" in text or len(text) > 3000:
            return f"says {text[:3000]!r}"
        return None
    except (Exception, Hang) as error:
        return f"raises {error!r}"
    try:
        right = reader.right(content, found, whole)
    except Exception as error:
        return f"reads what cannot be read: {error!r}"
    return None if right else f"reads {found!r}"[:3000]


@pytest.fixture(scope="module")
def sample(tiny):
    model = tiny("gpt2")
    scores = el.score(model, el.decompose(model, progress=False), MIXED, progress=False)
    frozen = el.select(scores, 0.5)
    change = el.activation_change(model, frozen, MIXED)
    return Sample(model, scores, frozen, change, el.evaluate(model, MIXED))


@pytest.fixture(autouse=True)
def _as_users_run_it(monkeypatch, tmp_path):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    monkeypatch.setenv("EIGENLENS_CACHE", str(tmp_path / "cache"))
    disable_progress_bar()


done = dict.fromkeys(READERS, 0)


@pytest.mark.parametrize("name", READERS)
def test_fuzz(name, sample, tmp_path):
    reader = READERS[name]
    path = tmp_path / reader.file
    path.parent.mkdir(parents=True, exist_ok=True)
    reader.write(path, sample)
    whole = path.read_bytes()
    undamaged = reader.read(path, sample)
    assert reader.right(whole, undamaged, undamaged)
    seeds = [int(os.environ["FUZZ_SEED"])] if "FUZZ_SEED" in os.environ else range(reader.cases)
    failed = []
    for seed in seeds:
        content = damaged(whole, random.Random(f"{name} {seed}"))
        path.unlink(missing_ok=True)  # what was read before may be a view of the old file
        path.write_bytes(content)
        problem = complaint(reader, path, content, undamaged, sample)
        if problem is not None:
            failed.append(f"{name}, FUZZ_SEED={seed}: {problem}")
        done[name] += 1
        if len(failed) == 10:
            break
    assert not failed, "\n".join(failed)


def test_there_are_enough_cases(capsys):
    with capsys.disabled():
        print(f"\n{sum(done.values()):,} damaged files were read by {len(READERS)} readers.")
    assert sum(reader.cases for reader in READERS.values()) >= 10_000
