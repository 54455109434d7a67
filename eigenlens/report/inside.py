"""What the report shows of the inside of the model, which is loaded again where it can be."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.activations import ActivationChange, activation_change
from eigenlens.circuits import Circuit, Examples, Groups, circuit, groups
from eigenlens.circuits.examples import examples_of
from eigenlens.circuits.nodes import make_nodes, score_rows
from eigenlens.circuits.readout import token_summary
from eigenlens.config import EigenpruneConfig
from eigenlens.frontiers import Frontier, frontier
from eigenlens.frozen_set import FrozenSet
from eigenlens.pipeline import load_as, spectra_of
from eigenlens.provenance import data_hash
from eigenlens.run_folder import EigenpruneResult
from eigenlens.scoring import Scores
from eigenlens.spectra import COMPONENT
from eigenlens.tasks import Task
from eigenlens.tasks.own_text import OWN_TEXT, OwnTextError, own_text

# A node of the circuit is a short backward pass for each batch, and brings two more nodes that
# write to it: minutes on a small language model.
MOST_FROZEN = 40
MOST_TRACED = 50  # training examples
MOST_COMPARED = 100  # test examples
MOST_DESCRIBED = 200  # frozen components, besides those of the circuit
MOST_GROUPED = 5000  # frozen components: the memory of their distances grows with the square
MOST_READ = 200  # passages that components answer to
_PASSAGES, _AROUND = 3, 8  # shown of either end, and tokens on either side


@dataclass(frozen=True)
class Inside:
    """Activations before and after, the circuit of pruned paths, and what its components answer to.

    Attributes:
        activations: on test examples.
        paths: on training examples, as the scores are; ``None`` if nothing is frozen.
        shown: how many frozen components are in ``paths``: those with the largest scores.
        nodes: the frozen components with the lowest scores and all nodes of ``paths``: columns
            ``node, layer, matrix, head, index, size, sigma, strength, delta_loss``, the tokens that
            each ``reads, promotes, suppresses``, and for those of ``paths`` its other columns.
        examples: passages of ``text`` for each of them.
        text: what was read, in words.
        groups: of all frozen components, on training examples; ``None`` if there are too many.
        frontier: the edit at strengths from the whole of it to nothing, by accuracy and harm to
            text; ``None`` without text besides the task's own.
    """

    activations: ActivationChange
    paths: Circuit | None
    shown: int
    nodes: pd.DataFrame
    examples: dict[str, Examples]
    text: str
    groups: Groups | None
    frontier: Frontier | None


def look_inside(
    result: EigenpruneResult,
    model: TransformerBridge | None = None,
    task: Task | None = None,
    *,
    text: Dataset | None = None,
    progress: bool = True,
) -> Inside:
    """Look at what the edit of a run does inside its model.

    Args:
        result: the run.
        model, task: those of the run (default: loaded as the run did).
        text: as for :func:`eigenlens.report.write_report`.
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
    of_run = {"test": result.before.provenance, "train": result.scores.provenance}
    for split, source in of_run.items():
        if data_hash(getattr(task, split)) != source.task_hash:
            raise ValueError(f"the {split} split of {task.name} is not that of the run")
    test = task.test.select(range(min(MOST_COMPARED, len(task.test))))
    train = task.train.select(range(min(MOST_TRACED, len(task.train))))
    options: dict[str, Any] = {"batch_size": config.batch_size, "progress": progress}
    changed = activation_change(model, frozen, test, **options)
    if not len(frozen):
        return Inside(changed, None, 0, pd.DataFrame(), {}, "", None, None)
    spectra = spectra_of(model, task, config, progress=progress)
    scores = replace(result.scores, spectra=spectra)
    strongest = _strongest(frozen, scores)
    paths = circuit(model, scores, train, strongest, **options)
    nodes = _described(model, scores, frozen, paths)
    other = _text(model, config, text)
    passages, what = other or (task.train, "training examples of the task")
    passages = passages.select(range(min(MOST_READ, len(passages))))
    asked = make_nodes(spectra, nodes)
    found = examples_of(model, asked, passages, top=_PASSAGES, around=_AROUND, **options)
    joined = None
    if len(frozen) <= MOST_GROUPED and len(train) > 2:
        count = min(12, max(2, len(frozen) // 3))
        singles = len(frozen) <= MOST_FROZEN  # a pass each
        joined = groups(model, spectra, frozen, train, count=count, singles=singles, **options)
    return Inside(
        changed,
        paths,
        len(strongest),
        nodes,
        found,
        f"{len(passages)} {what}",
        joined,
        _rewound(model, frozen, task, passages, options) if other and len(passages) > 1 else None,
    )


def _rewound(
    model: TransformerBridge,
    frozen: FrozenSet,
    task: Task,
    passages: Dataset,
    options: dict[str, Any],
) -> Frontier:
    """The edit at several strengths; one half of the passages chooses, the other reports."""
    halves = (passages.select(range(first, len(passages), 2)) for first in (0, 1))
    return frontier(model, {"the edit": frozen}, task, *halves, **options)


def _text(
    model: TransformerBridge, config: EigenpruneConfig, given: Dataset | None
) -> tuple[Dataset, str] | None:
    """Text other than the task's own, if there is any, and what it is in words."""
    if given is not None:
        return given, "passages of the text that was given"
    protected = {OWN_TEXT: {}} if config.protect is None else config.protect
    if OWN_TEXT not in protected:
        return None
    drawn = {"seed": config.seed} | protected[OWN_TEXT]
    try:
        text = own_text(model, **drawn | {"seed": drawn["seed"] + 1})
    except OwnTextError:
        return None
    return text, "passages that the model wrote itself, drawn anew"


def _described(
    model: TransformerBridge, scores: Scores, frozen: FrozenSet, paths: Circuit
) -> pd.DataFrame:
    """The nodes of a circuit, and below them the frozen components that the report lists."""
    values = scores.delta_loss[score_rows(scores, frozen.components)]
    lowest = np.argsort(values, kind="stable")[:MOST_DESCRIBED]
    spectra = scores.spectra_on(model)
    listed = make_nodes(spectra, frozen.components.iloc[lowest]).table
    others = make_nodes(spectra, listed[~listed["node"].isin(paths.nodes["node"])])
    table = others.table.join(token_summary(model, others))
    members = others.members.merge(scores.to_pandas(), on=COMPONENT)
    members = members.merge(frozen.components, on=COMPONENT, how="left").fillna({"strength": 0.0})
    grouped = members.groupby("number")
    table["strength"] = grouped["strength"].mean().to_numpy()
    table["delta_loss"] = grouped["delta_loss"].sum().to_numpy()
    return pd.concat([paths.nodes, table], ignore_index=True)


def _strongest(frozen: FrozenSet, scores: Scores) -> FrozenSet:
    """The frozen components with the largest scores of either sign."""
    if len(frozen) <= MOST_FROZEN:
        return frozen
    rows = score_rows(scores, frozen.components)
    order = np.argsort(-np.abs(scores.delta_loss[rows]), kind="stable")[:MOST_FROZEN]
    components = frozen.components.iloc[order].reset_index(drop=True)
    return replace(frozen, components=components, means=frozen.means[order], directions=None)
