"""From prompts and answers to the padded batches that models read.

Prompts are padded on the left and answers on the right, so that one column of a batch is one
position counted from the end of the prompt: …, −2, −1 for prompt tokens and 0, 1, … for answer
tokens. The last answer token is predicted, not read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from eigenlens.bridges import TransformerBridge
from eigenlens.inputs import check_data, check_model, tokenizer_of
from eigenlens.tasks.tokenising import Encoded, tokenise

_PADDING = 0  # masked: any token of the vocabulary will do


@dataclass(frozen=True)
class Batch:
    """Examples that go through the model together.

    Attributes:
        tokens: what the model reads; columns ``n_prompt - 1`` and later predict the answer.
        attention_mask: true where a token is really there.
        answer: the answer tokens to predict.
        answer_mask: true where the answer has a token.
        n_prompt: columns that belong to the prompt.
        indices: row of each example in the data set.
        is_padded: whether any column is padding in any row.
    """

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Bool[Tensor, "batch pos"]
    answer: Int[Tensor, "batch answer"]
    answer_mask: Bool[Tensor, "batch answer"]
    n_prompt: int
    indices: list[int]
    is_padded: bool

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def positions(self) -> range:
        """Position of each column, counted from the end of the prompt."""
        return range(-self.n_prompt, self.tokens.shape[1] - self.n_prompt)

    def split(self, size: int) -> "list[Batch]":
        """The same examples, padded alike, in batches of at most ``size``."""
        names = ("tokens", "attention_mask", "answer", "answer_mask", "indices")
        parts = [slice(start, start + size) for start in range(0, len(self), size)]
        return [replace(self, **{n: getattr(self, n)[part] for n in names}) for part in parts]

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        names = ("tokens", "attention_mask", "answer", "answer_mask")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def make_batches(
    data: Dataset,
    model: TransformerBridge,
    batch_size: int,
    *,
    smallest: int = 1,
    rows: Sequence[int] | None = None,
) -> list[Batch]:
    """Tokenise ``data`` for ``model`` and cut it into batches of similar length.

    Where padding would change what a model computes (``model.cfg.neutral_padding``), the examples
    of a batch have one length.

    Args:
        data: columns ``prompt`` and ``answer``.
        model: gives tokenizer, context length, device and whether a beginning-of-sequence token
            is prepended (``model.cfg.default_prepend_bos``).
        batch_size: most examples in a batch.
        smallest: fewest examples in a batch; batches grow a little where needed.
        rows: numbers of the examples in messages; by default their places in ``data``.

    Raises:
        ValueError: no ``Dataset`` of prompts and answers, no ``TransformerBridge``, or one without
            a tokenizer; ``batch_size`` below ``smallest``, no or fewer than ``smallest`` examples;
            a length that fewer than ``smallest`` have, where each needs its own batch; an example
            that does not tokenise, is longer than the model's context, or has a token
            that the model does not.
    """
    check_model(model)
    check_data(data)
    if len(data) == 0:
        raise ValueError("The data set is empty.")
    if batch_size < max(1, smallest) or len(data) < smallest:
        raise ValueError(
            f"batch_size={batch_size} with {len(data)} examples: "
            f"batches of at least {max(1, smallest)} are needed here."
        )
    tokenizer, n_rows = tokenizer_of(model), len(model.W_E)
    bos = bool(model.cfg.default_prepend_bos)
    encoded = tokenise(data, tokenizer, prepend_bos=bos, rows=rows)
    for row, example in enumerate(encoded) if rows is None else zip(rows, encoded, strict=True):
        _check_context(row, example, model.cfg.n_ctx)
        _check_vocabulary(row, example, n_rows, tokenizer)
    return [
        _collate(encoded, chunk).to(model.cfg.device)
        for group in _groups(encoded, bool(getattr(model.cfg, "neutral_padding", True)), smallest)
        for chunk in _chunks(group, batch_size, smallest)
    ]


def _check_context(row: int, example: Encoded, n_ctx: int) -> None:
    if example.n_read > n_ctx:
        raise ValueError(
            f"Example {row} has {example.n_read} tokens to read (prompt and answer without its "
            f"last one), but the model's context holds {n_ctx}."
        )


def _check_vocabulary(
    row: int, example: Encoded, n_rows: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    token = max(example.prompt + example.answer)
    if token >= n_rows:
        name = tokenizer.convert_ids_to_tokens(token)
        raise ValueError(
            f"Example {row} has the token {name!r} of id {token}, but the model's embedding has "
            f"{n_rows} rows: this tokenizer is not the model's, or has tokens added."
        )


def _groups(encoded: Sequence[Encoded], padded: bool, smallest: int) -> Iterator[list[int]]:
    """Rows by length: all together, or each length apart."""

    def lengths(row: int) -> tuple[int, int]:
        return len(encoded[row].prompt), len(encoded[row].answer)

    order = sorted(range(len(encoded)), key=lengths)
    if padded:
        yield order
        return
    for length, rows in groupby(order, lengths):
        group = list(rows)
        if len(group) < smallest:
            raise ValueError(
                f"Padding changes what this model computes, and {len(group)} examples have "
                f"{length[0]} and {length[1]} tokens: batches of at least {smallest} are needed."
            )
        yield group


def _chunks(order: list[int], batch_size: int, smallest: int) -> Iterator[list[int]]:
    n_batches = min(-(-len(order) // batch_size), len(order) // smallest)
    return (chunk.tolist() for chunk in np.array_split(order, n_batches))


def _collate(encoded: Sequence[Encoded], rows: list[int]) -> Batch:
    n_prompt = max(len(encoded[row].prompt) for row in rows)
    n_answer = max(len(encoded[row].answer) for row in rows)
    tokens = torch.full((len(rows), n_prompt + n_answer - 1), _PADDING)
    answer = torch.full((len(rows), n_answer), _PADDING)
    for line, row in enumerate(rows):
        prompt, reply = encoded[row].prompt, encoded[row].answer
        first, last = n_prompt - len(prompt), n_prompt + len(reply) - 1
        tokens[line, first:last] = torch.tensor(prompt + reply[:-1])
        answer[line, : len(reply)] = torch.tensor(reply)
    lengths = torch.tensor([[len(encoded[r].prompt), len(encoded[r].answer)] for r in rows])
    column = torch.arange(-n_prompt, n_answer - 1)
    there = (column >= -lengths[:, :1]) & (column < lengths[:, 1:] - 1)
    return Batch(
        tokens=tokens,
        attention_mask=there,
        answer=answer,
        answer_mask=torch.arange(n_answer) < lengths[:, 1:],
        n_prompt=n_prompt,
        indices=list(rows),
        is_padded=not bool(there.all()),
    )
