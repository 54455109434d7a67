"""What public functions take, and one sentence on what to pass instead of what they do not."""

import os
from collections.abc import Mapping

import pandas as pd
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eigenlens.bridges import TransformerBridge

_TEXTS = ("string", "large_string", "string_view")


def check_model(model: object) -> None:
    """Raise ``ValueError`` for what is no ``TransformerBridge``."""
    if isinstance(model, TransformerBridge):
        return
    if isinstance(model, PreTrainedModel):
        advice = "eigenlens.load_model(model, tokenizer)"
    elif isinstance(model, str | os.PathLike):
        advice = f"eigenlens.load_model({os.fspath(model)!r})"
    else:
        advice = "what eigenlens.load_model returns"
    raise ValueError(f"The model is a {_kind(model)} and no TransformerBridge: pass {advice}.")


def tokenizer_of(model: TransformerBridge) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ValueError: it has none.
    """
    if model.tokenizer is None:
        raise ValueError("The model has no tokenizer: set model.tokenizer.")
    return model.tokenizer


def check_tokenizer(tokenizer: object) -> None:
    """Raise ``ValueError`` for what is no tokenizer of transformers, such as a model."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"The tokenizer is a {_kind(tokenizer)}: pass the model's, such as model.tokenizer."
        )


def check_data(data: object) -> None:
    """Raise ``ValueError`` for what is no ``Dataset`` with texts as ``prompt`` and ``answer``."""
    if not isinstance(data, Dataset):
        raise ValueError(
            f"The data are a {_kind(data)} and no datasets.Dataset: pass {_instead(data)}."
        )
    for name in ("prompt", "answer"):
        if name not in data.column_names:
            there = ", ".join(map(repr, data.column_names)) or "no columns"
            raise ValueError(
                f"The data lack the column {name!r} (there are {there}): name yours so, "
                f"data.rename_column(old, {name!r})."
            )
        kind = getattr(data.features[name], "dtype", "list")
        if len(data) and kind not in _TEXTS:
            raise ValueError(
                f"The column {name!r} holds {kind} and no texts: "
                f"data.cast_column({name!r}, datasets.Value('string')) makes texts of numbers."
            )


def _instead(data: object) -> str:
    if isinstance(data, DatasetDict):
        return f"one of its splits, such as data[{next(iter(data), 'train')!r}]"
    if isinstance(getattr(data, "train", None), Dataset):
        return "one of its splits, such as task.train"
    if isinstance(data, pd.DataFrame):
        return "datasets.Dataset.from_pandas(data)"
    if isinstance(data, IterableDataset):
        return "datasets.Dataset.from_list(list(data))"
    if isinstance(data, list | tuple):
        return "datasets.Dataset.from_list(data), of rows {'prompt': …, 'answer': …}"
    if isinstance(data, Mapping):
        return "datasets.Dataset.from_dict(data), of columns 'prompt' and 'answer'"
    if isinstance(data, str | os.PathLike):
        return f"eigenlens.load_task('jsonl', path={os.fspath(data)!r}).test, or another split"
    return "one with the columns 'prompt' and 'answer', such as task.test"


def _kind(value: object) -> str:
    return type(value).__name__
