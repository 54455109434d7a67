"""Edits on the Hugging Face Hub: one file and its card; tokens are ``huggingface_hub``'s own."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import HTTPError

from eigenlens.evaluation import Evaluation
from eigenlens.export.card import edit_card
from eigenlens.folders import checked_folder
from eigenlens.frozen_set import FrozenSet

FILE = "frozen.safetensors"


class HubError(ValueError):
    """The Hub does not answer, or not with what was asked for."""


def push(path: Path, repo: str, *, private: bool = False) -> str:
    """Put an edit and its card into a repository of the Hub, which is made if it is not there.

    Args:
        path: the edit's file; the card tells what a run measured, if the file lies in its folder.
        repo: ``NAME`` or ``OWNER/NAME``.
        private: if the repository is made anew.

    Returns:
        The address of the repository.

    Raises:
        FileNotFoundError, FileFormatError: there is no such edit, or it is damaged.
        HubError: the Hub does not take it.
    """
    frozen = FrozenSet.load(path)
    card = edit_card(frozen, _measured(path, "before"), _measured(path, "after"))
    files = {FILE: path.read_bytes(), "README.md": card.encode()}
    api = HfApi(library_name="eigenlens")
    with _clear(repo):
        made = api.create_repo(repo, private=private, exist_ok=True)
        api.create_commit(
            made.repo_id,
            [CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message=f"{len(frozen):,} components {frozen.edit}",
        )
    return str(made)


def pull(repo: str, folder: Path, *, revision: str | None = None) -> Path:
    """Fetch an edit from the Hub, and check that it is one.

    Args:
        repo: ``OWNER/NAME``.
        folder: where its file goes.
        revision: branch, tag or commit (default: the newest).

    Raises:
        HubError: the Hub has no such edit, or does not answer.
        FileFormatError: the file is no edit.
        ValueError: the folder is a file.
    """
    checked_folder(folder)
    with _clear(repo):
        path = Path(hf_hub_download(repo, FILE, revision=revision, local_dir=folder))
    FrozenSet.load(path)
    return path


def _measured(path: Path, when: str) -> Evaluation | None:
    table = path.with_name(f"{when}.parquet")
    return Evaluation.load(table) if table.is_file() else None


@contextmanager
def _clear(repo: str) -> Iterator[None]:
    """What ``huggingface_hub`` raises as one sentence: it is full of hints, over many lines."""
    try:
        yield
    except (HTTPError, OSError, ValueError) as error:
        raise HubError(f"The Hub and {repo!r}: {' '.join(str(error).split())}") from error
