"""Files that eigenlens writes: what is read must be what was written."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fuzzed import Reader, Sample, unchanged
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
)
from eigenlens.paper.studies.parts import Parts
from eigenlens.provenance import Provenance
from eigenlens.search.result import Checkpoint, SearchResult

PROVENANCE = Provenance(model="m", model_fingerprint="f", versions={"python": "3"})
TABLE = pd.DataFrame(
    {"node": ["a", "b", None], "effect": [0.25, np.nan, -3.5], "layer": [0, 1, 2], "on": [1, 0, 1]}
).astype({"on": bool})


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


RESULTS = {
    "part of a study": Reader(
        300,
        "m_t.json",
        lambda path, _: save_record(path, "part", {"rows": [{"loss": 0.5, "label": "frozen"}]}),
        lambda path, _: Parts(path.parent).do("m_t", lambda: [{"loss": 0.5, "label": "frozen"}]),
        unchanged,
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
}
