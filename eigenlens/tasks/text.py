"""Plain text as prompts and answers: what an edit does to a model besides the task.

A text is cut into consecutive passages; of each, the first part is the prompt and the second the
answer, to the letter. They serve to keep an edit close to the unedited model on plain text, and to
measure perplexity (:func:`eigenlens.evaluation.perplexity`).

Cuts are made before white space only, where nearly all tokenizers cut as well. So prompt and answer
read on their own give the tokens that they have in the text: at most as many as asked for, and
less than one word short of it. Two exceptions: a single word longer than that stands alone, and a
prompt begins without the white space before it, so that its first word may take a token or two more
or less (of SmolLM2 and WikiText-2, asked for 48: 44 to 50, median 48).
"""

import random
import re
from collections.abc import Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedTokenizerBase

from eigenlens.inputs import check_tokenizer
from eigenlens.tasks.rows import DataError
from eigenlens.tasks.sources import LocalPath, Revision, data_file, data_folder, from_hub
from eigenlens.tasks.splits import Example, take
from eigenlens.tasks.task import Task, to_dataset

_HUB = ("Salesforce/wikitext", "wikitext-2-v1")
_REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"
_COLLECTION = "wikitext-2"


class WikiTextConfig(BaseModel):
    """Arguments of ``wikitext``: sizes of the splits, and words of a prompt and an answer.

    Passages are counted in words, so that every model reads the same ones.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: LocalPath | None = Field(default=None, description="folder that holds the text files")
    revision: Revision = _REVISION
    n_train: int = Field(default=100, ge=1)
    n_validation: int = Field(default=100, ge=1)
    n_test: int = Field(default=200, ge=1)
    n_prompt_words: int = Field(default=32, ge=1)
    n_answer_words: int = Field(default=16, ge=1)
    seed: int = 0


def wikitext(**arguments: Any) -> Task:
    """WikiText-2: passages of Wikipedia, to see what an edit does to plain text."""
    config = WikiTextConfig(**arguments)
    valid, test = (
        _passages(_wikitext(config, part), None, config.n_prompt_words, config.n_answer_words)
        for part in ("valid", "test")
    )
    n = config.n_train
    known = _draw(valid, n + config.n_validation, config.seed, "n_train + n_validation")
    return Task(
        "wikitext",
        to_dataset(known[:n]),
        to_dataset(known[n:]),
        to_dataset(_draw(test, config.n_test, config.seed, "n_test")),
        config.model_dump(mode="json"),
    )


def _wikitext(config: WikiTextConfig, part: str) -> str:
    folder = data_folder(config.data)
    if folder is not None:
        return _read(data_file(folder, _COLLECTION, f"{part}.txt"))
    split = {"valid": "validation", "test": "test"}[part]
    return "".join(from_hub(*_HUB, split, config.revision)["text"])


def text_examples(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    n_examples: int | None = None,
    n_prompt_tokens: int = 48,
    n_answer_tokens: int = 16,
    seed: int = 0,
) -> Dataset:
    """Passages of a text as examples without candidates.

    Args:
        source: the text, or the :class:`~pathlib.Path` of a UTF-8 file.
        tokenizer: the model's, whose tokens are counted; ``None`` counts words.
        n_examples: how many passages to draw by ``seed``; all, in order, for ``None``.
        n_prompt_tokens: most tokens of a prompt.
        n_answer_tokens: most tokens of an answer.
        seed: of the draw.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is not UTF-8, sizes below one, fewer passages than asked for, or a
            tokenizer that does not say where its tokens stand in the text.
    """
    if min(n_prompt_tokens, n_answer_tokens) < 1:
        raise ValueError("A prompt and an answer need at least one token each.")
    if tokenizer is not None:
        check_tokenizer(tokenizer)
    text = _read(source) if isinstance(source, Path) else source
    passages = _passages(text, tokenizer, n_prompt_tokens, n_answer_tokens)
    if not passages:
        name = source if isinstance(source, Path) else "The text"
        raise ValueError(f"{name} holds no whole passage. (To read a file, pass a pathlib.Path.)")
    drawn = passages if n_examples is None else _draw(passages, n_examples, seed, "n_examples")
    return to_dataset(drawn)


def _read(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"No such file: {path}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason}).") from error


def _draw(passages: Sequence[Example], n: int, seed: int, name: str) -> list[Example]:
    order = random.Random(seed).sample(passages, len(passages))
    return take(order, n, name)


def _passages(
    text: str, tokenizer: PreTrainedTokenizerBase | None, n_prompt: int, n_answer: int
) -> list[Example]:
    found = list(re.finditer(r"\s*\S+", text))
    starts = np.array([word.start() for word in found], dtype=int)
    if tokenizer is None:
        lengths = np.ones(len(found), dtype=int)
    else:
        lengths = _tokens_per_word(text, starts, tokenizer)
    words = [word.group() for word in found]
    parts = [
        "".join(words[first:last])
        for first, last in pairwise(_borders(lengths, n_prompt, n_answer))
    ]
    return [
        {"prompt": prompt.lstrip(), "answer": answer}
        for prompt, answer in zip(parts[::2], parts[1::2], strict=False)
    ]


def _tokens_per_word(
    text: str, starts: np.ndarray, tokenizer: PreTrainedTokenizerBase
) -> np.ndarray:
    """How many tokens of ``text`` begin in each of its words."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say where tokens stand in a text: "
            "use a fast tokenizer, or None to count words."
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    begins = [begin for begin, _ in encoded["offset_mapping"]]
    return np.bincount(np.searchsorted(starts, begins, side="right") - 1, minlength=len(starts))


def _borders(lengths: np.ndarray, n_prompt: int, n_answer: int) -> list[int]:
    """Words at which parts of at most ``n_prompt`` and ``n_answer`` tokens begin, in turns.

    The last border is the end of the last part that is full.
    """
    sizes = cycle((n_prompt, n_answer))
    borders, room = [0], next(sizes)
    for word, length in enumerate(lengths.tolist()):
        if length > room and word > borders[-1]:
            borders.append(word)
            room = next(sizes)
        room -= length
    if room <= 0:
        borders.append(len(lengths))
    return borders
