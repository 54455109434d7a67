"""The model card of an edited model: where it comes from, what was frozen, what was measured."""

import json

from eigenlens.evaluation import Evaluation
from eigenlens.frozen_set import FrozenSet


def model_card(
    frozen: FrozenSet, base: str, before: Evaluation | None, after: Evaluation | None
) -> str:
    """The text of ``README.md``, with the metadata that the Hub reads at its top."""
    provenance = frozen.provenance
    task = f" for the task {provenance.task}" if provenance.task else ""
    return f"""---
base_model: {json.dumps(base, ensure_ascii=False)}
library_name: transformers
pipeline_tag: text-generation
tags: [eigenlens, eigenpruning]
---

# {base}, edited

{len(frozen):,} of {frozen.n_candidates:,} components of the weights are {frozen.edit}{task}, under
one mean for all positions: their directions are taken off the weights and their mean coordinates
are in the biases. transformers loads this folder as any other; eigenlens is not needed.

{_measured(before, after)}
- Components: `{frozen.basis}` basis, by matrix {_counts(frozen)}.
- Weights before the edit: fingerprint `{provenance.model_fingerprint}`.
- Versions: {", ".join(f"{name} {value}" for name, value in provenance.versions.items())}.
"""


def _counts(frozen: FrozenSet) -> str:
    counts = frozen.components["matrix"].value_counts(sort=False)
    return ", ".join(f"{kind} {n:,}" for kind, n in counts.items()) or "none"


def _measured(before: Evaluation | None, after: Evaluation | None) -> str:
    """A table of what was measured."""
    named = {"before": before, "after": after}
    rows = [
        f"| {name} | {e.accuracy:.1%} ({e.interval[0]:.1%} … {e.interval[1]:.1%}) "
        f"| {_share(e.choice_accuracy)} | {e.loss:.3f} | {e.n} |"
        for name, e in named.items()
        if e is not None
    ]
    if not rows:
        return "The edit was not evaluated.\n"
    head = [
        "| | accuracy (95 % interval) | choice accuracy | loss (nats) | examples |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*head, *rows]) + "\n"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
