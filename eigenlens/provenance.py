"""Where a result came from: versions, seed, model fingerprint, task hash.

A fingerprint is a 128-bit xxh3 hash over the name, shape, dtype and bytes of every parameter. It
tells whether a stored edit belongs to the weights at hand; it is no protection against forgery.
Searches look at the same weights hundreds of times: inside :func:`same_weights` they are hashed
once, and again only where an operation of PyTorch has changed one.
"""

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, wraps
from importlib import metadata
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
import xxhash
from datasets import Dataset
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from eigenlens.bridges import TransformerBridge
from eigenlens.checksums import hash_tensors
from eigenlens.inputs import check_data, check_model
from eigenlens.places import is_unchanged, plain_parameters

P = ParamSpec("P")
T = TypeVar("T")
_ROUNDED = (torch.float32, torch.float16, torch.bfloat16)
_version = cache(metadata.version)  # every result records them, and each is read from a file
_PACKAGES = ("eigenlens", "torch", "transformers", "transformer-lens", "numpy")


class Provenance(BaseModel):
    """The record that every result object carries."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    model_fingerprint: str
    task: str | None = None
    task_hash: str | None = None
    seed: int | None = None
    versions: dict[str, str]
    rounded: dict[str, str] | None = None
    plain: dict[str, str] | None = None
    tokenizer: str | None = None

    @property
    def dtype(self) -> str | None:
        """Type of the weights, where hashes of them as rounded were recorded."""
        return next(iter(self.rounded), None) if self.rounded else None

    @classmethod
    def of(
        cls,
        model: TransformerBridge,
        *,
        task: str | None = None,
        task_hash: str | None = None,
        seed: int | None = None,
        for_edits: bool = False,
    ) -> "Provenance":
        """Record the model at hand and the versions that are running.

        Args:
            model: a bridge.
            task: its name.
            task_hash: over its examples.
            seed: of what is random.
            for_edits: record hashes of the weights rounded to coarser types, of those of the plain
                transformers model and of the tokenizer, too, which tell whether an edit fits a copy
                of the model.

        Raises:
            ValueError: the model is no ``TransformerBridge``.
        """
        return cls(
            rounded=rounded_hashes(*hashed_model(model)) if for_edits else None,
            plain=rounded_hashes(*hashed_plain(model))
            if for_edits and is_unchanged(model)
            else None,
            tokenizer=tokenizer_hash(model.tokenizer) if for_edits and model.tokenizer else None,
            model_fingerprint=model_fingerprint(model),
            model=str(getattr(model.cfg, "model_name", "") or "unnamed"),
            task=task,
            task_hash=task_hash,
            seed=seed,
            versions=versions(),
        )


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    return {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}


def tensor_hash(tensor: Tensor) -> str:
    """xxh3-128 of a tensor's dtype, shape and bytes."""
    return hash_tensors([("", tensor)])


def rounded_hashes(hashed: Callable[[torch.dtype], str], own: torch.dtype) -> dict[str, str]:
    """Hashes of weights as they are and rounded to each coarser type, their own type first.

    Args:
        hashed: of the weights in a type.
        own: their type.
    """
    coarser = [dtype for dtype in _ROUNDED if dtype.itemsize < own.itemsize]
    return {_type_name(dtype): hashed(dtype) for dtype in (own, *coarser)}


def same_when_rounded(
    recorded: Mapping[str, str], hashed: Callable[[torch.dtype], str], own: torch.dtype
) -> bool:
    """Whether weights are those of :func:`rounded_hashes`, in the coarser type of the two."""
    made = getattr(torch, next(iter(recorded)))
    coarser = made if made.itemsize < own.itemsize else own
    return recorded.get(_type_name(coarser)) == hashed(coarser)


def hashed_model(model: nn.Module) -> tuple[Callable[[torch.dtype], str], torch.dtype]:
    """Hash of every parameter of a model in any type, and its own type."""
    return _hashed(model.named_parameters())


def hashed_plain(model: nn.Module) -> tuple[Callable[[torch.dtype], str], torch.dtype]:
    """As :func:`hashed_model`, of a plain transformers model, or that in a bridge."""
    return _hashed(plain_parameters(model))


def _hashed(
    parameters: Iterable[tuple[str, Tensor]],
) -> tuple[Callable[[torch.dtype], str], torch.dtype]:
    named = sorted(parameters, key=lambda parameter: parameter[0])

    return lambda dtype: hash_tensors(named, dtype=dtype), named[0][1].dtype


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the tokens of a tokenizer and their ids, without those that were added later."""
    vocabulary = getattr(tokenizer, "backend_tokenizer", tokenizer)
    words = (
        tokenizer.get_vocab()
        if vocabulary is tokenizer
        else vocabulary.get_vocab(with_added_tokens=False)
    )
    return text_hash(sorted(words.items(), key=lambda word: word[1]))


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def text_hash(lines: Iterable[Any]) -> str:
    """xxh3-128 of the ``repr`` of each item, in order."""
    digest = xxhash.xxh3_128()
    for line in lines:
        digest.update(repr(line).encode() + b"\n")
    return digest.hexdigest()


def data_hash(data: Dataset) -> str:
    """Hash over every example of a data set.

    Raises:
        ValueError: no ``Dataset`` of prompts and answers.
    """
    check_data(data)
    return text_hash(data.to_list())


def model_fingerprint(model: TransformerBridge) -> str:
    """Hash of every parameter of ``model``, at about 10 GB per second.

    Raises:
        ValueError: no ``TransformerBridge``.
    """
    check_model(model)
    kept = _kept.get(model)
    if kept is None:
        return hash_tensors(sorted(model.named_parameters()))
    state = tuple((p.data_ptr(), p._version) for p in model.parameters())
    if state not in kept:
        kept.clear()
        kept[state] = hash_tensors(sorted(model.named_parameters()))
    return kept[state]


_kept: WeakKeyDictionary[nn.Module, dict[tuple[tuple[int, int], ...], str]] = WeakKeyDictionary()


@contextmanager
def same_weights(model: TransformerBridge) -> Iterator[None]:
    """Inside the block weights change, if at all, by operations that PyTorch counts.

    Outside of such a block every fingerprint is made anew, since a write through ``.data`` leaves
    no trace.
    """
    check_model(model)
    if model in _kept:
        yield
        return
    _kept[model] = {}
    try:
        yield
    finally:
        del _kept[model]


def keeping_weights(
    function: Callable[Concatenate[TransformerBridge, P], T],
) -> Callable[Concatenate[TransformerBridge, P], T]:
    """Run a function of a model inside :func:`same_weights`."""

    @wraps(function)
    def run(model: TransformerBridge, *args: P.args, **kwargs: P.kwargs) -> T:
        with same_weights(model):
            return function(model, *args, **kwargs)

    return run
