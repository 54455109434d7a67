"""Groups of components that act together: thousands of frozen components as a dozen stories.

1. The first-order effect of freezing each component on each example,
   ``e_ib = z_i Σ_t (c̄_i,t − c_i,bt) s_i,bt``.
2. Effects are standardised over examples, so that the squared distance of two components is
   ``2 (1 − r)``, with r the correlation of their effects. One whose effect is the same on every
   example correlates with nothing, and lies at the origin.
3. Ward's hierarchical clustering, cut into ``count`` groups.
4. Every group is frozen as a whole. Its exact effect stands beside the sum of what its members do
   one at a time: the difference is how they interact.
5. What a group reads and writes: the top tokens of its members with the largest effects, as lengths
   (:func:`eigenlens.circuits.readout.shared_tokens`), since signs of coordinates are arbitrary.

Sign: an effect below zero says that freezing lowers the loss.
"""

import html
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset
from jaxtyping import Float, Int
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.circuits.nodes import make_nodes
from eigenlens.circuits.readout import shared_tokens
from eigenlens.exact import joint_effects
from eigenlens.files import FileFormatError, load_record, save_record
from eigenlens.freezing import site_edits
from eigenlens.frozen_set import FrozenSet
from eigenlens.inputs import check_data
from eigenlens.matrices import Site
from eigenlens.memory import fitting
from eigenlens.metrics import Metric, answer_loss, check_eval_mode
from eigenlens.passes import Activation, FiniteCheck, forward_backward, without_padding
from eigenlens.provenance import Provenance, data_hash
from eigenlens.spectra import COMPONENT, Spectra, by_matrix, moved_coordinates
from eigenlens.tasks.batches import Batch, make_batches

_TABLES = ("table", "members")
_TOTALS = ("components", "first_order", "single", "joint", "stderr")
_NOTE = (
    "Effects in nats: below zero, freezing lowers the loss. first_order and single are sums over "
    "members one at a time (estimated, and exact); joint is exact, of the group frozen as a whole."
)
_DESCRIBED = 10  # members of a group that speak for what it reads and writes


@dataclass(frozen=True)
class Groups:
    """Components of an edit in groups, and what each group does as a whole.

    Attributes:
        table: one row per group, the lowest joint effect first: ``group`` (from 1), ``components``,
            ``where`` (how many in which matrices), the sums over members of their ``first_order``
            and exact ``single`` effects (NaN unless they were measured), the exact ``joint``
            effect with its ``stderr`` over examples, in nats, and the tokens that it ``reads`` and
            ``writes``.
        members: one row per component, in the order of the edit: ``layer, matrix, head, index,
            strength``, its ``group``, and its ``first_order`` and ``single`` effect.
        together: ``components, first_order, single, joint, stderr`` of the whole edit.
        n_examples: examples that effects are means over.
        provenance: model, data and versions.
    """

    table: pd.DataFrame
    members: pd.DataFrame
    together: dict[str, Any]
    n_examples: int
    provenance: Provenance

    def __len__(self) -> int:
        return len(self.table)

    def show(self) -> None:
        """Print the table of the groups."""
        print(self)

    def __str__(self) -> str:
        shown = self._shown().to_string(index=False, float_format="{:+.4g}".format)
        return f"{self._title()}\n{shown}"

    def _repr_html_(self) -> str:
        shown = self._shown().to_html(index=False, float_format="{:+.4g}".format)
        return f"<p>{html.escape(f'{self._title()} {_NOTE}')}</p>{shown}"

    def _title(self) -> str:
        return (
            f"{self.together['components']:,} components in {len(self)} groups, "
            f"{self.n_examples} examples; all together {self.together['joint']:+.4g} nats."
        )

    def _shown(self) -> pd.DataFrame:
        return self.table.dropna(axis=1, how="all")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON file."""
        tables = {name: getattr(self, name).to_dict(orient="list") for name in _TABLES}
        together = {name: [self.together[name]] for name in _TOTALS}
        rest = {"n_examples": self.n_examples, "provenance": self.provenance.model_dump()}
        save_record(path, "groups", {**tables, "together": together, **rest})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Groups":
        """Read back what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            FileFormatError: the file is truncated or foreign.
        """
        found = load_record(path, "groups")
        try:
            tables = {name: pd.DataFrame(found[name]) for name in _TABLES}
            together = {name: found["together"][name][0] for name in _TOTALS}
            provenance = Provenance(**found["provenance"])
            return cls(
                **tables, together=together, n_examples=found["n_examples"], provenance=provenance
            )
        except KeyError as error:
            raise FileFormatError(f"{path} lacks {error}.") from error


def groups(
    model: TransformerBridge,
    spectra: Spectra,
    frozen: FrozenSet,
    data: Dataset,
    *,
    count: int = 12,
    singles: bool = False,
    top: int = 5,
    metric: Metric = answer_loss,
    limit: int = 10_000,
    batch_size: int = 50,
    progress: bool = True,
) -> Groups:
    """Group the components of an edit by the examples that they act on, and freeze each group.

    Costs a backward pass over ``data``, and a forward pass for each group.

    Args:
        model: in eval mode, unedited.
        spectra: the decomposition that ``frozen`` was chosen from.
        frozen: the components, with their strengths and what takes their place.
        data: examples that effects are means over.
        count: groups; fewer where there are not as many components.
        singles: also freeze every component alone, a forward pass for each.
        top: tokens to name of what a group reads and writes.
        metric: a number per example; the loss in nats by default.
        limit: most components: memory grows with their square.
        batch_size: examples per pass.
        progress: show progress bars.

    Raises:
        ValueError: nothing is frozen, or more than ``limit``; ``count`` or ``top`` below 1; fewer
            than three examples; a model in training mode or with other weights.
    """
    check_data(data)
    _check(len(frozen), len(data), count, top, limit)
    check_eval_mode(model)
    spectra = spectra.on(model)
    frozen = replace(frozen, spectra=spectra, directions=None)
    options: dict[str, Any] = {"metric": metric, "batch_size": batch_size, "progress": progress}
    effects = edit_effects(model, frozen, data, **options)
    label = clustered(effects, count)
    sets = [frozen.part(np.flatnonzero(label == g)) for g in np.unique(label)]
    joint = joint_effects(model, [*sets, frozen], data, **options)
    order = np.argsort(joint[:-1].mean(1), kind="stable")
    label = np.argsort(order)[label]
    single = np.full(len(frozen), np.nan)
    if singles:
        alone = [frozen.part(np.array([row])) for row in range(len(frozen))]
        single = joint_effects(model, alone, data, **options).mean(1)
    members = frozen.components.reset_index(drop=True).assign(
        group=label + 1, first_order=effects.mean(1), single=single
    )
    rows = []
    for group, exact in enumerate(joint[order]):
        own = np.flatnonzero(label == group)
        named = _tokens(model, spectra, members.iloc[own], effects[own], top)
        where = _where(members.iloc[own])
        totals = _totals(members.iloc[own], exact)
        rows.append({"group": group + 1, "where": where, **totals, **named})
    columns = ["group", "components", "where", *_TOTALS[1:], "reads", "writes"]
    return Groups(
        table=pd.DataFrame(rows)[columns],
        members=members,
        together=_totals(members, joint[-1]),
        n_examples=len(data),
        provenance=Provenance.of(model, task_hash=data_hash(data)),
    )


def _check(n_components: int, n_examples: int, count: int, top: int, limit: int) -> None:
    if count < 1 or top < 1:
        raise ValueError(f"count={count}, top={top}: ask for one at least.")
    if n_components == 0:
        raise ValueError("Nothing is frozen: there is nothing to group.")
    if n_components > limit:
        raise ValueError(
            f"{n_components} components are more than limit={limit}: their distances would take "
            f"{4e-9 * n_components**2:.1f} GB. Freeze fewer, or raise limit=."
        )
    if n_examples < 3:
        raise ValueError(f"{n_examples} examples tell no correlation: give three at least.")


def edit_effects(
    model: TransformerBridge,
    frozen: FrozenSet,
    data: Dataset,
    *,
    metric: Metric = answer_loss,
    batch_size: int = 50,
    progress: bool = True,
) -> Float[np.ndarray, "component example"]:
    """First-order effect of each component of an edit, at its strength, on every example."""
    edits = site_edits(frozen, frozen.directions_on(model))
    sites = [edit.directions.site for edit in edits.values()]
    rows = by_matrix(frozen.components)
    effects = np.empty((len(frozen), len(data)))

    def passes(size: int) -> None:
        finite = FiniteCheck()
        batches = make_batches(data, model, size)
        for batch in tqdm(batches, desc="effects", unit="batch", disable=not progress):

            def keep(
                site: Site, h: Activation, g: Activation, values: Tensor, batch: Batch = batch
            ) -> None:
                edit = edits[site.name]
                mean = edit.table[edit.positions.of_batch(batch).to(edit.table.device)]
                moved = moved_coordinates(h, edit.directions, mean, edit.strength)
                effect = without_padding(moved * edit.directions.slopes(g.to(mean)), batch).sum(1)
                effects[np.ix_(rows[site.name], np.array(batch.indices))] = (
                    effect[:, 0].T.cpu().double()
                )

            forward_backward(model, sites, batch, metric, keep, finite)
        finite.check()

    fitting(model, "score", min(batch_size, len(data)), passes)
    return effects


def clustered(
    effects: Float[np.ndarray, "component example"], count: int
) -> Int[np.ndarray, " component"]:
    """Group of every component, from 0: Ward's clusters of effects standardised over examples."""
    away = effects - effects.mean(1, keepdims=True)
    length = np.linalg.norm(away, axis=1, keepdims=True)
    # What differs by no more than rounding does not vary.
    varies = length > 1e-7 * np.linalg.norm(effects, axis=1, keepdims=True)
    away = np.where(varies, away / np.where(varies, length, 1.0), 0.0)
    if len(away) == 1:
        return np.zeros(1, np.int64)
    found = fcluster(linkage(away, "ward"), count, "maxclust")
    return np.asarray(found, np.int64) - 1


def _totals(members: pd.DataFrame, exact: np.ndarray) -> dict[str, Any]:
    return {
        "components": len(members),
        "first_order": float(members["first_order"].sum()),
        "single": float(members["single"].sum(skipna=False)),
        "joint": float(exact.mean()),
        "stderr": float(exact.std(ddof=1) / np.sqrt(len(exact))),
    }


def _where(members: pd.DataFrame, most: int = 4) -> str:
    """``L1.W_in 9, L1.W_out 3``: the matrices with most of the members, and how many others."""
    names = "L" + members["layer"].astype(str) + "." + members["matrix"].astype(str)
    counts = names.value_counts(sort=False).sort_values(ascending=False, kind="stable")
    parts = [f"{name} {n}" for name, n in counts.head(most).items()]
    rest = counts.iloc[most:]
    return ", ".join([*parts, f"{rest.sum()} elsewhere"] if len(rest) else parts)


def _tokens(
    model: TransformerBridge, spectra: Spectra, members: pd.DataFrame, effects: np.ndarray, top: int
) -> dict[str, str]:
    """What the members with the largest effects read and write."""
    size = np.sqrt((effects**2).mean(1))
    chosen = members[COMPONENT].assign(size=size).nlargest(_DESCRIBED, "size")
    nodes = make_nodes(spectra, chosen)
    weight = nodes.members.merge(chosen, on=COMPONENT).groupby("number")["size"].max().to_numpy()
    return dict(zip(("reads", "writes"), shared_tokens(model, nodes, weight, top), strict=True))
