"""Tasks: prompts with answers, split by seed, and the batches that models read."""

from eigenlens.tasks.batches import Batch, make_batches
from eigenlens.tasks.harness import write_harness_tasks
from eigenlens.tasks.registry import TASKS, load_task
from eigenlens.tasks.task import Task, UnknownTaskError
from eigenlens.tasks.text import text_examples

__all__ = [
    "TASKS",
    "Batch",
    "Task",
    "UnknownTaskError",
    "load_task",
    "make_batches",
    "text_examples",
    "write_harness_tasks",
]
