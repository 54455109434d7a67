"""Which position, counted from the end of the prompt, each column of a forward pass has.

A frozen component has one mean per position, so its hooks must know where they are. By default the
whole input of a forward pass is a prompt: its last token is position −1. During generation the
prompt is what generation started from, with or without a KV cache, and new tokens are 0, 1, ….
Code that feeds prompt and answer together says where the prompt ends with :func:`prompt_ends_at`.
All of this holds for a ``TransformerBridge`` and for a plain transformers model alike.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from eigenlens.bridges import HookPoint, TransformerBridge

PromptEnd = int | Int[Tensor, ""] | Int[Tensor, "batch 1"]
_GENERATORS = ("generate", "generate_stream", "hf_generate")
_trackers: WeakKeyDictionary[nn.Module, "PositionTracker"] = WeakKeyDictionary()


class PositionTracker:
    """Follows the forward passes of one model.

    Attributes:
        positions: of the columns of the running pass, ``[pos]``, or ``[batch, pos]`` where
            right-padded prompts end in different columns.
    """

    def __init__(self) -> None:
        self.positions: Int[Tensor, "*batch pos"] = torch.zeros(0, dtype=torch.int64)
        self.users = 0
        self.handle: RemovableHandle | None = None
        self._prompt_end: PromptEnd | None = None
        self._held = False

    @contextmanager
    def holding(self, n_prompt: PromptEnd | None) -> Iterator[None]:
        """Keep one end of the prompt over several passes; ``None``: that of the first pass."""
        before = (self._prompt_end, self._held)
        self._prompt_end, self._held = n_prompt, True
        try:
            yield
        finally:
            self._prompt_end, self._held = before

    def observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the transformers model: find the positions of this pass."""
        given = _arguments(module, args, kwargs)
        inputs = given.get("input_ids")
        if inputs is None:
            inputs = given["inputs_embeds"]
        cache = given.get("past_key_values")
        past = cache.get_seq_length() if cache is not None else 0
        n_pos = inputs.shape[1]
        end = past + n_pos  # a tensor with a static cache, and then not read here
        prompt_end = self._prompt_end
        if prompt_end is None or not (self._held or past):
            prompt_end = self._prompt_end = _prompt_end(given.get("attention_mask"), end)
        columns = torch.arange(n_pos, device=inputs.device) + _on(inputs.device, past)
        self.positions = columns - _on(inputs.device, prompt_end)


def _on(device: torch.device, number: PromptEnd) -> PromptEnd:
    return number.to(device) if isinstance(number, Tensor) else number


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward call by name."""
    names = inspect.signature(module.forward).parameters
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _prompt_end(mask: Any, end: int | Tensor) -> PromptEnd:
    """Column after the last prompt token; one per row where rows are padded on the right."""
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask[:, -1].all()):
        return end
    last = mask.shape[1] - mask.flip(1).long().argmax(dim=1)
    return last[:, None]


def attach_tracker(model: nn.Module) -> tuple[PositionTracker, Callable[[], None]]:
    """The tracker of ``model``, and the function that lets it go again."""
    tracker = _trackers.get(model)
    if tracker is None:
        tracker = _trackers[model] = _start(model)
    tracker.users += 1

    def release() -> None:
        tracker.users -= 1
        if tracker.users == 0:
            _stop(model)

    return tracker, release


def _core(model: nn.Module) -> nn.Module:
    """The transformers model of a bridge, or the plain model itself."""
    return model.original_model if isinstance(model, TransformerBridge) else model


def _generators(model: nn.Module) -> list[str]:
    return [name for name in _GENERATORS if hasattr(model, name)]


def _start(model: nn.Module) -> PositionTracker:
    tracker = PositionTracker()
    tracker.handle = _core(model).register_forward_pre_hook(tracker.observe, with_kwargs=True)
    for name in _generators(model):
        is_plain = not isinstance(model, TransformerBridge)
        setattr(model, name, _as_generation(getattr(model, name), tracker, is_plain))
    return tracker


def _stop(model: nn.Module) -> None:
    tracker = _trackers.pop(model)
    assert tracker.handle is not None
    tracker.handle.remove()
    for name in _generators(model):
        delattr(model, name)


def _as_generation(
    method: Callable[..., Any], tracker: PositionTracker, is_plain: bool
) -> Callable[..., Any]:
    """Hold the end of the prompt while ``method``, of a plain model or a bridge, generates."""
    if inspect.isgeneratorfunction(inspect.unwrap(method)):

        @wraps(method)
        def stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
            with tracker.holding(None):
                yield from method(*args, **kwargs)

        return stream

    @wraps(method)
    def generate(*args: Any, **kwargs: Any) -> Any:
        with tracker.holding(_given_end(*args, **kwargs) if is_plain else None):
            return method(*args, **kwargs)

    return generate


def _given_end(inputs: Any = None, *_: Any, **kwargs: Any) -> PromptEnd | None:
    """Where the prompt ends that transformers is given as tokens.

    The first pass does not tell where it reads a long prompt in chunks.
    """
    given = kwargs.get("inputs", kwargs.get("input_ids", inputs))
    if not isinstance(given, Tensor) or given.ndim != 2:
        return None
    return _prompt_end(kwargs.get("attention_mask"), given.shape[1])


@contextmanager
def prompt_ends_at(model: nn.Module, n_prompt: PromptEnd) -> Iterator[None]:
    """Say that the first ``n_prompt`` columns are the prompt, padding included.

    Args:
        model: a bridge, or a plain model with an attached edit.
        n_prompt: one number for all rows, or ``[batch, 1]`` where their prompts end in different
            columns.
    """
    tracker = _trackers.get(model)
    if tracker is None:
        yield
        return
    with tracker.holding(n_prompt):
        yield


def add_hook(point: HookPoint, hook: Callable[..., Any]) -> Callable[[], None]:
    """Put a hook on that survives ``model.reset_hooks()``; the function returned takes it off."""
    handle = point.add_hook(hook, is_permanent=True)

    def remove() -> None:
        handle.hook.remove()
        point.fwd_hooks.remove(handle)

    return remove
