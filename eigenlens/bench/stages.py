"""The stages of the whole chain on a model in a folder, each fit to run in a process of its own.

What a stage needs of those before it, it reads from the disk: decompositions from the cache, scores
and the edit from the folder of the bench. So every peak is that of one stage, and one that was
killed is all that has to be done again.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.bench import resident
from eigenlens.costs import now
from eigenlens.decomposition import decompose
from eigenlens.evaluation import evaluate
from eigenlens.files import write_json
from eigenlens.freezing import freeze
from eigenlens.frozen_set import FrozenSet
from eigenlens.models import load_model
from eigenlens.scoring import Scores, score
from eigenlens.search import LearnedConfig, learned
from eigenlens.selection import select
from eigenlens.tasks import Task, load_task, make_batches
from eigenlens.tasks.task import to_dataset

FRACTION = 0.01  # of the components, frozen
_SCORES, _FROZEN = "scores.parquet", "frozen.safetensors"


class ChainConfig(BaseModel):
    """What the chain is run with.

    Attributes:
        model: folder of the model.
        dtype: of its weights.
        device: where it runs (default: as :func:`eigenlens.load_model`).
        examples: scored.
        tokens: at least so many in a prompt; ``None``: a single addition.
        batch_size: examples per pass.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    dtype: str = "float32"
    device: str | None = None
    examples: int = Field(default=50, ge=1)
    tokens: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=10, ge=1)


def additions(model: TransformerBridge, examples: int, tokens: int | None = None) -> Task:
    """Additions to score, and ten each to validate and to test on.

    With ``tokens`` every prompt begins with as many solved additions as make it so long.
    """
    others = {"n_validation": 10, "n_test": 10}
    task = load_task("int_add", model.tokenizer, low=10, high=40, n_train=examples, **others)
    if tokens is None:
        return task
    solved = [f"{row['prompt']}{row['answer']}\n" for row in task.validation]
    assert model.tokenizer is not None

    def longer(prompt: str) -> str:
        before = ""
        while len(model.tokenizer(before + prompt).input_ids) < tokens:
            before += solved[before.count("\n") % len(solved)]
        return before + prompt

    train, validation, test = (
        to_dataset([{"prompt": longer(r["prompt"]), "answer": r["answer"]} for r in split])
        for split in (task.train, task.validation, task.test)
    )
    return Task(task.name, train, validation, test, task.arguments)


class Stage:
    """A loaded model, and what the stages do with it."""

    def __init__(self, config: ChainConfig, out: Path) -> None:
        self.config = config
        self.out = out
        self.model = load_model(config.model, dtype=config.dtype, device=config.device)
        self.task = additions(self.model, config.examples, config.tokens)
        self._options: dict[str, Any] = {"batch_size": config.batch_size}

    def decompose(self) -> dict[str, Any]:
        """All matrices, into the cache; what an interrupted process left there is read."""
        return {"components": decompose(self.model).n_components}

    def score(self) -> dict[str, Any]:
        """As a run does by default: by ``margin``, with one mean for all positions."""
        start = now()
        spectra = decompose(self.model)
        read = now() - start
        scores = score(
            self.model,
            spectra,
            self.task.train,
            criterion="margin",
            reference="shared",
            **self._options,
        )
        scores.save(self.out / _SCORES)
        batches = make_batches(self.task.train, self.model, self.config.batch_size)
        tokens = sum(batch.tokens.numel() for batch in batches)
        return {"seconds_reading_bases": read, "tokens": tokens}

    def freeze(self) -> dict[str, Any]:
        """Select, write the edit, and put it on."""
        frozen = select(self._scores(), FRACTION)
        frozen.save(self.out / _FROZEN, directions=True)
        with freeze(self.model, frozen):
            return {"frozen": len(frozen)}

    def learned(self) -> dict[str, Any]:
        """One step of training gates, and a look at validation before and after it."""
        config = LearnedConfig(steps=1, every=1, **self._options)
        splits = self.task.train, self.task.validation
        trace = learned(self.model, self._scores(), *splits, config).trace
        return {"validation_loss": trace["validation_loss"].tolist()}

    def evaluate(self) -> dict[str, Any]:
        """The test split under the edit."""
        frozen = FrozenSet.load(self.out / _FROZEN, self.model)
        with freeze(self.model, frozen):
            return {"loss": evaluate(self.model, self.task.test, **self._options).loss}

    def _scores(self) -> Scores:
        return Scores.load(self.out / _SCORES).on(self.model)


STAGES: dict[str, Callable[[Stage], dict[str, Any]]] = {
    "decompose": Stage.decompose,
    "score": Stage.score,
    "freeze": Stage.freeze,
    "learned": Stage.learned,
    "evaluate": Stage.evaluate,
}


def run_stage(name: str, config: ChainConfig, out: Path) -> dict[str, Any]:
    """Load the model and run one stage of it.

    Returns:
        ``seconds`` and ``seconds_loading``; in bytes the process before anything is loaded
        (``python``), after it (``loaded``), the highest while loading (``peak_loading``), in the
        stage (``peak``) and of tensors on GPUs (``peak_devices``); and what the stage says.
    """
    python = resident.forget_peak()
    start = now()
    stage = Stage(config, out)
    seconds_loading, peak_loading = now() - start, resident.peak()
    loaded = resident.forget_peak()
    start = now()
    found = STAGES[name](stage)
    return {
        "stage": name,
        "seconds": now() - start,
        "seconds_loading": seconds_loading,
        "python": python,
        "loaded": loaded,
        "peak_loading": peak_loading,
        "peak": resident.peak(),
        "peak_devices": resident.device_peak(),
        **found,
    }


if __name__ == "__main__":
    name, said, out = sys.argv[1:]
    found = run_stage(name, ChainConfig(**json.loads(said)), Path(out))
    write_json(Path(out) / f"{name}.json", found)
