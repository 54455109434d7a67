"""How time and memory of the chain grow with a model and its data.

A GPT-2 of random weights is made longer in one measure at a time: width, layers, tokens of a
prompt, examples. The slope of a straight line through logarithms is the power that a stage grows
with over these sizes; what it takes at any size, such as a pass over a vocabulary, flattens it.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from transformers import GPT2Config

from eigenlens.bench.chain import chain
from eigenlens.bench.making import make_model
from eigenlens.bench.stages import STAGES, ChainConfig
from eigenlens.files import write_json

SIZES = {
    "width": (512, 768, 1024, 1536),
    "layers": (4, 8, 16, 32),
    "tokens": (32, 64, 128, 256),
    "examples": (40, 80, 160, 320),
}
_HEAD = 64  # width of a head, as in GPT-2
_VOCABULARY = 1024


def growth(
    out: Path, sizes: Mapping[str, Sequence[int]] = SIZES, *, batch_size: int = 10, seed: int = 0
) -> pd.DataFrame:
    """Run the chain at every size and fit the powers; what is done already is read.

    Args:
        out: folder for models, chains and ``growth.json``, with all sizes and powers.
        sizes: of every measure, from the smallest, which the others are held at.
        batch_size: examples per pass.
        seed: of the weights.

    Returns:
        Columns ``stage``, ``measure``, ``of`` (``seconds``, or ``bytes`` above the loaded model at
        the highest moment), ``power`` and the 95 % interval of the slope, ``low``, ``high``.

    Raises:
        RuntimeError: a stage of a chain fails; the next call goes on there.
    """
    rows = []
    for measure, size, at in _one_at_a_time(sizes):
        for stage in _chain(out, at, batch_size, seed)["stages"]:
            found = {"seconds": stage["seconds"], "bytes": stage["peak"] - stage["loaded"]}
            rows.append({"stage": stage["stage"], "measure": measure, "size": size, **found})
    table = pd.DataFrame(rows)
    powers = pd.DataFrame(
        {"stage": stage, "measure": measure, "of": of, **fitted_power(group["size"], group[of])}
        for stage in STAGES
        for measure, group in table[table["stage"] == stage].groupby("measure", sort=False)
        for of in ("seconds", "bytes")
    )
    write_json(
        out / "growth.json", {"sizes": table.to_dict("list"), "powers": powers.to_dict("list")}
    )
    return powers


def fitted_power(size: Any, value: Any) -> dict[str, float]:
    """Power p of ``value ~ size ** p`` by least squares of logarithms, with its 95 % interval.

    All are NaN where a value is not positive.
    """
    logs = np.log(np.where(np.asarray(value) > 0, value, np.nan))
    line = stats.linregress(np.log(size), logs)
    half = stats.t.ppf(0.975, len(size) - 2) * line.stderr
    return {"power": line.slope, "low": line.slope - half, "high": line.slope + half}


def _one_at_a_time(
    sizes: Mapping[str, Sequence[int]],
) -> Iterator[tuple[str, int, dict[str, int]]]:
    smallest = {measure: values[0] for measure, values in sizes.items()}
    for measure, values in sizes.items():
        for size in values:
            yield measure, size, smallest | {measure: size}


def _chain(out: Path, at: dict[str, int], batch_size: int, seed: int) -> dict[str, Any]:
    folder = out / f"{at['width']}x{at['layers']}"
    model = GPT2Config(
        vocab_size=_VOCABULARY,
        n_embd=at["width"],
        n_layer=at["layers"],
        n_head=at["width"] // _HEAD,
        bos_token_id=None,
        eos_token_id=None,
    )
    make_model(model, folder / "model", seed=seed, progress=False)
    size: dict[str, Any] = {"examples": at["examples"], "tokens": at["tokens"]}
    config = ChainConfig(model=str(folder / "model"), batch_size=batch_size, **size)
    return chain(config, folder / "chain-{tokens}-{examples}".format_map(at))
