"""What a run found, and a finished run read back from its folder."""

import html
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eigenlens.config import EigenpruneConfig
from eigenlens.evaluation import Comparison, Evaluation, compare
from eigenlens.files import load_record
from eigenlens.frozen_set import FrozenSet
from eigenlens.provenance import versions
from eigenlens.scoring import Scores
from eigenlens.search import SearchResult

_FINISHED = (
    "config.yaml",
    "before.parquet",
    "scores.parquet",
    "frozen.safetensors",
    "trace.parquet",
    "protected.parquet",
    "after.parquet",
    "metrics.json",
)


@dataclass(frozen=True)
class EigenpruneResult:
    """What a run found.

    Attributes:
        config: what it was run with.
        before, after: test split, unedited and frozen.
        comparison: the two, paired.
        scores: of every component on the train split.
        search: the components that were frozen, the trace of the search, and what it spared.
        seconds: per stage.
        left_out: what ``skip_unsupported`` left out of the decomposition, in sentences.
    """

    config: EigenpruneConfig
    before: Evaluation
    after: Evaluation
    comparison: Comparison
    scores: Scores
    search: SearchResult
    seconds: dict[str, float] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    @property
    def frozen(self) -> FrozenSet:
        """The components that were frozen or attenuated."""
        return self.search.frozen

    def metrics(self) -> dict[str, Any]:
        """The content of ``metrics.json``."""
        source = self.scores.provenance
        return {
            "before": self.before.summary(),
            "after": self.after.summary(),
            "comparison": self.comparison.summary(),
            "frozen": {
                "components": len(self.frozen),
                "of": self.frozen.n_candidates,
                "fraction": self.frozen.fraction,
            },
            "search": {
                "method": self.search.method,
                "chosen": self.search.trace[self.search.trace["chosen"]].to_dict("records")[0],
                "protected": self.search.protected.to_dict("records"),
            },
            "left_out": list(self.left_out),
            "seed": self.config.seed,
            "fingerprints": {
                "model": source.model_fingerprint,
                "train": source.task_hash,
                "test": self.before.provenance.task_hash,
            },
            "versions": versions(),
            "seconds": self.seconds,
        }

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{name}</td><td>{e.accuracy:.1%}</td><td>{e.interval[0]:.1%} … "
            f"{e.interval[1]:.1%}</td><td>{e.loss:.3f}</td></tr>"
            for name, e in (("before", self.before), ("after", self.after))
        )
        return (
            f"<p>{html.escape(f'{self.config.task} on {self.config.model}')}: "
            f"{len(self.frozen):,} of {self.frozen.n_candidates:,} components {self.frozen.edit} "
            f"({self.frozen.fraction:.2%}); "
            f"{self.before.n} test examples, McNemar p = {self.comparison.p_value:.2g}</p>"
            "<table><tr><th></th><th>accuracy</th><th>95 % interval</th>"
            f"<th>loss (nats)</th></tr>{rows}</table>"
            + "".join(f"<p>{html.escape(line)}</p>" for line in self.left_out)
        )


def load_run(folder: str | os.PathLike[str]) -> tuple[EigenpruneResult, dict[str, Any]]:
    """A finished run, and the content of its ``metrics.json`` (versions, seconds, fingerprints).

    Raises:
        FileNotFoundError: the folder holds no finished run; the message says how to get one.
        FileFormatError: a file is truncated or foreign.
    """
    folder = Path(folder)
    missing = [name for name in _FINISHED if not (folder / name).is_file()]
    if "config.yaml" in missing:
        raise FileNotFoundError(
            f"{folder} is no run folder: it holds no config.yaml. `eigenlens run --out {folder}` "
            "makes a run there."
        )
    if missing:
        raise FileNotFoundError(
            f"The run in {folder} is not finished: {', '.join(missing)} is not there. "
            f"`eigenlens run --config {folder / 'config.yaml'} --out {folder}` goes on with it."
        )
    config = EigenpruneConfig.from_yaml(folder / "config.yaml")
    before = Evaluation.load(folder / "before.parquet")
    after = Evaluation.load(folder / "after.parquet")
    metrics = load_record(folder / "metrics.json", "metrics")
    result = EigenpruneResult(
        config,
        before,
        after,
        compare(before, after, seed=config.seed),
        Scores.load(folder / "scores.parquet"),
        SearchResult.load(folder),
        metrics["seconds"],
        tuple(metrics["left_out"]),
    )
    return result, metrics
