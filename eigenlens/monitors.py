"""Signs that an edit broke a model: what its answers look like over many inputs.

An edit that goes too far makes a model answer the same whatever it is asked. That shows before
accuracy tells: the distribution over the vocabulary no longer varies with the input, and the same
few answers are given to all.
"""

from dataclasses import asdict, dataclass

import torch
from datasets import Dataset
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.metrics import answer_logits, check_eval_mode
from eigenlens.tasks.batches import make_batches


@dataclass(frozen=True)
class OutputStatistics:
    """The distribution p of the first answer token, over the examples of a data set.

    Attributes:
        entropy: mean over examples of ``H(p)``, in nats.
        variance: ``Σ_token Var_examples p(token)``, between 0 (the same for every input) and 1.
        information: ``H(mean p) − mean H(p)``, the mutual information of input and token, in nats.
        most_common: share of examples that get the most frequent first token.
        n: examples.
    """

    entropy: float
    variance: float
    information: float
    most_common: float
    n: int

    def summary(self) -> dict[str, float]:
        """The numbers by name."""
        return asdict(self)


def output_statistics(
    model: TransformerBridge, data: Dataset, *, batch_size: int = 50
) -> OutputStatistics:
    """Measure ``model`` as it is, in one forward pass over ``data``.

    Raises:
        ValueError: a model in training mode, or an empty data set.
    """
    check_eval_mode(model)
    batches = make_batches(data, model, batch_size)
    n = len(data)
    entropy, second = 0.0, 0.0
    first: Tensor | float = 0.0
    tokens = []
    for batch in batches:
        with torch.no_grad():
            log_p = answer_logits(model, batch)[:, 0].double().log_softmax(-1)
        p = log_p.exp()
        entropy += float(torch.special.entr(p).sum())
        first = first + p.sum(0)
        second += float(p.square().sum())
        tokens.append(p.argmax(-1))
    mean = torch.as_tensor(first) / n
    counts = torch.cat(tokens).unique(return_counts=True)[1]
    return OutputStatistics(
        entropy=entropy / n,
        variance=second / n - float(mean.square().sum()),
        information=float(torch.special.entr(mean).sum()) - entropy / n,
        most_common=int(counts.max()) / n,
        n=n,
    )
