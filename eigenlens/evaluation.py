"""Measuring a model on a task, and comparing two measurements of the same examples."""

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from jaxtyping import Float
from tqdm.auto import tqdm

from eigenlens.bridges import TransformerBridge
from eigenlens.files import load_table, save_table
from eigenlens.inputs import check_data
from eigenlens.memory import fitting
from eigenlens.metrics import answer_logits, check_eval_mode, checked_losses
from eigenlens.provenance import Provenance, data_hash
from eigenlens.statistics import (
    Interval,
    bootstrap_interval,
    mcnemar,
    paired_interval,
    wilson_interval,
)
from eigenlens.tasks.batches import Batch, make_batches
from eigenlens.tasks.candidates import candidates_of, check_distinct, with_answers


@dataclass(frozen=True)
class Evaluation:
    """Loss and accuracy on a data set.

    Attributes:
        examples: one row each: ``prompt, answer, predicted, loss, tokens, correct`` and, for tasks
            with candidate answers, ``choice`` and ``choice_correct`` (missing for examples without
            candidates). ``predicted`` holds the most likely token at each answer position, decoded;
            ``loss`` is in nats per answer, which has so many ``tokens``.
        provenance: model, data hash and versions.
    """

    examples: pd.DataFrame
    provenance: Provenance

    @property
    def n(self) -> int:
        """Number of examples."""
        return len(self.examples)

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of an answer, in nats."""
        return float(self.examples["loss"].mean())

    @property
    def token_loss(self) -> float:
        """Mean negative log-likelihood of an answer token over all examples, in nats."""
        return float(self.examples["loss"].sum() / self.examples["tokens"].sum())

    @property
    def perplexity(self) -> float:
        """``exp`` of :attr:`token_loss`.

        With passages of plain text as prompts and answers (:mod:`eigenlens.tasks.text`), this is
        the perplexity of the text given a context of the prompt's length. Per token: comparable
        between edits of a model, not between tokenizers.
        """
        return math.exp(self.token_loss)

    @property
    def accuracy(self) -> float:
        """Share of examples whose answer tokens all are the most likely ones (exact match)."""
        return float(self.examples["correct"].mean())

    @property
    def interval(self) -> Interval:
        """Wilson 95 % interval of :attr:`accuracy`."""
        return wilson_interval(int(self.examples["correct"].sum()), self.n)

    @property
    def choice_accuracy(self) -> float | None:
        """Share whose answer is the most likely candidate, of the examples with candidates.

        ``None`` where no example has any.
        """
        return float(self._chosen.mean()) if self.choice_n else None

    @property
    def choice_interval(self) -> Interval | None:
        """Wilson 95 % interval of :attr:`choice_accuracy`."""
        if not self.choice_n:
            return None
        return wilson_interval(int(self._chosen.sum()), self.choice_n)

    @property
    def choice_n(self) -> int:
        """Number of examples with candidates."""
        return len(self._chosen)

    @property
    def _chosen(self) -> pd.Series:
        """Whether the answer is the most likely candidate, of the examples with candidates."""
        if "choice_correct" not in self.examples:
            return pd.Series(dtype=bool)
        return self.examples["choice_correct"].dropna().astype(bool)

    def summary(self) -> dict[str, Any]:
        """The numbers of ``metrics.json``."""
        numbers: dict[str, Any] = {
            "accuracy": self.accuracy,
            "loss": self.loss,
            "n": self.n,
            "interval": list(self.interval),
        }
        if self.choice_interval is not None:
            numbers["choice_accuracy"] = self.choice_accuracy
            numbers["choice_interval"] = list(self.choice_interval)
            numbers["choice_n"] = self.choice_n
        return numbers

    def _repr_html_(self) -> str:
        low, high = self.interval
        head = (
            f"<p>accuracy {self.accuracy:.1%} (95 % interval {low:.1%} … {high:.1%}), "
            f"loss {self.loss:.3f} nats, {self.n} examples</p>"
        )
        return head + self.examples.head(8).to_html(index=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one parquet file."""
        save_table(path, "evaluation", self.examples, {"provenance": self.provenance.model_dump()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Evaluation":
        """Read back what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            FileFormatError: the file is truncated or foreign.
        """
        examples, metadata = load_table(path, "evaluation")
        return cls(examples, Provenance(**metadata["provenance"]))


def evaluate(
    model: TransformerBridge,
    data: Dataset,
    *,
    batch_size: int = 50,
    choices: bool = True,
    progress: bool = True,
) -> Evaluation:
    """Loss, exact-match and (where there are candidates) choice accuracy of ``model`` as it is.

    Answers are scored whole, given the prompt: exact match means that every answer token is the
    most likely one, which is what greedy decoding would write.

    Args:
        model: in eval mode.
        data: examples with the columns ``prompt``, ``answer`` and perhaps ``candidates``.
        batch_size: examples per pass.
        choices: measure choice accuracy too, which takes a pass per wrong candidate. Searches
            leave it out: they choose by exact match and loss.
        progress: show a progress bar.

    Raises:
        ValueError: no ``TransformerBridge`` or one in training mode; no ``Dataset`` of prompts and
            answers, or an empty one; examples that do not tokenise or fit the context; an
            answer that is not among its candidates, or two candidates that are the same tokens; a
            loss that is NaN.
    """
    check_eval_mode(model)
    check_data(data)
    candidates = candidates_of(data)
    _check_answers(data, candidates)
    if choices:
        check_distinct(model, data, candidates)

    def passes(size: int) -> dict[int, dict[str, Any]]:
        rows: dict[int, dict[str, Any]] = {}
        batches = make_batches(data, model, size)
        with torch.no_grad():
            for batch in tqdm(batches, desc="evaluate", unit="batch", disable=not progress):
                rows |= _measure(model, batch)
        return rows

    rows = fitting(model, "evaluate", min(batch_size, len(data)), passes)
    measured = pd.DataFrame([rows[index] for index in range(len(data))])
    examples = pd.DataFrame({name: list(data[name][:]) for name in ("prompt", "answer")})
    examples = examples.join(measured)
    if choices and any(candidates):
        examples = examples.join(_choices(model, data, candidates, examples["loss"], batch_size))
    return Evaluation(examples, Provenance.of(model, task_hash=data_hash(data)))


def _measure(model: TransformerBridge, batch: Batch) -> dict[int, dict[str, Any]]:
    logits = answer_logits(model, batch)
    loss = checked_losses(logits, batch)
    best, asked, there = (x.cpu() for x in (logits.argmax(-1), batch.answer, batch.answer_mask))
    correct = ((best == asked) | ~there).all(-1)
    predicted = [
        model.tokenizer.decode(tokens[mask]) for tokens, mask in zip(best, there, strict=True)
    ]
    lengths = there.sum(-1).tolist()
    columns = zip(batch.indices, predicted, loss.tolist(), lengths, correct.tolist(), strict=True)
    return {i: {"predicted": p, "loss": x, "tokens": n, "correct": c} for i, p, x, n, c in columns}


def _check_answers(data: Dataset, candidates: Sequence[Sequence[str]]) -> None:
    for row, (answer, own) in enumerate(zip(data["answer"][:], candidates, strict=True)):
        if own and answer not in own:
            raise ValueError(f"Example {row}: the answer {answer!r} is not among {own}.")


def _choices(
    model: TransformerBridge,
    data: Dataset,
    candidates: Sequence[Sequence[str]],
    answer_losses: pd.Series,
    batch_size: int,
) -> pd.DataFrame:
    """Most likely candidate of each example that has candidates.

    The losses of the right answers are known already: only the other candidates are run.
    """
    answers = data["answer"][:]
    table = pd.DataFrame(
        [(row, text, text == answers[row]) for row, own in enumerate(candidates) for text in own],
        columns=["row", "text", "right"],
    )
    table["loss"] = table["row"].map(answer_losses)
    wrong = table[~table["right"]]
    table.loc[wrong.index, "loss"] = _losses(
        model, data, list(zip(wrong["row"], wrong["text"], strict=True)), batch_size
    )
    best = table.loc[table.groupby("row")["loss"].idxmin()].set_index("row")
    chosen = {"choice": best["text"], "choice_correct": best["right"]}
    # Of the type that can miss: a plain column of truth values would turn into one of objects.
    return pd.DataFrame(chosen).astype({"choice_correct": "boolean"})


def _losses(
    model: TransformerBridge, data: Dataset, answers: Sequence[tuple[int, str]], batch_size: int
) -> Float[np.ndarray, " answer"]:
    """Loss of other answers to the prompts in these rows."""
    losses = np.empty(len(answers))
    if not answers:
        return losses
    others, rows = with_answers(data, answers), [row for row, _ in answers]

    def passes(size: int) -> None:
        with torch.no_grad():
            for batch in make_batches(others, model, size, rows=rows):
                losses[batch.indices] = checked_losses(answer_logits(model, batch), batch).numpy()

    fitting(model, "evaluate", min(batch_size, len(others)), passes)
    return losses


def preference(accuracy: float, loss: float, components: int = 0) -> tuple[float, ...]:
    """The rule of every choice on validation data: the larger is preferred.

    Highest exact-match accuracy, then lowest loss, then fewest components.
    """
    return (accuracy, -loss, -float(components))


def perplexity(model: TransformerBridge, data: Dataset, *, batch_size: int = 50) -> float:
    """:attr:`Evaluation.perplexity` of ``model`` as it is.

    Raises:
        ValueError: as :func:`evaluate`.
    """
    measured = evaluate(model, data, batch_size=batch_size, choices=False, progress=False)
    return measured.perplexity


def majority_accuracy(train: Dataset, test: Dataset) -> float:
    """Accuracy on ``test`` of always giving the most frequent answer of ``train``.

    Of equally frequent answers, the one that comes first in ``train`` is given.

    Raises:
        ValueError: no ``Dataset``, or an empty one.
    """
    check_data(train)
    check_data(test)
    if not len(train) or not len(test):
        raise ValueError("The majority answer needs examples on both sides.")
    ((answer, _),) = Counter(train["answer"][:]).most_common(1)
    return sum(other == answer for other in test["answer"][:]) / len(test)


@dataclass(frozen=True)
class Comparison:
    """Two evaluations of the same examples, paired.

    Attributes:
        accuracy_change: after − before, with Newcombe's 95 % interval for paired shares.
        loss_change: after − before in nats, with its 95 % bootstrap interval.
        gained, lost: examples that became right, and wrong.
        p_value: exact McNemar test of ``gained`` against ``lost``.
        n: number of examples.
    """

    accuracy_change: float
    accuracy_interval: Interval
    loss_change: float
    loss_interval: Interval
    gained: int
    lost: int
    p_value: float
    n: int

    def summary(self) -> dict[str, Any]:
        """The numbers of ``metrics.json``."""
        return {
            "accuracy_change": self.accuracy_change,
            "accuracy_interval": list(self.accuracy_interval),
            "loss_change": self.loss_change,
            "loss_interval": list(self.loss_interval),
            "gained": self.gained,
            "lost": self.lost,
            "p_value": self.p_value,
            "n": self.n,
        }

    def _repr_html_(self) -> str:
        (low, high), (below, above) = self.accuracy_interval, self.loss_interval
        table = pd.DataFrame(
            {
                "change": [f"{self.accuracy_change:+.1%}", f"{self.loss_change:+.3f} nats"],
                "95 % interval": [f"{low:+.1%} … {high:+.1%}", f"{below:+.3f} … {above:+.3f}"],
            },
            index=["accuracy", "loss"],
        )
        note = (
            f"after − before on {self.n} examples: {self.gained} became right, {self.lost} wrong "
            f"(McNemar p = {self.p_value:.2g})"
        )
        return f"<p>{note}</p>{table.to_html()}"


def compare(
    before: Evaluation, after: Evaluation, *, seed: int = 0, n_resamples: int = 2000
) -> Comparison:
    """Paired comparison: exact McNemar test, Newcombe's interval, and a bootstrap of the loss.

    Raises:
        ValueError: the two evaluations are not of the same examples.
    """
    keys = ["prompt", "answer"]
    if not before.examples[keys].equals(after.examples[keys]):
        raise ValueError("These evaluations are not of the same examples, in the same order.")
    was, now = (e.examples["correct"].to_numpy(bool) for e in (before, after))
    gained, lost = int((now & ~was).sum()), int((was & ~now).sum())
    both, neither = int((now & was).sum()), int((~now & ~was).sum())
    loss = (after.examples["loss"] - before.examples["loss"]).to_numpy()
    return Comparison(
        accuracy_change=(gained - lost) / len(now),
        accuracy_interval=paired_interval(both, gained, lost, neither),
        loss_change=float(loss.mean()),
        loss_interval=bootstrap_interval(loss, seed=seed, n_resamples=n_resamples),
        gained=gained,
        lost=lost,
        p_value=mcnemar(gained, lost),
        n=len(now),
    )
