"""Prompting: the model as it is, with no example or with k solved ones before each prompt."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.baselines.baseline import Baseline, Search
from eigenlens.baselines.edits import NoEdit, StoredEdit
from eigenlens.tasks.batches import tokenise
from eigenlens.tasks.task import Task, to_dataset


class PromptEdit(StoredEdit):
    """Puts ``settings["prefix"]`` before every prompt."""

    def transform(self, data: Dataset) -> Dataset:
        """The same examples with longer prompts."""
        prefix = self.settings["prefix"]
        rows = [{**row, "prompt": prefix + row["prompt"]} for row in data.to_list()]
        return Dataset.from_list(rows, features=data.features)


@dataclass(frozen=True)
class ZeroShot(Baseline):
    """No edit."""

    name: str = "zero-shot"

    def find(self, search: Search) -> None:
        """The only candidate is the model as it is."""
        search.consider(NoEdit())


@dataclass(frozen=True)
class FewShot(Baseline):
    """k solved examples of the train split before each prompt; k is chosen on validation.

    Attributes:
        shots: the k to try; those whose prompts do not fit the context are left out.
        draws: sets of examples to try for each k.
        separator: between two examples.
    """

    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    draws: int = 1
    separator: str = "\n\n"
    name: str = "k-shot"

    def find(self, search: Search) -> None:
        """One candidate per k and draw.

        Raises:
            ValueError: no k fits the context of the model.
        """
        tried = False
        for k in self.shots:
            for draw in range(self.draws):
                edit = self._edit(search, k, draw)
                if fits(search.model, search.task, edit):
                    search.consider(edit, shots=k, draw=draw)
                    tried = True
        if not tried:
            raise ValueError(
                f"No number of shots of {self.shots} fits the context of "
                f"{search.model.cfg.n_ctx} tokens with the prompts of {search.task.name!r}."
            )

    def _edit(self, search: Search, k: int, draw: int) -> PromptEdit:
        train = search.task.train
        rows = random.Random(f"{search.seed} {draw}").sample(range(len(train)), min(k, len(train)))
        return PromptEdit(settings={"prefix": prefix(train, rows, self.separator), "rows": rows})


def prefix(data: Dataset, rows: Sequence[int], separator: str) -> str:
    """The examples in ``rows`` with their answers, each followed by ``separator``."""
    chosen = (data[row] for row in rows)
    return "".join(row["prompt"] + row["answer"] + separator for row in chosen)


def fits(model: TransformerBridge, task: Task, edit: StoredEdit) -> bool:
    """Whether all prompts of ``task`` fit the context under ``edit``, with every candidate answer.

    Only lengths of the test split are looked at.
    """
    rows = [
        {"prompt": row["prompt"], "answer": answer}
        for split in (task.train, task.validation, task.test)
        for row in split.to_list()
        for answer in {row["answer"], *(row["candidates"] or [])}
    ]
    texts = edit.transform(to_dataset(rows))
    bos = bool(model.cfg.default_prepend_bos)
    encoded = tokenise(texts, model.tokenizer, prepend_bos=bos)
    return max(example.n_read for example in encoded) <= model.cfg.n_ctx
