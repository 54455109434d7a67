"""What freezing a component is predicted to do to text, and the constant that does the least.

1. Freezing moves the log-likelihood of passage b by ``e_b = Σ_t (c̄_t − c_bt) s_bt`` to first order
   (coordinate c, slope s of the passage's loss), and the divergence from the unedited model is
   ``½ E[e_b²]`` to second order: the Fisher information where the model wrote the text itself, and
   the empirical one on other text.
2. With δ added to the mean at every position it is ``e_b + δ g_b``, ``g_b = Σ_t s_bt``. So the
   harm is a parabola in δ, three sums over one forward and one backward pass, and lowest at
   ``−Σ e_b g_b / Σ g_b²``: a regression of what text loses on what a constant gives back.

Components count as if alone. Source: this package; constants chosen for a loss are *optimal
ablation* (Li and Janson, arXiv 2409.09951), there for the task and by training.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.matrices import Site
from eigenlens.metrics import answer_loss
from eigenlens.passes import Activation, FiniteCheck, forward_backward, without_padding
from eigenlens.scoring import Scores
from eigenlens.scoring.references import split_table
from eigenlens.tasks.batches import Batch

_Each = Float[Tensor, " component"]


@dataclass(frozen=True)
class PredictedHarm:
    """The parabola of each component, in nats per answer token.

    Attributes:
        square: ``½ Σ_b e_b²`` per token: the harm of freezing under the means as they are.
        cross: ``½ Σ_b e_b g_b`` per token.
        slope_square: ``½ Σ_b g_b²`` per token.
    """

    square: _Each
    cross: _Each
    slope_square: _Each

    def __add__(self, other: "PredictedHarm") -> "PredictedHarm":
        return PredictedHarm(
            self.square + other.square,
            self.cross + other.cross,
            self.slope_square + other.slope_square,
        )

    def at(self, shift: _Each) -> _Each:
        """The harm of freezing with ``shift`` added to the means, in units of the coordinate."""
        harm = self.square + 2 * shift * self.cross + shift.square() * self.slope_square
        return harm.clamp_min(0)  # below it by rounding alone

    def best_shift(self) -> _Each:
        """The shift of least harm; 0 where no constant makes a difference."""
        found = self.slope_square > 0
        return torch.where(found, -self.cross / self.slope_square.where(found, 1.0), 0.0)


def predicted_harm(
    model: TransformerBridge, scores: Scores, batches: Sequence[Batch], *, progress: bool = True
) -> PredictedHarm:
    """Predict what freezing each component of ``scores`` does to these passages.

    Args:
        model: unedited, in eval mode.
        scores: give the components and the means that take their place.
        batches: passages, as prompts and answers.
        progress: show a progress bar.

    Raises:
        ValueError: scores without directions; NaN or infinite activations.
    """
    spectra, positions = scores.spectra_on(model), scores.means.positions
    tables = split_table(spectra, torch.tensor(scores.means.table()))
    zero = {name: torch.zeros_like(s.sigma, dtype=torch.float64) for name, s in spectra.items()}
    square, cross, slope_square = ({name: z.clone() for name, z in zero.items()} for _ in range(3))
    sites, finite = [s.site for s in spectra.values()], FiniteCheck()
    for batch in tqdm(batches, desc="predict harm", unit="batch", disable=not progress):
        rows = positions.of_batch(batch)

        def add(
            site: Site,
            h: Activation,
            g: Activation,
            values: Tensor,
            rows: Tensor = rows,
            batch: Batch = batch,
        ) -> None:
            s, table = spectra[site.name], tables[site.name]
            slopes = without_padding(s.slopes(g.to(s.dtype)), batch)
            moved = table[rows.to(table.device)] - s.coordinates(h.to(s.dtype))
            effect = reduce(moved * slopes, "batch pos head k -> batch head k", "sum").double()
            slope = reduce(slopes, "batch pos head k -> batch head k", "sum").double()
            square[site.name] += effect.square().sum(0)
            cross[site.name] += (effect * slope).sum(0)
            slope_square[site.name] += slope.square().sum(0)

        forward_backward(model, sites, batch, answer_loss, add, finite)
    finite.check()
    n_tokens = sum(int(batch.answer_mask.sum()) for batch in batches)
    parts = (square, cross, slope_square)
    return PredictedHarm(
        *(torch.cat([x.flatten().cpu() for x in part.values()]) / (2 * n_tokens) for part in parts)
    )
