"""What the report shows of the inside of the model, which is loaded again where it can be."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.activations import ActivationChange, activation_change
from eigenlens.circuits import Circuit, circuit
from eigenlens.circuits.nodes import score_rows
from eigenlens.frozen_set import FrozenSet
from eigenlens.pipeline import EigenpruneResult, load_as
from eigenlens.provenance import data_hash
from eigenlens.scoring import Scores
from eigenlens.tasks import Task

# A node of the circuit is a short backward pass for each batch, and brings two more nodes that
# write to it: minutes on a small language model.
MOST_FROZEN = 40
MOST_TRACED = 50  # training examples
MOST_COMPARED = 100  # test examples


@dataclass(frozen=True)
class Inside:
    """Activations before and after, and the circuit of pruned paths.

    Attributes:
        activations: on test examples.
        paths: on training examples, as the scores are; ``None`` if nothing is frozen.
        shown: how many frozen components are in ``paths``: those with the largest scores.
    """

    activations: ActivationChange
    paths: Circuit | None
    shown: int


def look_inside(
    result: EigenpruneResult,
    model: TransformerBridge | None = None,
    task: Task | None = None,
    *,
    progress: bool = True,
) -> Inside:
    """Look at what the edit of a run does inside its model.

    Args:
        result: the run.
        model, task: those of the run (default: loaded as the run did).
        progress: show progress bars.

    Raises:
        ValueError: the model or the task cannot be loaded, or is not the one of the run.
        OSError: its files cannot be read or fetched.
    """
    config, frozen = result.config, result.frozen
    given = {"model": model, "task": task}
    missing = [name for name in config.from_memory if given[name] is None]
    if missing:
        raise ValueError(
            f"its {' and '.join(missing)} came from memory; hand over model and task: "
            "eigenlens.report.write_report(folder, model=…, task=…)"
        )
    if model is None or task is None:
        model, task = load_as(config)
    frozen.check_model(model)
    if data_hash(task.test) != result.before.provenance.task_hash:
        raise ValueError(f"the test split of {task.name} is not that of the run")
    test = task.test.select(range(min(MOST_COMPARED, len(task.test))))
    train = task.train.select(range(min(MOST_TRACED, len(task.train))))
    options: dict[str, Any] = {"batch_size": config.batch_size, "progress": progress}
    changed = activation_change(model, frozen, test, **options)
    if not len(frozen):
        return Inside(changed, None, 0)
    strongest = _strongest(frozen, result.scores)
    paths = circuit(model, result.scores, train, strongest, **options)
    return Inside(changed, paths, len(strongest))


def _strongest(frozen: FrozenSet, scores: Scores) -> FrozenSet:
    """The frozen components with the largest scores of either sign."""
    if len(frozen) <= MOST_FROZEN:
        return frozen
    rows = score_rows(scores, frozen.components)
    order = np.argsort(-np.abs(scores.delta_loss[rows]), kind="stable")[:MOST_FROZEN]
    components = frozen.components.iloc[order].reset_index(drop=True)
    return replace(frozen, components=components, means=frozen.means[order], directions=None)
