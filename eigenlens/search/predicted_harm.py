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

from dataclasses import dataclass

import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.memory import fitting
from eigenlens.metrics import answer_loss
from eigenlens.passes import FiniteCheck, forward_backward
from eigenlens.scoring import Scores
from eigenlens.scoring.mean_effects import MeanEffects, PerExample
from eigenlens.tasks.batches import make_batches

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
    model: TransformerBridge,
    scores: Scores,
    data: Dataset,
    *,
    batch_size: int = 50,
    progress: bool = True,
) -> PredictedHarm:
    """Predict what freezing each component of ``scores`` does to these passages.

    Args:
        model: unedited, in eval mode.
        scores: give the components and the means that take their place.
        data: passages, as prompts and answers.
        batch_size: examples per pass.
        progress: show a progress bar.

    Raises:
        ValueError: scores without directions; NaN or infinite activations.
    """
    spectra = scores.spectra_on(model)
    sites = [s.site for s in spectra.values()]
    under_means = MeanEffects(spectra, scores.means)

    def passes(size: int) -> PredictedHarm:
        zeros = [
            torch.zeros((3, *s.sigma.shape), dtype=torch.float64, device=s.device)
            for s in spectra.values()
        ]
        sums, finite, n_tokens = dict(zip(spectra, zeros, strict=True)), FiniteCheck(), 0

        def add(name: str, effect: PerExample, slope: PerExample) -> None:
            e, g = effect.double(), slope.double()
            sums[name] += torch.stack([e * e, e * g, g * g]).sum(1)

        batches = make_batches(data, model, size)
        for batch in tqdm(batches, desc="predict harm", unit="batch", disable=not progress):
            handle = under_means.handler(batch, add)
            forward_backward(model, sites, batch, answer_loss, handle, finite)
            n_tokens += int(batch.answer_mask.sum())
        finite.check()
        total = torch.cat([each.flatten(1).cpu() for each in sums.values()], dim=1)
        return PredictedHarm(*(total / (2 * n_tokens)))

    return fitting(model, "score", min(batch_size, len(data)), passes)
