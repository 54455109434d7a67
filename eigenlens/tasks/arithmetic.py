"""Integer addition and multiplication with the prompts of the paper.

``"{a} + {b} ="`` → ``" {a + b}"`` and ``"{a} x {b} ="`` → ``" {a * b}"``. The pairs (a, b) and
(b, a) always land in the same split, so that no test answer was seen in training.

The counterpart of an example (column ``corrupt``) is another prompt of its split with another
answer, whose operands have as many digits, so that most tokenizers give it as many tokens.
"""

import operator
import random
from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from eigenlens.tasks.task import Task, to_dataset

Reading = Literal["sum", "product"]
_SHARES = {"n_train": (0.6, 300), "n_validation": (0.2, 100), "n_test": (0.2, 100)}
_OPERATORS: dict[str, tuple[str, Callable[[int, int], int]]] = {
    "int_add": ("+", operator.add),
    "int_mult": ("x", operator.mul),
}


class ArithmeticConfig(BaseModel):
    """Arguments of ``int_add`` and ``int_mult``.

    Sizes that are not given are 60, 20 and 20 % of all pairs, at most 300, 100 and 100.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: int = Field(default=0, ge=0, description="smallest operand")
    high: int = Field(gt=0, description="operands are below this number")
    n_train: int | None = Field(default=None, ge=1)
    n_validation: int | None = Field(default=None, ge=1)
    n_test: int | None = Field(default=None, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _check(self) -> "ArithmeticConfig":
        if self.high - self.low < 3:
            raise ValueError(f"high={self.high} must be at least low={self.low} + 3.")
        pairs = (self.high - self.low) ** 2
        wanted = sum(self.sizes.values())
        if wanted > pairs:
            raise ValueError(f"{wanted} examples were asked for, but there are {pairs} pairs.")
        return self

    @property
    def sizes(self) -> dict[str, int]:
        """Number of examples of each split."""
        pairs = (self.high - self.low) ** 2
        return {
            name: getattr(self, name) or max(1, min(cap, int(share * pairs)))
            for name, (share, cap) in _SHARES.items()
        }


def int_add(**arguments: Any) -> Task:
    """Integer addition, "{a} + {b} =", operands low … high - 1 (default 0 … 99)."""
    return _arithmetic("int_add", ArithmeticConfig(**{"high": 100} | arguments))


def int_mult(**arguments: Any) -> Task:
    """Integer multiplication, "{a} x {b} =", operands low … high - 1 (default 0 … 19)."""
    return _arithmetic("int_mult", ArithmeticConfig(**{"high": 20} | arguments))


class AmbiguousConfig(ArithmeticConfig):
    """Arguments of ``ambiguous``."""

    reading: Reading = Field(default="product", description="which answer counts as right")


def ambiguous(**arguments: Any) -> Task:
    """arith-tiny's torn operator, "{a} ? {b} =", read as a product or as a sum."""
    config = AmbiguousConfig(**{"high": 20} | arguments)
    compute = {"sum": operator.add, "product": operator.mul}[config.reading]
    return _build("ambiguous", "?", compute, config)


def _arithmetic(name: str, config: ArithmeticConfig) -> Task:
    return _build(name, *_OPERATORS[name], config)


def _build(
    name: str, sign: str, compute: Callable[[int, int], int], config: ArithmeticConfig
) -> Task:
    splits = split_pairs(config.low, config.high, list(config.sizes.values()), config.seed)
    train, validation, test = (to_dataset(_examples(p, sign, compute, config.seed)) for p in splits)
    return Task(name, train, validation, test, config.model_dump())


def _examples(
    pairs: list[tuple[int, int]], sign: str, compute: Callable[[int, int], int], seed: int
) -> list[dict[str, Any]]:
    rng = random.Random(f"corrupt {seed}")  # the splits do not depend on it
    alike: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for a, b in pairs:
        alike.setdefault(_digits(a, b), []).append((a, b))
    examples = []
    for a, b in pairs:
        others = [pair for pair in alike[_digits(a, b)] if compute(*pair) != compute(a, b)]
        other = rng.choice(others) if others else None
        examples.append(
            {
                "prompt": f"{a} {sign} {b} =",
                "answer": f" {compute(a, b)}",
                "corrupt": None if other is None else f"{other[0]} {sign} {other[1]} =",
            }
        )
    return examples


def _digits(a: int, b: int) -> tuple[int, int]:
    return len(str(a)), len(str(b))


def split_pairs(low: int, high: int, sizes: list[int], seed: int) -> list[list[tuple[int, int]]]:
    """Disjoint lists of ordered pairs, of exactly these sizes.

    (a, b) and (b, a) are never in different lists. Where a list is one short of its size and only
    twins are left, one of two twins is left out.
    """
    rng = random.Random(seed)
    pool = [{(a, b), (b, a)} for a in range(low, high) for b in range(a, high)]
    rng.shuffle(pool)
    lists = [_take(pool, size) for size in sizes]
    for pairs in lists:
        rng.shuffle(pairs)
    return lists


def _take(pool: list[set[tuple[int, int]]], size: int) -> list[tuple[int, int]]:
    """Move groups from the front of ``pool`` into a list of exactly ``size`` pairs."""
    pairs: list[tuple[int, int]] = []
    left = []
    for group in pool:
        fits = len(pairs) + len(group) <= size
        pairs += sorted(group) if fits else []
        left += [] if fits else [group]
    if len(pairs) < size:
        pairs.append(min(left.pop(0)))
    pool[:] = left
    return pairs
