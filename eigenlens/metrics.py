"""Metrics: callables from logits at the answer positions and the batch to a number per example.

``logits[:, j]`` predicts answer token ``j``. All metrics here are in nats and fall as the model
gets better, so that a negative score (the metric is predicted to fall) means a harmful component.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from datasets import Dataset
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from eigenlens.bridges import TransformerBridge
from eigenlens.inputs import check_data, check_model, check_tokenizer
from eigenlens.memory import fitting
from eigenlens.positions import prompt_ends_at
from eigenlens.tasks.batches import Batch, make_batches, tokenise
from eigenlens.tasks.candidates import candidates_of, with_answers

Metric = Callable[[Float[Tensor, "batch answer d_vocab"], Batch], Float[Tensor, " batch"]]


def check_eval_mode(model: TransformerBridge) -> None:
    """Raise ``ValueError`` for no bridge, or one in training mode, whose numbers are random."""
    check_model(model)
    if model.training or model.original_model.training:
        raise ValueError(
            "The model is in training mode, where dropout is random: call model.eval()."
        )


def answer_logits(model: TransformerBridge, batch: Batch) -> Float[Tensor, "batch answer d_vocab"]:
    """Logits that predict the answer, computed at these positions only.

    The unembedding is a quarter of a small model's forward pass, and most of it would be thrown
    away. Its input is cut by a hook: transformers' ``logits_to_keep`` leaves the slice
    non-contiguous, and the product with the unembedding then takes longer than all logits would.
    """
    n_answer = batch.answer.shape[1]

    def cut(value: Tensor, hook: object) -> Tensor:
        return value[:, -n_answer:].contiguous()

    mask = batch.attention_mask.long() if batch.is_padded else None
    with prompt_ends_at(model, batch.n_prompt), model.hooks(fwd_hooks=[("unembed.hook_in", cut)]):
        return model(batch.tokens, attention_mask=mask, use_cache=False)


def precise(logits: Tensor) -> Tensor:
    """Logits in float32 at least: log-likelihoods lose too much in half precision."""
    return logits if logits.dtype == torch.float64 else logits.float()


def answer_loss(
    logits: Float[Tensor, "batch answer d_vocab"], batch: Batch
) -> Float[Tensor, " batch"]:
    """Negative log-likelihood of the whole answer, in nats: the sum over its tokens.

    A token's is ``log(1 + e^−m)`` with its log-odds ``m``, taken without the token itself: the
    difference of two logarithms would be exactly 0 in float32 from a lead of 17 on, and with it
    every gradient.
    """
    batch = batch.to(logits.device)  # of the last layer
    answer = batch.answer[..., None]
    others = logits.scatter(-1, answer, -torch.inf).logsumexp(-1)
    odds = logits.gather(-1, answer)[..., 0] - others
    return -(F.logsigmoid(odds) * batch.answer_mask).sum(-1)


def not_a_number(what: str, index: int) -> ValueError:
    """The error for what is NaN or infinite of an example."""
    return ValueError(
        f"The {what} of example {index} is NaN or infinite: the model's activations overflow or "
        "hold NaN. Try dtype=float32, and check the weights."
    )


def checked_losses(
    logits: Float[Tensor, "batch answer d_vocab"], batch: Batch
) -> Float[Tensor, " batch"]:
    """:func:`answer_loss` on the CPU, of logits of any type.

    Raises:
        ValueError: a loss is NaN, which would pass for a wrong answer.
    """
    losses = answer_loss(precise(logits), batch).cpu()
    for index, loss in zip(batch.indices, losses.tolist(), strict=True):
        if math.isnan(loss):
            raise not_a_number("loss", index)
    return losses


def logit_diff(wrong: Tensor) -> Metric:
    """Metric ``logit(wrong) − logit(right)`` of the first answer token.

    Args:
        wrong: token id of the wrong answer of each example of the data set, ``[example]``.
    """

    def metric(
        logits: Float[Tensor, "batch answer d_vocab"], batch: Batch
    ) -> Float[Tensor, " batch"]:
        batch = batch.to(logits.device)
        other = wrong.to(logits.device)[batch.indices]
        first = logits[:, 0]
        right = first.gather(-1, batch.answer[:, :1])[:, 0]
        return first.gather(-1, other[:, None])[:, 0] - right

    return metric


def wrong_candidates(data: Dataset, tokenizer: PreTrainedTokenizerBase) -> Int[Tensor, " example"]:
    """First token of the other candidate of each example: what :func:`logit_diff` takes.

    Args:
        data: examples with two candidates each, the answer among them.
        tokenizer: the model's.

    Raises:
        ValueError: an example without exactly two candidates, one of them the answer, or whose
            candidates begin with the same token, so that no difference would be seen.
    """
    check_data(data)
    check_tokenizer(tokenizer)
    candidates = candidates_of(data)
    others = []
    for row, (answer, own) in enumerate(zip(data["answer"][:], candidates, strict=True)):
        wrong = [text for text in own if text != answer]
        if len(own) != 2 or len(wrong) != 1:
            raise ValueError(
                f"Example {row}: a logit difference needs two candidates, one of them the answer "
                f"{answer!r}, not {own}."
            )
        others.append((row, wrong[0]))
    right = [encoded.answer[0] for encoded in tokenise(data, tokenizer)]
    wrong_tokens = [
        encoded.answer[0] for encoded in tokenise(with_answers(data, others), tokenizer)
    ]
    for row, (one, other) in enumerate(zip(right, wrong_tokens, strict=True)):
        if one == other:
            raise ValueError(
                f"Example {row}: the candidates {candidates[row]} begin with the same token, so "
                "their first logits do not differ."
            )
    return torch.tensor(wrong_tokens)


def kl_to_unedited(model: TransformerBridge, data: Dataset, batch_size: int = 50) -> Metric:
    """Metric ``KL(unedited ‖ edited)`` in nats, summed over the answer positions.

    Runs ``model`` as it is now over ``data`` and keeps its log-probabilities
    (``examples × answer tokens × d_vocab`` floats) to compare later passes with.
    """
    kept: dict[int, Float[Tensor, "answer d_vocab"]] = {}
    check_data(data)

    def passes(size: int) -> None:
        with torch.no_grad():
            for batch in make_batches(data, model, size):
                logs = precise(answer_logits(model, batch)).log_softmax(-1).cpu()
                kept.update(zip(batch.indices, logs, strict=True))

    fitting(model, "evaluate", min(batch_size, len(data)), passes)

    def metric(
        logits: Float[Tensor, "batch answer d_vocab"], batch: Batch
    ) -> Float[Tensor, " batch"]:
        # Answers are padded on the right, differently from batch to batch.
        width = logits.shape[1]
        rows = [kept[index][:width] for index in batch.indices]
        before = torch.stack([F.pad(row, (0, 0, 0, width - len(row))) for row in rows])
        logs = logits.log_softmax(-1)
        divergence = F.kl_div(logs, before.to(logs), log_target=True, reduction="none").sum(-1)
        return torch.where(batch.answer_mask.to(logits.device), divergence, 0).sum(-1)

    return metric
