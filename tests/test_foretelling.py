"""The time that a search will take, with a clock that only pretends."""

import pytest
from tqdm import tqdm

from eigenlens.search.foretelling import foretold, prediction


def walk(n_steps, first, others, *, shown=True, resumable=True):
    """The lines said during steps that take ``first`` and then ``others`` seconds."""
    clock, said = [0.0], []
    bar = tqdm(range(1, n_steps + 1), disable=not shown)
    steps = []
    for step in foretold(bar, resumable=resumable, now=lambda: clock[0], say=said.append):
        clock[0] += first if step == 1 else others
        steps.append(step)
    assert steps == list(range(1, n_steps + 1))
    return said


def test_it_is_said_once_and_without_the_first_step():
    # 176 steps of 3.7 s are left after four.
    (line,) = walk(180, first=60, others=3.7)
    assert line.startswith("At most about 11 minutes on this machine (3.7 s a step)")
    assert line.endswith("; Ctrl-C is safe, run again to go on.")


def test_ctrl_c_is_called_safe_only_where_it_is():
    assert walk(180, first=4, others=3.7, resumable=False) == [
        "At most about 11 minutes on this machine (3.7 s a step)."
    ]


@pytest.mark.parametrize(
    "given",
    [
        {"n_steps": 20, "first": 30, "others": 3.7},  # 16 steps, 59.2 seconds
        {"n_steps": 4, "first": 30, "others": 300},  # over before it is known
        {"n_steps": 180, "first": 4, "others": 3.7, "shown": False},
    ],
)
def test_nothing_is_said_about_short_or_silent_searches(given):
    assert walk(**given) == []


def test_one_minute_is_one():
    assert prediction(6.0, 10, resumable=False).startswith("At most about 1 minute on")
    assert prediction(6.1, 10, resumable=False).startswith("At most about 2 minutes on")
