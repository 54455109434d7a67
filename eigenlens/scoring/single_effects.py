"""First-order effects of components on single examples, kept one by one.

What is a mean over examples, or follows from one, can then be had for any weighting of the examples
without running the model again: a part of them, or a bootstrap.
Memory: ``examples × components`` numbers.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from eigenlens.bridges import TransformerBridge
from eigenlens.inputs import check_data
from eigenlens.memory import fitting
from eigenlens.metrics import Metric, answer_loss
from eigenlens.passes import FiniteCheck, forward_backward
from eigenlens.scoring.accumulators import margin_effect, spread
from eigenlens.scoring.mean_effects import MeanEffects, PerExample
from eigenlens.scoring.scores import Scores
from eigenlens.tasks.batches import Batch, make_batches


@dataclass(frozen=True)
class SingleEffects:
    """Effects on every example.

    Attributes:
        scores: of the components; their means take the place of coordinates.
        rows: of ``scores.components``.
        effects: first order, in nats.
        metric: of each example, as it is.
    """

    scores: Scores
    rows: np.ndarray
    effects: Float[Tensor, "example component"]
    metric: Float[Tensor, " example"]

    @property
    def margins(self) -> Float[Tensor, "example component"]:
        """Change of the loss if the answer's log-odds move linearly."""
        return margin_effect(self.effects, self.metric)

    def weighted(self, weight: Float[np.ndarray, " example"]) -> Scores:
        """Scores of these components where every example counts ``weight`` times.

        Raises:
            ValueError: weights that do not sum to the number of examples, or are negative.
        """
        n = len(self.metric)
        if not np.isclose(weight.sum(), n) or weight.min() < 0:
            raise ValueError(f"Weights must not be negative and must sum to {n}.")
        w = torch.as_tensor(weight).to(self.effects)[:, None]
        columns: dict[str, Tensor] = {}
        for mean, std, values in (
            ("effect", "std", self.effects),
            ("margin", "margin_std", self.margins),
        ):
            total = (w * values).sum(0)
            columns |= {mean: total / n, std: spread(total, (w * values.square()).sum(0), n)}
        made = {name: value.cpu().double().numpy() for name, value in columns.items()}
        table = self.scores.components.iloc[self.rows].reset_index(drop=True)
        gone = dict.fromkeys(("position_square", "worst", "estimate"), np.nan)
        return replace(
            self.scores,
            components=table.assign(**made, **gone),
            means=self.scores.means[self.rows],
            n_examples=n,
        )


def single_effects(
    model: TransformerBridge,
    scores: Scores,
    data: Dataset,
    rows: np.ndarray | None = None,
    *,
    metric: Metric = answer_loss,
    batch_size: int = 50,
    progress: bool = True,
) -> SingleEffects:
    """Effects of components on every example of ``data``, in one forward and one backward pass.

    Args:
        model: in eval mode.
        scores: of the components; their means take the place of coordinates.
        data: the examples.
        rows: of ``scores.components``; default all.
        metric: a number per example; the loss in nats by default.
        batch_size: examples per pass.
        progress: show a progress bar.

    Raises:
        ValueError: scores without directions, or of other weights.
    """
    spectra = scores.spectra_on(model)
    chosen = np.arange(len(scores)) if rows is None else np.asarray(rows)
    own = dict(zip(spectra, _own_rows(chosen, spectra.sizes), strict=True))
    sites = [s.site for name, s in spectra.items() if len(own[name][0])]
    under_means = MeanEffects(spectra, scores.means)
    first = next(iter(spectra.values()))
    effects = torch.empty(len(data), len(chosen), dtype=first.dtype)
    values = torch.empty(len(data), dtype=torch.float64)
    check_data(data)

    def passes(size: int) -> None:
        finite = FiniteCheck()
        batches = make_batches(data, model, size)
        for batch in tqdm(batches, desc="effects", unit="batch", disable=not progress):

            def keep(
                name: str, effect: PerExample, slope: PerExample, batch: Batch = batch
            ) -> None:
                members, places = own[name]
                found = effect.flatten(1).cpu()[:, members]
                effects[torch.tensor(batch.indices)[:, None], places] = found

            handle = under_means.handler(batch, keep)
            found = forward_backward(model, sites, batch, metric, handle, finite)
            values[batch.indices] = found.cpu().double()
        finite.check()

    fitting(model, "score", min(batch_size, len(data)), passes)
    return SingleEffects(scores, chosen, effects, values)


def _own_rows(rows: np.ndarray, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    """For each matrix, which of its components are chosen, and where they stand in ``rows``."""
    starts = np.cumsum([0, *sizes])
    matrix = np.searchsorted(starts, rows, side="right") - 1
    places = [np.flatnonzero(matrix == number) for number in range(len(sizes))]
    return [
        (torch.from_numpy(rows[place] - start), torch.from_numpy(place))
        for place, start in zip(places, starts, strict=False)
    ]
