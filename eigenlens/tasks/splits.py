"""Seeded splits of a list of examples, with no prompt on two sides."""

import random
from collections.abc import Hashable, Sequence
from typing import Any, TypeVar

Example = dict[str, Any]
T = TypeVar("T", bound=Hashable)
_SHARE = 0.2


def hold_out(
    examples: Sequence[Example], n: int | None, seed: int, name: str
) -> tuple[list[Example], list[Example]]:
    """Draw ``n`` examples; the rest comes in random order, without the prompts that were drawn.

    Args:
        examples: what to draw from.
        n: how many; 20 % for ``None``.
        seed: of the draw.
        name: of the argument ``n``, for the message.

    Raises:
        ValueError: nothing would be left.
    """
    wanted = max(1, round(_SHARE * len(examples))) if n is None else n
    order = list(examples)
    random.Random(seed).shuffle(order)
    held = order[:wanted]
    prompts = {example["prompt"] for example in held}
    rest = [example for example in order[wanted:] if example["prompt"] not in prompts]
    if not rest:
        raise ValueError(f"{name}={wanted} of {len(examples)} examples leaves none to train on.")
    return held, rest


def take(examples: Sequence[Example], n: int | None, name: str) -> list[Example]:
    """The first ``n`` examples; all for ``None``.

    Raises:
        ValueError: there are fewer.
    """
    if n is not None and n > len(examples):
        raise ValueError(f"{name}={n} examples were asked for, but there are {len(examples)}.")
    return list(examples[:n])


def test_items(groups: Sequence[Sequence[T]], size: int, seed: int, first: Sequence[T]) -> list[T]:
    """The test items of a seed, so that results of different seeds are of different items.

    What is not in ``first`` is put into one order, the same for every seed, and cut into sets of
    ``size`` items. Seed 0 has ``first``, seed 1 the first of these sets, and so on. There are about
    as many disjoint sets as ``size`` goes into all items; further seeds begin again with ``first``.

    Args:
        groups: all items; those of a group are never in two sets.
        size: of each set.
        seed: whose set is wanted.
        first: the set of seed 0.
    """
    drawn = set(first)
    pool = [group for group in groups if drawn.isdisjoint(group)]
    random.Random("test sets").shuffle(pool)
    sets = [list(first)]
    while sum(map(len, pool)) >= size:
        before = sum(map(len, pool))
        found = take_groups(pool, size)
        if sum(map(len, pool)) == before - size:  # a set that takes part of a group wastes the rest
            sets.append(found)
    return sets[seed % len(sets)]


def take_groups(pool: list[Sequence[T]], size: int) -> list[T]:
    """Move groups from the front of ``pool`` into a list of exactly ``size`` items.

    Where only groups are left that do not fit, a part of one is taken and its rest is left out.

    Raises:
        ValueError: ``pool`` holds too few items.
    """
    if sum(map(len, pool)) < size:
        raise ValueError(
            f"{size} examples were asked for, but only {sum(map(len, pool))} are left for them: "
            "ask for fewer."
        )
    items: list[T] = []
    left: list[Sequence[T]] = []
    for group in pool:
        fits = len(items) + len(group) <= size
        items += group if fits else []
        left += [] if fits else [group]
    if len(items) < size:
        part = min(left, key=len)
        items += part[: size - len(items)]
        left.remove(part)
    pool[:] = left
    return items
