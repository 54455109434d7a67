"""From a frozen set to an eigenpruning adapter: in memory, or as a folder."""

import os

import peft
from torch import Tensor
from transformers import PreTrainedModel

from eigenlens.export.low_rank import low_rank_changes
from eigenlens.export.refusals import check_export, check_not_base, check_not_empty
from eigenlens.frozen_set import FrozenSet
from eigenlens.models.peft_adapters import write_adapter
from eigenlens.peft.config import EigenpruneAdapterConfig
from eigenlens.peft.model import hashed_weight
from eigenlens.peft.tensors import named_tensors
from eigenlens.provenance import rounded_hashes

_CARD = """---
base_model: {base}
library_name: peft
tags: [eigenlens, eigenpruning]
---

{n:,} of {candidates:,} components {edit}. Load it with peft after importing the method:

```python
import eigenlens.peft
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, folder)
```
"""


def to_peft(
    model: PreTrainedModel,
    frozen: FrozenSet,
    folder: str | os.PathLike[str],
    *,
    allow_dtype: bool = False,
) -> None:
    """Write an eigenpruning adapter, with means by position or shared ones.

    ``PeftModel.from_pretrained(base, folder)`` loads it after ``import eigenlens.peft``, without a
    decomposition.

    Args:
        model: the plain transformers model that ``frozen`` was made for.
        frozen: components, strengths and mean coordinates.
        folder: where ``adapter_config.json``, ``adapter_model.safetensors`` and a card go.
        allow_dtype: as for :func:`eigenlens.freeze`.

    Raises:
        WrongModelError, UnsupportedModelError: as :func:`eigenlens.attach`.
        ValueError: as :func:`eigenlens.bake`.
    """
    out = check_export(frozen, "peft", folder)
    check_not_base(model, out)
    config, tensors = _adapter(model, frozen, allow_dtype)
    card = _CARD.format(
        base=model.name_or_path, n=len(frozen), candidates=frozen.n_candidates, edit=frozen.edit
    )
    write_adapter(config, tensors, out, card)


def get_eigenpruned_model(
    model: PreTrainedModel,
    frozen: FrozenSet,
    adapter_name: str = "default",
    *,
    allow_dtype: bool = False,
) -> peft.PeftModel:
    """A ``PeftModel`` around ``model`` with the edit as its adapter.

    Raises:
        WrongModelError, UnsupportedModelError: as :func:`eigenlens.attach`.
        ValueError: as :func:`eigenlens.attach`, or nothing is frozen.
    """
    config, tensors = _adapter(model, frozen, allow_dtype)
    wrapped = peft.get_peft_model(model, config, adapter_name)
    peft.set_peft_model_state_dict(wrapped, tensors, adapter_name)
    return wrapped.eval()


def _adapter(
    model: PreTrainedModel, frozen: FrozenSet, allow_dtype: bool
) -> tuple[EigenpruneAdapterConfig, dict[str, Tensor]]:
    """Configuration and tensors."""
    check_not_empty(frozen)
    changes = low_rank_changes(model, frozen, allow_dtype=allow_dtype)
    rows = frozen.means.positions
    config = EigenpruneAdapterConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.name_or_path,
        target_modules=list(changes),
        shapes={path: [*c.down.shape, c.up.shape[1]] for path, c in changes.items()},
        weights={
            path: rounded_hashes(*hashed_weight(model.get_submodule(path))) for path in changes
        },
        positions=[rows.start, rows.stop, int(rows.bucketed)],
        inference_mode=True,
    )
    return config, named_tensors(changes)
