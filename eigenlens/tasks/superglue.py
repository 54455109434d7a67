"""CB, COPA and RTE of SuperGLUE with the prompts of the paper.

The official training file gives the train and validation splits, the official validation file the
test split (labels of the official test file are not public). Files are the official JSONL, from a
local folder or, in the same rows, from the Hub (:mod:`eigenlens.tasks.sources`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from eigenlens.tasks.rows import Row, read_rows
from eigenlens.tasks.sources import LocalPath, Revision, data_file, data_folder, from_hub
from eigenlens.tasks.splits import Example, hold_out, take, test_items
from eigenlens.tasks.task import Task, to_dataset

_COLLECTION = "superglue"
_HUB = "aps/super_glue"
_REVISION = "3de24cf8022e94f4ee4b9d55a6f539891524d646"


class SuperGlueConfig(BaseModel):
    """Arguments of ``cb``, ``copa`` and ``rte``.

    ``n_validation`` (default: 20 %) examples of the official training file are drawn by ``seed``
    for validation; train is ``n_train`` (default: all) of the others in random order, so that a
    smaller train split is part of a larger one. Test is ``n_test`` (default: all) examples of the
    official validation file in its order: the first ones for seed 0, and others for each further
    seed as long as there are others (50 of COPA's 100 serve two seeds). All, or more than half, are
    the same examples for every seed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: LocalPath | None = Field(default=None, description="folder that holds the official files")
    revision: Revision = _REVISION
    n_train: int | None = Field(default=None, ge=1)
    n_validation: int | None = Field(default=None, ge=1)
    n_test: int | None = Field(default=None, ge=1)
    seed: int = 0


@dataclass(frozen=True)
class Format:
    """How the rows of one data set become prompts and answers.

    Attributes:
        folder: of the official files.
        template: of the prompt.
        texts: fields of a row that the template takes as they are.
        answers: answer of each official label, in the Hub's order of labels.
        questions: what the template says for each value of the field ``question``.
    """

    folder: str
    template: str
    texts: tuple[str, ...]
    answers: Mapping[str | int, str]
    questions: Mapping[str, str] = field(default_factory=dict)


_CB = Format(
    folder="CB",
    template=(
        "Premise: {premise}\n\nHypothesis: {hypothesis}\n\n"
        "Does the premise entail, contradict or is neutral to the hypothesis?\n"
        "Answer (entails, contradicts, is neutral): The premise"
    ),
    texts=("premise", "hypothesis"),
    answers={"entailment": " entails", "contradiction": " contradicts", "neutral": " is neutral"},
)
_COPA = Format(
    folder="COPA",
    template=(
        "Premise: {premise}\n{question}\n\n"
        "Alternative 1: {choice1}\nAlternative 2: {choice2}\n\n"
        "What is the correct alternative?\nThe correct alternative is alternative"
    ),
    texts=("premise", "choice1", "choice2"),
    answers={0: " 1", 1: " 2"},
    questions={
        "cause": "What was the cause of this?",
        "effect": "What happened as a result?",
    },
)
_RTE = Format(
    folder="RTE",
    template=(
        "Premise: {premise}\n\nHypothesis: {hypothesis}\n\n"
        "Does the premise entail or contradict to the hypothesis?\n"
        "Answer (entails or contradicts): The premise"
    ),
    texts=("premise", "hypothesis"),
    answers={"entailment": " entails", "not_entailment": " contradicts"},
)


FORMATS = {"cb": _CB, "copa": _COPA, "rte": _RTE}


def cb(**arguments: Any) -> Task:
    """CommitmentBank: does the premise entail, contradict or leave open the hypothesis?"""
    return _build("cb", SuperGlueConfig(**arguments))


def copa(**arguments: Any) -> Task:
    """Choice of Plausible Alternatives: which of two is the cause or the effect?"""
    return _build("copa", SuperGlueConfig(**arguments))


def rte(**arguments: Any) -> Task:
    """Recognising Textual Entailment: does the premise entail the hypothesis?"""
    return _build("rte", SuperGlueConfig(**arguments))


def official_file(folder: Path, name: str, split: str) -> Path:
    """The official rows of a task's split, ``train`` or ``val``.

    Raises:
        MissingDataError: the folder does not hold them.
    """
    return data_file(folder, _COLLECTION, f"{FORMATS[name].folder}/{split}.jsonl")


def _build(name: str, config: SuperGlueConfig) -> Task:
    form = FORMATS[name]
    official = [
        [_example(row, form) for row in _rows(name, form, config, split)]
        for split in ("train", "val")
    ]
    validation, rest = hold_out(official[0], config.n_validation, config.seed, "n_validation")
    train = take(rest, config.n_train, "n_train")
    test = _test(official[1], config)
    return Task(
        name,
        to_dataset(train),
        to_dataset(validation),
        to_dataset(test),
        config.model_dump(mode="json"),
    )


def _test(examples: list[Example], config: SuperGlueConfig) -> list[Example]:
    first = range(len(take(examples, config.n_test, "n_test")))
    rows = [[row] for row in range(len(examples))]
    return [examples[row] for row in sorted(test_items(rows, len(first), config.seed, first))]


def _rows(name: str, form: Format, config: SuperGlueConfig, split: str) -> list[Row]:
    folder = data_folder(config.data)
    if folder is not None:
        return read_rows(official_file(folder, name, split))
    hub_split = {"train": "train", "val": "validation"}[split]
    official = dict(enumerate(form.answers))
    return [
        Row(
            {**fields, "label": official.get(fields["label"], fields["label"])},
            f"{_HUB} {name} {hub_split}, row {number}",
        )
        for number, fields in enumerate(from_hub(_HUB, name, hub_split, config.revision))
    ]


def _example(row: Row, form: Format) -> Example:
    texts = {name: row.text(name) for name in form.texts}
    if form.questions:
        texts["question"] = _one_of(row, "question", form.questions)
    return {
        "prompt": form.template.format(**texts),
        "answer": _one_of(row, "label", form.answers),
        "candidates": list(form.answers.values()),
    }


def _one_of(row: Row, name: str, known: Mapping[Any, str]) -> str:
    """What ``known`` holds for the value of a field; true is not 1, nor is 1.0."""
    value = row.get(name)
    if type(value) not in (str, int) or value not in known:
        raise row.error(
            f"unknown {name} {value!r}; it must be one of {', '.join(map(repr, known))}"
        )
    return known[value]
