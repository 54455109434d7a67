"""Seeded splits of a list of examples, with no prompt on two sides."""

import random
from collections.abc import Sequence
from typing import Any

Example = dict[str, Any]
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
