"""The tasks by name."""

from collections.abc import Callable
from typing import Any

from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from eigenlens.errors import problems
from eigenlens.inputs import check_tokenizer
from eigenlens.tasks.arithmetic import ambiguous, int_add, int_mult
from eigenlens.tasks.batches import tokenise
from eigenlens.tasks.induction import induction
from eigenlens.tasks.ioi import ioi
from eigenlens.tasks.jsonl import jsonl
from eigenlens.tasks.superglue import cb, copa, rte
from eigenlens.tasks.task import Task, UnknownTaskError
from eigenlens.tasks.text import wikitext

TASKS: dict[str, Callable[..., Task]] = {
    "int_add": int_add,
    "int_mult": int_mult,
    "ambiguous": ambiguous,
    "cb": cb,
    "copa": copa,
    "rte": rte,
    "ioi": ioi,
    "induction": induction,
    "jsonl": jsonl,
    "wikitext": wikitext,
}


def load_task(
    name: str, tokenizer: PreTrainedTokenizerBase | None = None, **arguments: Any
) -> Task:
    """Build a task.

    Args:
        name: a key of :data:`TASKS`.
        tokenizer: the model's; when given, every example is checked to tokenise.
        **arguments: the task's own, such as ``low``, ``high``, ``n_train`` and ``seed``.

    Raises:
        UnknownTaskError: no such task.
        ValueError: an argument that the task does not take or allow, a malformed row of a data
            file, or an answer that tokenises to nothing.
        FileNotFoundError: a data file is neither in the folder that was named nor on the Hub.
    """
    if name not in TASKS:
        raise UnknownTaskError(f"Unknown task {name!r}; choose from {', '.join(sorted(TASKS))}.")
    try:
        task = TASKS[name](**arguments)
    except ValidationError as error:
        raise ValueError(f"Task {name!r}: {problems(error, 'arguments')}.") from error
    if tokenizer is not None:
        check_tokenizer(tokenizer)
        for split in ("train", "validation", "test"):
            try:
                tokenise(getattr(task, split), tokenizer)
            except ValueError as error:
                raise ValueError(f"Task {name!r}, split {split}: {error}") from error
    return task
