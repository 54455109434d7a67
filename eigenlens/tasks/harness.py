"""The tasks as definitions of lm-evaluation-harness: YAML over local files, prompts to the letter.

What the harness measures there is what eigenlens measures on the same examples, in other units:

- ``eigenlens_cb``, ``eigenlens_copa``, ``eigenlens_rte`` read the official validation file, as the
  test split of :func:`eigenlens.load_task` does, in its order (the harness' ``--limit N`` is
  ``n_test=N``): ``acc`` is ``Evaluation.choice_accuracy``.
- ``eigenlens_wikitext`` reads the test passages of ``wikitext``, whose answers are scored given
  their prompts: ``acc`` is ``Evaluation.accuracy``. The harness' ``perplexity`` is per passage: its
  logarithm is ``Evaluation.loss``, and times passages per answer token that of
  :func:`eigenlens.perplexity`.
- ``eigenlens_wikitext_rolling`` scores the same passages whole, behind the token that begins a
  text: the logarithm of ``byte_perplexity``, times bytes per token, is that of
  :func:`eigenlens.perplexity` with this token as the prompt and the passage as the answer. (Words,
  as the harness counts them, would do in place of bytes.)
"""

import json
import os
from pathlib import Path
from typing import Any

import yaml

from eigenlens.files import write_text
from eigenlens.folders import checked_folder
from eigenlens.tasks.sources import MissingDataError, data_folder, expanded
from eigenlens.tasks.superglue import FORMATS, Format, official_file
from eigenlens.tasks.text import wikitext

_TAG = "eigenlens"  # of all of them together


def write_harness_tasks(
    folder: str | os.PathLike[str], data: str | os.PathLike[str] | None = None
) -> list[str]:
    """Write task definitions for the harness' ``--include_path``, and the passages they read.

    The definitions name files of SuperGLUE where they lie.

    Args:
        folder: where they go.
        data: folder of the official files, as the argument ``data`` of the tasks (default: the
            environment variable ``EIGENLENS_DATA``).

    Returns:
        The names of the tasks; their tag ``eigenlens`` stands for all.

    Raises:
        MissingDataError: no folder is named, or it lacks a file.
        ValueError: a damaged text file, or the folder is a file.
    """
    source = data_folder(None if data is None else expanded(data))
    if source is None:
        raise MissingDataError(
            "The harness reads local files: name their folder with data= or EIGENLENS_DATA."
        )
    out = checked_folder(expanded(folder)).absolute()
    passages = out / "wikitext.jsonl"
    definitions = {
        name: _choice(form, official_file(source, name, "val")) for name, form in FORMATS.items()
    } | {"wikitext": _answers(passages), "wikitext_rolling": _texts(passages)}
    rows = wikitext(data=source).test
    lines = (json.dumps({name: row[name] for name in ("prompt", "answer")}) for row in rows)
    write_text(passages, "".join(f"{line}\n" for line in lines))
    for name, definition in definitions.items():
        whole = {"task": f"{_TAG}_{name}", "tag": _TAG, **definition}
        text = yaml.safe_dump(whole, sort_keys=False, allow_unicode=True)
        write_text(out / f"{_TAG}_{name}.yaml", text)
    return [f"{_TAG}_{name}" for name in definitions]


def _choice(form: Format, file: Path) -> dict[str, Any]:
    """Which candidate is the most likely one; fields of the official rows fill the templates."""
    fields = {name: f"{{{{ {name} }}}}" for name in form.texts}
    if form.questions:
        fields["question"] = f"{{{{ {dict(form.questions)!r}[question] }}}}"
    return {
        **_files(file),
        "output_type": "multiple_choice",
        "doc_to_text": form.template.format(**fields),
        "doc_to_choice": list(form.answers.values()),
        "doc_to_target": f"{{{{ {list(form.answers)!r}.index(label) }}}}",
        **_metrics(acc="mean"),
    }


def _answers(file: Path) -> dict[str, Any]:
    """How likely the answer is, given the prompt."""
    return {
        **_files(file),
        "output_type": "loglikelihood",
        "doc_to_text": "prompt",  # a field's name alone is its value as it is
        "doc_to_target": "answer",
        **_metrics(perplexity="perplexity", acc="mean"),
    }


def _texts(file: Path) -> dict[str, Any]:
    """How likely the whole text is."""
    return {
        **_files(file),
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{ prompt ~ answer }}",
        **_metrics(
            word_perplexity="weighted_perplexity",
            byte_perplexity="weighted_perplexity",
            bits_per_byte="bits_per_byte",
        ),
    }


def _files(file: Path) -> dict[str, Any]:
    return {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file.absolute())}},
        "test_split": "test",
        "target_delimiter": "",  # answers begin with their space
    }


def _metrics(**aggregations: str) -> dict[str, Any]:
    """Metrics, each with the harness' name of how it is taken together."""
    return {
        "metric_list": [
            {"metric": name, "aggregation": how, "higher_is_better": name == "acc"}
            for name, how in aggregations.items()
        ],
        "metadata": {"version": 1},
    }
