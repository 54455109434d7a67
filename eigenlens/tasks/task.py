"""What a task is: three disjoint splits of prompts, answers and candidate answers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any

from datasets import Dataset, Features, List, Value

from eigenlens.provenance import text_hash

PAIR = "corrupt"  # a column that a task may have
FEATURES = Features(
    {"prompt": Value("string"), "answer": Value("string"), "candidates": List(Value("string"))}
)


class UnknownTaskError(ValueError):
    """No task of that name."""


@dataclass(frozen=True)
class Task:
    """A task with its splits.

    Attributes:
        name: the registered name.
        train: examples that scores and searches are computed on.
        validation: examples that choices are made on.
        test: examples that results are reported on.
        arguments: what the task was built with, the seed among it.

    The splits are ``datasets.Dataset`` with the columns ``prompt``, ``answer`` and ``candidates``
    (an empty list where the task has no candidate answers). A task may have ``corrupt``, too: for
    each prompt a counterpart with another answer (``None``: there is none), which the reference
    ``pair`` patches in.
    """

    name: str
    train: Dataset
    validation: Dataset
    test: Dataset
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """Hash over every example of every split."""
        return text_hash(
            row for split in (self.train, self.validation, self.test) for row in split.to_list()
        )

    def _repr_html_(self) -> str:
        sizes = f"{len(self.train)} train, {len(self.validation)} validation, {len(self.test)} test"
        head = self.train.select(range(min(3, len(self.train)))).to_pandas()
        return f"<b>{escape(self.name)}</b>: {sizes}{head.to_html(index=False)}"


def to_dataset(examples: list[dict[str, Any]]) -> Dataset:
    """Examples as a dataset with the three columns of every split, and ``corrupt`` where it is."""
    rows = [{"candidates": [], **example} for example in examples]
    features = dict(FEATURES)
    if any(PAIR in example for example in examples):
        features[PAIR] = Value("string")
        rows = [{PAIR: None, **row} for row in rows]
    return Dataset.from_list(rows, features=Features(features))
