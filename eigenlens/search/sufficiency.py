"""What keeps a task: the goal of ``learned(keep=True)``.

The loss of an example is ``KL(unedited ‖ edited)`` over its answer, in nats, while every component
without a place in the set is frozen. What is looked for is the least of that divergence and the
price of the share that is kept; of the steps of a search, the least on validation is chosen.

Memory: the unedited log-probabilities of train and validation, ``answer tokens × d_vocab`` floats.
"""

import torch
from datasets import Dataset
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.metrics import answer_logits, kl_to_unedited, precise
from eigenlens.tasks.batches import make_batches


class Sufficiency:
    """How far a model is from what it was, and what keeping a share of its components costs.

    Attributes:
        divergence: of examples of ``train``, named by their rows there.
    """

    def __init__(
        self,
        model: TransformerBridge,
        train: Dataset,
        validation: Dataset,
        price: float,
        batch_size: int,
    ) -> None:
        """Run the unedited model over the data.

        Args:
            model: unedited, in eval mode.
            train: examples to train on.
            validation: examples to choose on.
            price: of keeping all components, in nats.
            batch_size: examples per pass.
        """
        self.divergence = kl_to_unedited(model, train, batch_size)
        self._model, self._price = model, price
        self._batches = make_batches(validation, model, batch_size)
        self._on_validation = kl_to_unedited(model, validation, batch_size)

    def look(self, kept: float) -> dict[str, float]:
        """``kl`` of the model as it is now on validation, and ``objective``: with the price.

        Args:
            kept: share of the components that is not frozen.
        """
        with torch.no_grad():
            sums = [
                self._on_validation(precise(answer_logits(self._model, batch)), batch).sum()
                for batch in self._batches
            ]
        n = sum(len(batch) for batch in self._batches)
        kl = float(torch.stack(sums).sum()) / n
        return {"kl": kl, "objective": kl + self._price * kept}
