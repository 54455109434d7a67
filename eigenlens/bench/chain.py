"""Time and memory of the whole chain on one model, stage by stage.

Each stage runs in a process of its own (:mod:`eigenlens.bench.stages`), with decompositions in a
cache beside its results: they are cold at first, and a chain that was interrupted goes on with the
matrix it was at.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from eigenlens.bench.stages import STAGES, ChainConfig
from eigenlens.files import read_json, write_json
from eigenlens.provenance import versions

_RESULT = "chain.json"


def chain(config: ChainConfig, out: Path) -> dict[str, Any]:
    """Run every stage that is not done yet.

    Args:
        config: model, data and batches.
        out: folder for scores, edit, decompositions and ``chain.json``.

    Returns:
        ``stages``: what :func:`eigenlens.bench.stages.run_stage` found of each; the configuration,
        threads and versions.

    Raises:
        ValueError: the folder holds a chain with another configuration.
        RuntimeError: a stage fails; what it said stands above, and the chain goes on from it when
            it is run again.
    """
    out.mkdir(parents=True, exist_ok=True)
    said = config.model_dump()
    settings = out / "config.json"
    if settings.is_file() and read_json(settings) != said:
        raise ValueError(f"{out} holds a chain with another configuration: name another folder.")
    write_json(settings, said)
    stages = []
    for name in STAGES:
        file = out / f"{name}.json"
        if not file.is_file():
            _run(name, config, out)
        stages.append(read_json(file))
    found = {
        "config": said,
        "stages": stages,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    write_json(out / _RESULT, found)
    return found


def _run(name: str, config: ChainConfig, out: Path) -> None:
    """One stage in a process of its own."""
    command = [sys.executable, "-m", "eigenlens.bench.stages", name, config.model_dump_json()]
    cache = {"EIGENLENS_CACHE": str(out / "cache")}
    done = subprocess.run([*command, str(out)], env={**os.environ, **cache}, check=False)
    if done.returncode:
        raise RuntimeError(f"The stage {name} ended with {done.returncode}; see what it said.")
