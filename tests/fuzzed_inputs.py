"""Files that come from outside: what is read must be what their bytes say."""

import json
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors
import torch
import yaml
from damage import PlainGguf, plain_jsonl, plain_safetensors
from datasets import Dataset
from fuzzed import Reader
from test_gguf import write_gguf
from test_superglue import CB

import eigenlens as el
from eigenlens.files import FileFormatError
from eigenlens.models import gguf_files
from eigenlens.models.gguf_head import read_head
from eigenlens.models.peft_adapters import base_name
from eigenlens.models.weight_files import check_folder
from eigenlens.paper.studies.config import CONFIGS, StudyConfig
from eigenlens.tasks.jsonl import jsonl
from eigenlens.tasks.rows import DataError
from eigenlens.tasks.superglue import cb
from eigenlens.tasks.text import text_examples

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


INPUTS = {
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
