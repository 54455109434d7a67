"""What the report shows of the inside of the model: it is loaded again for this."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from eigenlens.activations import ActivationChange, activation_change
from eigenlens.circuits import Circuit, circuit
from eigenlens.circuits.nodes import score_rows
from eigenlens.frozen_set import FrozenSet
from eigenlens.models import load_model
from eigenlens.pipeline import EigenpruneResult
from eigenlens.scoring import Scores
from eigenlens.tasks import load_task

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


def look_inside(result: EigenpruneResult, *, progress: bool = True) -> Inside:
    """Load model and task as the run did, and look at what its edit does inside.

    Raises:
        ValueError: the model or the task cannot be loaded, or is not the one of the run.
        OSError: its files cannot be read or fetched.
    """
    config, frozen = result.config, result.frozen
    model = load_model(config.model, dtype=config.dtype, device=config.device)
    frozen.check_model(model)
    task = load_task(config.task, model.tokenizer, **{"seed": config.seed} | config.task_args)
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
