"""Copying in context: a list of random words, repeated; which word comes next?

"apple river stone apple river stone apple river" → " stone". Nothing but the earlier occurrence of
the last word tells the answer. Attention heads that look at what followed it, *induction heads*,
are known to carry this (Olsson et al. 2022, arXiv 2209.11895).

The counterpart of an example (column ``corrupt``) ends with a word that was not there before, so
that nothing tells what follows.
"""

import random
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from eigenlens.tasks.splits import Example
from eigenlens.tasks.task import Task, to_dataset

# Words that most tokenizers have as one token after white space.
_WORDS = (
    *("apple", "army", "baby", "bank", "bird", "blood", "board", "boat", "body", "book", "bridge"),
    *("camp", "car", "cat", "chair", "church", "city", "cloud", "coast", "coffee", "corn", "court"),
    *("dinner", "doctor", "dog", "door", "dream", "dress", "ear", "earth", "engine", "eye", "farm"),
    *("field", "film", "fire", "fish", "flag", "floor", "flower", "forest", "friend", "game"),
    *("garden", "glass", "gold", "grass", "gun", "hair", "hand", "heart", "hill", "horse", "house"),
    *("ice", "iron", "island", "judge", "key", "king", "lake", "leaf", "letter", "lion", "market"),
    *("milk", "mirror", "money", "moon", "mountain", "mouth", "music", "neck", "night", "ocean"),
    *("office", "oil", "paper", "park", "piano", "plant", "pocket", "prince", "queen", "rain"),
    *("ring", "river", "road", "rock", "roof", "salt", "school", "sea", "ship", "shoe", "silver"),
    *("sister", "sky", "snow", "soldier", "song", "star", "stone", "street", "sugar", "summer"),
    *("sun", "table", "teacher", "tiger", "tower", "tree", "valley", "village", "wall", "water"),
    *("wheel", "wife", "wind", "window", "wine", "winter", "wolf", "wood"),
)


class InductionConfig(BaseModel):
    """Arguments of ``induction``: words of a list, how often all of it comes, sizes of the splits.

    Every example has a list of its own; there are far more than any seed or split can use up.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_words: int = Field(default=16, ge=3, lt=len(_WORDS))
    n_lists: int = Field(default=2, ge=1, description="whole lists before the one that breaks off")
    n_train: int = Field(default=200, ge=1)
    n_validation: int = Field(default=100, ge=1)
    n_test: int = Field(default=100, ge=1)
    seed: int = 0


def induction(**arguments: Any) -> Task:
    """A list of random words, repeated, "apple river stone apple river" → " stone"."""
    config = InductionConfig(**arguments)
    train, validation, test = (
        to_dataset([_example(config, random.Random(f"{name} {config.seed} {i}")) for i in range(n)])
        for name, n in (
            ("train", config.n_train),
            ("validation", config.n_validation),
            ("test", config.n_test),
        )
    )
    return Task("induction", train, validation, test, config.model_dump())


def _example(config: InductionConfig, rng: random.Random) -> Example:
    *words, other = rng.sample(_WORDS, config.n_words + 1)
    # From the second word on: the first of a prompt has no white space before it.
    last = rng.randrange(1, config.n_words - 1)
    before = words * config.n_lists + words[:last]
    return {
        "prompt": " ".join([*before, words[last]]),
        "answer": f" {words[last + 1]}",
        "corrupt": " ".join([*before, other]),
    }
