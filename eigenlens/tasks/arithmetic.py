"""Integer addition and multiplication with the prompts of the paper.

``"{a} + {b} ="`` → ``" {a + b}"`` and ``"{a} x {b} ="`` → ``" {a * b}"``. The pairs (a, b) and
(b, a) always land in the same split, so that no test prompt was seen in training, either way round.
Answers were: of the sums of 10 … 29 nearly all come again. ``unseen_answers=True`` gives test
examples whose answers neither train nor validation has.

Test sets of different seeds are disjoint as long as there are pairs: 50 of the 400 pairs of
10 … 29 serve seeds 0 to 7, and seed 8 is tested on the same pairs as seed 0 again. Train and
validation are drawn from the rest by seed alone, so that a seed trains on what others test on.

The counterpart of an example (column ``corrupt``) is another prompt of its split with another
answer, whose operands have as many digits, so that most tokenizers give it as many tokens.
"""

import operator
import random
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from eigenlens.tasks.splits import take_groups, test_items
from eigenlens.tasks.task import Task, to_dataset

Pair = tuple[int, int]
Compute = Callable[[int, int], int]
Reading = Literal["sum", "product"]
_SHARES = {"n_train": (0.6, 300), "n_validation": (0.2, 100), "n_test": (0.2, 100)}
_OPERATORS: dict[str, tuple[str, Compute]] = {
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
    unseen_answers: bool = Field(
        default=False, description="no answer of test is one of train or validation"
    )
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


def _build(name: str, sign: str, compute: Compute, config: ArithmeticConfig) -> Task:
    sizes, unseen = list(config.sizes.values()), compute if config.unseen_answers else None
    splits = split_pairs(config.low, config.high, sizes, config.seed, unseen)
    train, validation, test = (to_dataset(_examples(p, sign, compute, config.seed)) for p in splits)
    return Task(name, train, validation, test, config.model_dump())


def _examples(pairs: list[Pair], sign: str, compute: Compute, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(f"corrupt {seed}")  # the splits do not depend on it
    alike: dict[Pair, list[Pair]] = {}
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


def _digits(a: int, b: int) -> Pair:
    return len(str(a)), len(str(b))


def split_pairs(
    low: int, high: int, sizes: list[int], seed: int, unseen: Compute | None = None
) -> list[list[Pair]]:
    """Disjoint lists of ordered pairs for train, validation and test, of exactly these sizes.

    (a, b) and (b, a) are never in different lists. Where a list is one short of its size and only
    twins are left, one of two twins is left out.

    Args:
        low: smallest operand.
        high: operands are below this number.
        sizes: of train, validation and test.
        seed: of the split; test sets are those of :func:`eigenlens.tasks.splits.test_items`.
        unseen: gives the answer of a pair; pairs with the answer of a test pair are in no other
            list.

    Raises:
        ValueError: these sizes cannot be had.
    """
    twins: list[Sequence[Pair]] = [
        sorted({(a, b), (b, a)}) for a in range(low, high) for b in range(a, high)
    ]
    if unseen is None:
        test = test_items(twins, sizes[2], seed, _last_of_seed_0(twins, sizes))
        taken = set(test)
    else:
        test, taken = _unseen(twins, sizes, seed, unseen)
    rng = random.Random(seed)
    pool = list(twins)
    rng.shuffle(pool)
    pool = [group for group in pool if taken.isdisjoint(group)]
    lists = [take_groups(pool, size) for size in sizes[:2]] + [test]
    for pairs in lists:
        rng.shuffle(pairs)
    return lists


def _last_of_seed_0(groups: Sequence[Sequence[Pair]], sizes: list[int]) -> list[Pair]:
    """What one shuffle leaves for test, after train and validation."""
    pool = list(groups)
    random.Random(0).shuffle(pool)
    return [take_groups(pool, size) for size in sizes][2]


def _unseen(
    twins: Sequence[Sequence[Pair]], sizes: list[int], seed: int, compute: Compute
) -> tuple[list[Pair], set[Pair]]:
    """Test pairs, and all pairs that have an answer of theirs."""
    alike: dict[int, list[Pair]] = {}
    for group in twins:
        alike.setdefault(compute(*group[0]), []).extend(group)
    classes = list(alike.values())
    random.Random("unseen answers").shuffle(classes)
    test = test_items(classes, sizes[2], seed, take_groups(list(classes), sizes[2]))
    taken = {pair for a, b in test for pair in alike[compute(a, b)]}
    left = sum(map(len, twins)) - len(taken)
    if left < sizes[0] + sizes[1]:
        raise ValueError(
            f"unseen_answers=True leaves {left} pairs whose answer is not one of test's, and "
            f"{sizes[0]} for train and {sizes[1]} for validation were asked for: lower n_train, "
            "n_validation or n_test."
        )
    return test, taken
