"""Edited models in lm-evaluation-harness, as its model ``eigenlens``.

The harness finds models by names that modules register, and has no hook for those of other
packages. So its own command line starts from here:

    python -m eigenlens.lm_eval --model eigenlens --model_args edit=frozen.safetensors --tasks …

and in Python, ``lm_eval.simple_evaluate(model="eigenlens", …)`` knows it after
``import eigenlens.lm_eval``.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from jaxtyping import Int
from torch import Tensor

from eigenlens.cli_output import clear_errors
from eigenlens.errors import MissingPackageError
from eigenlens.export.attach import attach
from eigenlens.frozen_set import FrozenSet
from eigenlens.models.known import resolve
from eigenlens.positions import prompt_ends_at

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as error:
    raise MissingPackageError(
        "eigenlens.lm_eval needs lm-evaluation-harness: pip install 'eigenlens[lm-eval]'"
    ) from error

Request = tuple[Any, list[int], list[int]]  # texts, and the tokens of context and continuation


@register_model("eigenlens")
class EigenlensLM(HFLM):
    """The harness' transformers model with an edit, which is told where each prompt ends.

    A prompt is what the harness calls context: of a multiple choice all before the answer, of a
    rolling log-likelihood the token that a window of text begins behind.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        edit: str | None = None,
        *,
        shared: bool = False,
        allow_dtype: bool = False,
        dtype: str | None = None,
        **options: Any,
    ) -> None:
        """Load a model and attach an edit.

        Args:
            pretrained: short name, folder, GGUF file or Hub name (default: the edit's own model).
            edit: ``frozen.safetensors``; without it, the model is measured as it is.
            shared: one mean for all positions in place of one for each.
            allow_dtype: use the edit on the same weights in another dtype.
            dtype: of the weights (default: what the edit was made in, else the checkpoint's own).
            options: of the harness' model ``hf``.

        Raises:
            WrongModelError: the edit belongs to other weights or another tokenizer.
            FileNotFoundError, FileFormatError: there is no such edit, or it is damaged.
            ValueError: neither a model nor an edit.
        """
        frozen = None if edit is None else FrozenSet.load(Path(edit).expanduser())
        made = frozen and frozen.provenance
        name = pretrained or (made and made.model)
        if not name:
            raise ValueError("Give --model_args pretrained=MODEL, edit=FILE or both.")
        kind = dtype or (made and made.dtype) or "auto"
        super().__init__(resolve(name), dtype=kind, **options)
        self.logits_cache = True  # a pass has a row for all requests that read the same
        if frozen is not None:
            frozen.check_tokenizer(self.tokenizer)
            own = frozen.shared() if shared else frozen
            attach(self.model, own, allow_dtype=allow_dtype)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """The harness' own, a batch at a time, so that the rows of each pass are known."""
        order = sorted(range(len(requests)), key=lambda row: _longest_first(requests[row]))
        size = override_bs or self.batch_size
        if size == "auto":
            size = self._detect_batch_size([requests[order[0]]])
        found: dict[int, tuple[float, bool]] = {}
        for rows in _batches(requests, order, size):
            batch = [requests[row] for row in rows]
            with prompt_ends_at(self.model, self._prompt_ends(batch)):
                answers = super()._loglikelihood_tokens(batch, True, len(batch))
            found |= zip(rows, answers, strict=True)
        return [found[row] for row in range(len(requests))]

    def _prompt_ends(self, batch: Sequence[Request]) -> Int[Tensor, "batch 1"]:
        """Of each row that the model reads: requests that read the same share one."""
        ends = {_read(request): self._prompt_end(request) for request in batch}
        return torch.tensor(list(ends.values()))[:, None]

    def _prompt_end(self, request: Request) -> int:
        """Column after the prompt, of which the harness drops the beginning if it is too long."""
        _, context, continuation = request
        n_read = min(len(context) + len(continuation) - 1, self.max_length)
        return n_read - len(continuation) + 1


def _longest_first(request: Request) -> tuple[int, tuple[int, ...]]:
    """Sorts as the harness does within a batch, so that its rows keep their order."""
    _, context, continuation = request
    return -len(context) - len(continuation), (*context, *continuation)


def _read(request: Request) -> tuple[int, ...]:
    """The tokens that the model reads: the last one is predicted only."""
    _, context, continuation = request
    return (*context, *continuation[:-1])


def _batches(requests: Sequence[Request], order: Sequence[int], size: int) -> Iterator[list[int]]:
    """Rows of requests that go through the model together.

    The harness reads equal tokens of a batch once, whose prompts must then be equal too.
    """
    alike: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for row in order:
        key = (_read(requests[row]), len(requests[row][2]))
        alike.setdefault(key, []).append(row)
    batch: dict[tuple[int, ...], list[int]] = {}
    for (tokens, _), rows in alike.items():
        if len(batch) == size or tokens in batch:
            yield [row for own in batch.values() for row in own]
            batch = {}
        batch[tokens] = rows
    if batch:
        yield [row for own in batch.values() for row in own]


def main() -> None:
    """The harness' own command line."""
    try:
        with clear_errors():
            cli_evaluate()
    except typer.Exit as stop:
        sys.exit(stop.exit_code)


if __name__ == "__main__":
    main()
