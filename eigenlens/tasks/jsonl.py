"""A user's own prompts and answers, from JSONL files.

A row is ``{"prompt": …, "answer": …}`` and may list ``"candidates"``, the answer among them, and
give its counterpart as ``"corrupt"``, another prompt of as many tokens with another answer. Prompt
and answer are put together as they are: an answer after a space begins with that space. Other
fields are passed over.
"""

from itertools import combinations
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from eigenlens.tasks.rows import Row, read_rows
from eigenlens.tasks.sources import LocalPath
from eigenlens.tasks.splits import Example, hold_out, take
from eigenlens.tasks.task import PAIR, Task, to_dataset


class JsonlConfig(BaseModel):
    """Arguments of ``jsonl``: one file to split, or a file a split.

    From one file, ``n_test`` and ``n_validation`` (default: 20 % each) examples are drawn by
    ``seed``, and train is ``n_train`` (default: all) of the others. Of files of their own, test and
    validation are the first ``n_test`` and ``n_validation`` examples (default: all); without a
    validation file, validation is drawn from the train file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: LocalPath | None = Field(default=None, description="one file for all splits")
    train: LocalPath | None = None
    validation: LocalPath | None = None
    test: LocalPath | None = None
    n_train: int | None = Field(default=None, ge=1)
    n_validation: int | None = Field(default=None, ge=1)
    n_test: int | None = Field(default=None, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _check(self) -> "JsonlConfig":
        one, several = self.path is not None, (self.train, self.validation, self.test)
        if one == any(several) or (not one and None in (self.train, self.test)):
            raise ValueError("give either path=, or train= and test= (and validation=)")
        return self


def jsonl(**arguments: Any) -> Task:
    """Your own prompts, answers and (if you like) candidates, from JSONL files: path=FILE."""
    config = JsonlConfig(**arguments)
    splits = _one_file(config) if config.path else _file_each(config)
    train, validation, test = map(to_dataset, splits)
    return Task("jsonl", train, validation, test, config.model_dump(mode="json"))


def _one_file(config: JsonlConfig) -> tuple[list[Example], list[Example], list[Example]]:
    path, seed = config.path, config.seed
    test, rest = hold_out(_read(path), config.n_test, seed, f"{path}: n_test")
    validation, rest = hold_out(rest, config.n_validation, seed, f"{path}: n_validation")
    return take(rest, config.n_train, f"{path}: n_train"), validation, test


def _file_each(config: JsonlConfig) -> tuple[list[Example], list[Example], list[Example]]:
    n, seed = config.n_validation, config.seed
    test = take(_read(config.test), config.n_test, f"{config.test}: n_test")
    if config.validation is None:
        validation, rest = hold_out(_read(config.train), n, seed, f"{config.train}: n_validation")
    else:
        validation = take(_read(config.validation), n, f"{config.validation}: n_validation")
        _, rest = hold_out(_read(config.train), 0, seed, f"{config.train}: n_validation")
    train = take(rest, config.n_train, f"{config.train}: n_train")
    _check_disjoint(train=train, validation=validation, test=test)
    return train, validation, test


def _check_disjoint(**splits: list[Example]) -> None:
    """Raise ``ValueError`` where splits share prompts."""
    prompts = {name: dict.fromkeys(row["prompt"] for row in rows) for name, rows in splits.items()}
    shared = []
    for one, other in combinations(prompts, 2):
        both = [prompt for prompt in prompts[one] if prompt in prompts[other]]
        if both:
            count = f"{len(both)} prompt{'s' if len(both) > 1 else ''}"
            shared.append(f"{one} and {other} share {count}, such as {both[0]!r}")
    if shared:
        raise ValueError(f"{'; '.join(shared)}: take them out of one of the files.")


def _read(path: Path | None) -> list[Example]:
    assert path is not None
    return [_example(row) for row in read_rows(path)]


def _example(row: Row) -> Example:
    answer = row.text("answer")
    candidates = row.fields.get("candidates")
    candidates = [] if candidates is None else candidates
    if not isinstance(candidates, list) or not all(_is_text(c) for c in candidates):
        raise row.error(f"the candidates must be a list of texts, not {candidates!r}")
    if len(set(candidates)) < len(candidates):
        raise row.error(f"a candidate is listed twice: {candidates!r}")
    if candidates and answer not in candidates:
        raise row.error(f"the answer {answer!r} is not among the candidates {candidates!r}")
    example = {"prompt": row.text("prompt"), "answer": answer, "candidates": candidates}
    if row.fields.get(PAIR) is not None:
        example[PAIR] = row.text(PAIR)
    return example


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
