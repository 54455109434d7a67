"""Whether the files of a checkpoint are whole, and whether all its tensors found their place."""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors

from eigenlens.errors import short
from eigenlens.files import FileFormatError, parsing, read_json
from eigenlens.models.wording import listed

_POINTER = b"version https://git-lfs"
_SINGLE = "model.safetensors"
# Masks and angles that old versions of transformers kept as tensors, and that carry nothing.
_RETIRED = re.compile(r"\b(attn|attention)\.(masked_bias|bias|causal_mask)$|\.inv_freq$")
_PREFIXES = {
    "_orig_mod.": "torch.compile",
    "module.": "DataParallel",
    "base_model.model.": "peft",
}


def check_file(path: Path) -> None:
    """Look whether a file of weights is whole, without reading the weights.

    Raises:
        FileFormatError: it is empty, a Git LFS pointer or truncated; says what to do.
    """
    head = _check_no_pointer(path)
    if not head:
        raise FileFormatError(f"{path} is empty (0 bytes): download or copy it again.")
    if path.suffix == ".safetensors":
        with parsing(path, "safetensors file"), safetensors.safe_open(path, framework="pt"):
            pass


def _check_no_pointer(path: Path) -> bytes:
    with path.open("rb") as handle:
        head = handle.read(64)
    if head.startswith(_POINTER):
        raise FileFormatError(
            f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder, "
            "or download or copy it again."
        )
    return head


def check_folder(folder: Path) -> None:
    """Check the files that transformers would read in a folder, as :func:`check_file` does.

    Raises:
        FileFormatError: one of them is damaged, a file that an index lists is not there, or the
            weights are a pickle.
    """
    for path in sorted(folder.glob("*")):
        if path.is_file() and path.suffix in (".json", ".model", ".txt"):
            _check_no_pointer(path)
    index = folder / f"{_SINGLE}.index.json"
    if (folder / _SINGLE).is_file():
        return check_file(folder / _SINGLE)
    if index.is_file():
        return _check_shards(index)
    return refuse_pickle(folder, "pytorch_model")


def refuse_pickle(folder: Path, stem: str) -> None:
    """Raise where weights are there in no other form: whoever reads a pickle runs its code.

    Raises:
        FileFormatError: names the file, and says how to make another one of it.
    """
    if (folder / f"{stem.removeprefix('pytorch_')}.safetensors").is_file():
        return
    for path in sorted(folder.glob(f"{stem}*.bin")):
        raise FileFormatError(
            f"{path} is a pickle, which can run any code when it is read, so that it is not: save "
            "the weights as safetensors (with transformers or peft, if you trust the file: "
            "from_pretrained, then save_pretrained)."
        )


def _check_shards(index: Path) -> None:
    with parsing(index, "index of weights"):
        names = sorted(set(read_json(index)["weight_map"].values()))
        absent = [name for name in names if not os.path.isfile(index.parent / name)]
    if absent:
        raise FileFormatError(
            f"{short(listed(absent))} is not in {index.parent}, though {index.name} lists it: "
            "download or copy it again."
        )
    for name in names:
        check_file(index.parent / name)


def check_loaded(info: Mapping[str, Any], source: str, kind: str) -> None:
    """Check that every weight of a model came from its files, and every tensor of them was used.

    Args:
        info: what transformers reports with ``output_loading_info=True``.
        source: the folder, file or Hub name.
        kind: the model's class.

    Raises:
        FileFormatError: names the tensors, and the prefix to strip where one is to blame.
    """
    missing = sorted(info["missing_keys"])
    unknown = sorted(name for name in info["unexpected_keys"] if not _RETIRED.search(name))
    misfits = sorted(
        f"{name} is {tuple(found)} in place of {tuple(wanted)}"
        for name, found, wanted in info["mismatched_keys"]
    )
    groups = {"missing": missing, "unknown": unknown, "of another shape": misfits}
    told = [f"{len(names)} {what} ({listed(names)})" for what, names in groups.items() if names]
    told += map(str, info["error_msgs"])
    if told:
        raise FileFormatError(
            f"The tensors in {source} are not those of a {kind}: {'; '.join(told)}."
            + _advice(missing, unknown)
        )


def _advice(missing: Sequence[str], unknown: Sequence[str]) -> str:
    prefix = _prefix(missing, unknown)
    if prefix:
        writer = f", which {_PREFIXES[prefix]} puts there" if prefix in _PREFIXES else ""
        return f" Their names begin with {prefix!r}{writer}: strip it and save them again."
    if missing:
        return " Missing weights would be random numbers: save or download the model again."
    return " Save the model again with save_pretrained of its own class."


def _prefix(missing: Sequence[str], unknown: Sequence[str]) -> str | None:
    """What stands before the names of missing tensors in the files."""
    known = next((p for p in _PREFIXES if unknown and all(u.startswith(p) for u in unknown)), None)
    wanted, found = set(missing), Counter[str]()
    for name in unknown:
        words = name.split(".")
        for cut in range(1, len(words)):
            if ".".join(words[cut:]) in wanted:
                found[".".join(words[:cut]) + "."] += 1
                break
    return found.most_common(1)[0][0] if found else known
