"""Clean and corrupt prompts: the counterpart of each example, token by token.

The column ``corrupt`` holds, for each prompt, another one of as many tokens whose answer differs.
A counterpart is read with the answer of its example behind it, so that every position of the one
has its position in the other.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from datasets import Dataset

from eigenlens.bridges import TransformerBridge
from eigenlens.inputs import tokenizer_of
from eigenlens.tasks.batches import Batch
from eigenlens.tasks.tokenising import Encoded, tokenise


def paired(batches: Sequence[Batch], data: Dataset, model: TransformerBridge) -> list[Batch]:
    """The batches with the prompts of the counterparts, and the answers as they are.

    Args:
        batches: of all examples of ``data``.
        data: columns ``prompt``, ``answer`` and ``corrupt``.
        model: gives the tokenizer.

    Raises:
        ValueError: there is no column ``corrupt``; an example without counterpart, or whose
            counterpart is the prompt itself or of another number of tokens.
    """
    if "corrupt" not in data.column_names:
        raise ValueError(
            "reference='pair' patches in the counterpart of each example, and these data have "
            "none: add a column 'corrupt' with a prompt of as many tokens for each."
        )
    corrupt = list(data["corrupt"][:])
    for row, (own, other) in enumerate(zip(data["prompt"][:], corrupt, strict=True)):
        if not other or other == own:
            raise ValueError(
                f"Example {row}, {own!r}, has no counterpart of its own ('corrupt' is {other!r}): "
                "give it another prompt of as many tokens, or leave it out."
            )
    texts = {"prompt": corrupt, "answer": list(data["answer"][:])}
    bos = bool(model.cfg.default_prepend_bos)
    encoded = tokenise(Dataset.from_dict(texts), tokenizer_of(model), prepend_bos=bos)
    return [_counterpart(batch, encoded, data) for batch in batches]


def _counterpart(batch: Batch, encoded: Sequence[Encoded], data: Dataset) -> Batch:
    tokens = batch.tokens.clone()
    lengths = batch.attention_mask[:, : batch.n_prompt].sum(1).tolist()
    for line, (row, length) in enumerate(zip(batch.indices, lengths, strict=True)):
        prompt = encoded[row].prompt
        if len(prompt) != length:
            raise ValueError(
                f"Example {row}: the prompt {data[row]['prompt']!r} has {length} tokens and its "
                f"counterpart {data[row]['corrupt']!r} {len(prompt)}: a pair needs as many tokens "
                "on both sides."
            )
        tokens[line, batch.n_prompt - length : batch.n_prompt] = torch.tensor(
            prompt, device=tokens.device
        )
    return replace(batch, tokens=tokens)
