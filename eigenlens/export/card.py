"""Cards of edited models and of edits: where they come from, what was frozen and measured."""

import json
from pathlib import PurePath

from eigenlens.evaluation import Evaluation
from eigenlens.frozen_set import FrozenSet
from eigenlens.models.known import KNOWN_MODELS


def model_card(
    frozen: FrozenSet, base: str, before: Evaluation | None, after: Evaluation | None
) -> str:
    """The text of ``README.md``, with the metadata that the Hub reads at its top."""
    return f"""---
base_model: {json.dumps(base, ensure_ascii=False)}
library_name: transformers
pipeline_tag: text-generation
tags: [eigenlens, eigenpruning]
---

# {base}, edited

{_what(frozen)}: their directions are taken off the weights and their mean coordinates are in the
biases. transformers loads this folder as any other; eigenlens is not needed.

{_measured(before, after)}
{_origin(frozen)}
"""


def edit_card(frozen: FrozenSet, before: Evaluation | None, after: Evaluation | None) -> str:
    """The text of ``README.md`` beside an edit's file, as :func:`model_card`."""
    base = _published(frozen.provenance.model)
    return f"""---
base_model: {json.dumps(base, ensure_ascii=False)}
library_name: eigenlens
tags: [eigenlens, eigenpruning]
---

# An edit of {base}

{_what(frozen)}. The weights are not in here, and stay as they are:

```python
import eigenlens as el
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({json.dumps(base, ensure_ascii=False)})
with el.attach(model, el.FrozenSet.load("frozen.safetensors")):
    model.generate(...)
```

{_measured(before, after)}
{_origin(frozen)}
"""


def _published(model: str) -> str:
    """The name of a model elsewhere: that on the Hub, and of a folder its last part only."""
    known = KNOWN_MODELS.get(model)
    if known is not None:
        return known.hub or model
    return PurePath(model).name if PurePath(model).is_absolute() else model


def _what(frozen: FrozenSet) -> str:
    task = f" for the task {frozen.provenance.task}" if frozen.provenance.task else ""
    means = "one mean for all positions" if frozen.means.is_shared else "means by position"
    return (
        f"{len(frozen):,} of {frozen.n_candidates:,} components of the weights are "
        f"{frozen.edit}{task}, under {means}"
    )


def _origin(frozen: FrozenSet) -> str:
    provenance = frozen.provenance
    versions = ", ".join(f"{name} {value}" for name, value in provenance.versions.items())
    return f"""- Components: `{frozen.basis}` basis, by matrix {_counts(frozen)}.
- Weights before the edit: fingerprint `{provenance.model_fingerprint}`.
- Versions: {versions}."""


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
