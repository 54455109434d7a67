"""``bake``: an edit under shared means as a plain transformers folder with edited weights.

The components come off the weights, and their mean goes into biases.
"""

import os

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eigenlens.evaluation import Evaluation
from eigenlens.export.card import model_card
from eigenlens.export.low_rank import low_rank_changes
from eigenlens.export.plain import sharing_copy
from eigenlens.export.refusals import check_export, check_not_base
from eigenlens.export.weights import apply_change, give_biases
from eigenlens.files import write_text
from eigenlens.folders import whole_folder
from eigenlens.frozen_set import FrozenSet


def bake(
    model: PreTrainedModel,
    frozen: FrozenSet,
    folder: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    before: Evaluation | None = None,
    after: Evaluation | None = None,
    allow_dtype: bool = False,
) -> None:
    """Write a model with edited weights, which transformers loads without eigenlens.

    Args:
        model: the plain transformers model that ``frozen`` was made for; it stays as it is.
        frozen: components with shared means.
        folder: where weights, configuration and model card go.
        tokenizer: written there, too; refused unless its tokens are those that ``frozen`` was made
            with.
        before: what the model card says of the model without the edit.
        after: what the model card says of the edited model.
        allow_dtype: as for :func:`eigenlens.freeze`; the folder has the type of ``model``.

    Raises:
        PositionBiasError: means by position.
        UnsupportedModelError: a map needs a bias and the architecture has none.
        WrongModelError: as :func:`eigenlens.attach`.
        ValueError: as :func:`eigenlens.attach`; nothing is frozen; the folder is a file, or that of
            ``model``.
    """
    out = check_export(frozen, "bake", folder)
    check_not_base(model, out)
    if tokenizer is not None:
        frozen.check_tokenizer(tokenizer)
    baked = baked_model(model, frozen, allow_dtype=allow_dtype)
    base = model.name_or_path or type(model).__name__
    with whole_folder(out, "config.json", "model*.safetensors*") as new:
        baked.save_pretrained(new)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        write_text(new / "README.md", model_card(frozen, base, before, after))


def baked_model(
    model: PreTrainedModel, frozen: FrozenSet, *, allow_dtype: bool = False
) -> PreTrainedModel:
    """A model with edited weights, which shares all others with ``model``.

    Raises:
        UnsupportedModelError: a map needs a bias and the architecture has none.
        WrongModelError, ValueError: as :func:`eigenlens.attach`.
    """
    changes = low_rank_changes(model, frozen, allow_dtype=allow_dtype)
    baked = sharing_copy(model)
    give_biases(baked, (path for path, change in changes.items() if change.bias.any()))
    for path, change in changes.items():
        apply_change(baked.get_submodule(path), change)
    return baked
