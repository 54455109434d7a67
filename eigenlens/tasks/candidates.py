"""The candidate answers of examples, of which some may have none."""

from collections.abc import Sequence

from datasets import Dataset

from eigenlens.bridges import TransformerBridge
from eigenlens.inputs import tokenizer_of
from eigenlens.tasks.tokenising import tokenise


def candidates_of(data: Dataset) -> list[list[str]]:
    """Candidates of each example; an empty list for ``None`` and without such a column.

    Raises:
        ValueError: candidates that are no list of texts.
    """
    if "candidates" not in data.column_names:
        return [[] for _ in range(len(data))]
    found = [[] if own is None else own for own in data.with_format(None)["candidates"][:]]
    for row, own in enumerate(found):
        if not isinstance(own, list) or not all(isinstance(text, str) for text in own):
            raise ValueError(f"Example {row}: the candidates must be a list of texts, not {own!r}.")
    return found


def with_answers(data: Dataset, answers: Sequence[tuple[int, str]]) -> Dataset:
    """The prompts of the examples in these rows, with other answers."""
    prompts = data["prompt"][:]
    return Dataset.from_dict(
        {"prompt": [prompts[row] for row, _ in answers], "answer": [text for _, text in answers]}
    )


def check_distinct(
    model: TransformerBridge, data: Dataset, candidates: Sequence[Sequence[str]]
) -> None:
    """Raise ``ValueError`` if two candidates of an example are the same tokens."""
    answers = [(row, text) for row, own in enumerate(candidates) for text in own]
    encoded = tokenise(
        with_answers(data, answers),
        tokenizer_of(model),
        prepend_bos=bool(model.cfg.default_prepend_bos),
        rows=[row for row, _ in answers],
    )
    seen: dict[tuple[int, ...], int] = {}
    for place, ((row, text), example) in enumerate(zip(answers, encoded, strict=True)):
        first = seen.setdefault((row, *example.answer), place)
        if first != place:
            raise ValueError(
                f"Example {row}: the candidates {answers[first][1]!r} and {text!r} are the same "
                "tokens, so that neither is likelier: leave one of them out."
            )
