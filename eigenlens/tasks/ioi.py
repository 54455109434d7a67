"""Indirect object identification: of two names, which one receives something?

"When Mary and John got to the park, John handed the book to" → " Mary". The name that comes once
(the indirect object) is right, the one that comes twice (the subject) is wrong; both are the
candidates. In the order ``ABBA`` the indirect object comes first, in ``BABA`` second. The usual
metric is the difference of the logits of the two names:
``logit_diff(wrong_candidates(data, tokenizer))`` of :mod:`eigenlens.metrics`.

The counterpart of an example (column ``corrupt``) has a third name in place of the second mention
of the subject, so that nothing tells who is meant.
Source of the task: Interpretability in the Wild (arXiv 2211.00593); sentences and names are our
own.
"""

import random
from itertools import combinations
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from eigenlens.tasks.splits import Example, test_items
from eigenlens.tasks.task import Task, to_dataset

_TEMPLATES = (
    "When {first} and {second} got to the {place}, {subject} handed the {thing} to",
    "After {first} and {second} had left the {place}, {subject} passed the {thing} to",
    "{first} and {second} met at the {place}, and {subject} gave the {thing} to",
    "While {first} and {second} were waiting at the {place}, {subject} offered the {thing} to",
    "Once {first} and {second} had come back from the {place}, {subject} showed the {thing} to",
)
_NAMES = (
    *("Adam", "Alex", "Alice", "Amy", "Andrew", "Anna", "Ben", "Brian", "Charles", "Chris"),
    *("Daniel", "David", "Emily", "Emma", "Eric", "Frank", "George", "Grace", "Henry", "Jack"),
    *("Jacob", "James", "Jane", "Jason", "John", "Joseph", "Kate", "Kevin", "Laura", "Lisa"),
    *("Lucy", "Maria", "Mark", "Martin", "Mary", "Michael", "Paul", "Peter", "Rachel", "Richard"),
    *("Robert", "Rose", "Ryan", "Sam", "Sarah", "Simon", "Steven", "Susan", "Thomas", "Tom"),
)
_PLACES = ("park", "station", "library", "market", "school", "museum", "beach", "office")
_THINGS = ("book", "ring", "key", "letter", "drink", "ticket", "bag", "map")
_PAIRS = tuple(combinations(_NAMES, 2))


class IoiConfig(BaseModel):
    """Arguments of ``ioi``. Each example has a pair of names of its own.

    Test sets of different seeds have no pair in common as long as there are pairs: with 100 test
    examples, seed 12 has the pairs of seed 0 again, in other sentences.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    order: Literal["ABBA", "BABA", "both"] = Field(
        default="both", description="both: alternating, so that the order tells nothing"
    )
    n_train: int = Field(default=200, ge=1)
    n_validation: int = Field(default=100, ge=1)
    n_test: int = Field(default=100, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _check(self) -> "IoiConfig":
        wanted = self.n_train + self.n_validation + self.n_test
        if wanted > len(_PAIRS):
            raise ValueError(
                f"{wanted} examples were asked for, but there are {len(_PAIRS)} pairs of names."
            )
        return self


def ioi(**arguments: Any) -> Task:
    """Indirect object identification, "… Mary and John … John handed the book to" → " Mary"."""
    config = IoiConfig(**arguments)
    rng = random.Random(config.seed)
    third = random.Random(f"corrupt {config.seed}")  # the examples do not depend on it
    order = rng.sample(_PAIRS, len(_PAIRS))
    before = config.n_train + config.n_validation
    first = random.Random(0).sample(_PAIRS, len(_PAIRS))[before : before + config.n_test]
    tested = test_items([[pair] for pair in _PAIRS], config.n_test, config.seed, first)
    others = [pair for pair in order if pair not in set(tested)]
    splits = (others[: config.n_train], others[config.n_train : before], tested)
    orders = ("ABBA", "BABA") if config.order == "both" else (config.order,)
    train, validation, test = (
        to_dataset(
            [_example(pair, orders[i % len(orders)], rng, third) for i, pair in enumerate(split)]
        )
        for split in splits
    )
    return Task("ioi", train, validation, test, config.model_dump())


def _example(
    pair: tuple[str, str], order: str, rng: random.Random, third: random.Random
) -> Example:
    receiver, subject = rng.sample(pair, 2)
    first, second = (receiver, subject) if order == "ABBA" else (subject, receiver)
    template = rng.choice(_TEMPLATES)
    rest = {"place": rng.choice(_PLACES), "thing": rng.choice(_THINGS)}
    prompt, corrupt = (
        template.format(first=first, second=second, subject=name, **rest)
        for name in (subject, third.choice([name for name in _NAMES if name not in pair]))
    )
    candidates = [f" {receiver}", f" {subject}"]
    # Sorted, so that the place in the list does not give the answer away.
    return {
        "prompt": prompt,
        "answer": candidates[0],
        "candidates": sorted(candidates),
        "corrupt": corrupt,
    }
