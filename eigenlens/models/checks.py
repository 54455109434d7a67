"""What a model must be before anything is measured on it: finite, causal, and computed rightly."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from eigenlens.blocks import UnsupportedModelError

_LENGTH = 5
_PADDED = 16  # columns, of which the first ones are padding: no multiple of usual pools
_PADDING = 3
Run = Callable[[Int[Tensor, "1 pos"]], Float[Tensor, "1 pos d_vocab"]]


def checked_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The floating point type of that name; ``None`` stays.

    Raises:
        ValueError: no floating point type.
    """
    if dtype is None:
        return None
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise ValueError(f"dtype {dtype!r} is no floating point type; use float32 or bfloat16.")
    return resolved


def checked_device(device: torch.device | str | None) -> torch.device | None:
    """The device of that name; ``None`` stays.

    Raises:
        ValueError: no such device, here or at all.
    """
    if device is None:
        return None
    try:
        resolved = torch.device(device)
        backend = torch.get_device_module(resolved)
    except RuntimeError as error:
        raise ValueError(
            f"Unknown device {str(device)!r}; use cpu, cuda, cuda:1 (and so on) or mps."
        ) from error
    count = backend.device_count() if backend.is_available() else 0
    if resolved.type != "cpu" and (resolved.index or 0) >= count:
        raise ValueError(
            f"The device {str(device)!r} is not there: this machine and this build of PyTorch "
            f"have {count} {resolved.type} devices. Use another one, such as cpu."
        )
    return resolved


def check_finite(model: nn.Module) -> None:
    """Raise ``ValueError`` for weights that are no numbers, or that are not in memory."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"The weights are not loaded: {name} is on the meta device.")
        if not torch.isfinite(parameter).all():
            raise ValueError(f"The weights hold NaN or infinite values: {name}.")


def probe(
    d_vocab: int, n_ctx: int | None, device: torch.device, length: int = _LENGTH
) -> Int[Tensor, "1 pos"]:
    """A few tokens to try a model on, the same ones each time."""
    chance = torch.Generator().manual_seed(0)
    length = min(length, n_ctx or length)
    return torch.randint(d_vocab, (1, length), generator=chance).to(device)


def check_causal(
    run: Run, tokens: Int[Tensor, "1 pos"], d_vocab: int, name: str, *, routed: bool = False
) -> None:
    """Raise where an earlier position sees a later one: two inputs differ in their last token.

    Both passes have one shape, so that a causal model rounds both alike and its earlier logits are
    the same to the last bit. Where they are not, a repeated pass tells what chance does.

    Args:
        run: from tokens to logits.
        tokens: one of the inputs.
        d_vocab: size of the vocabulary.
        name: of the model, for the message.
        routed: whether tokens are grouped by expert, and then rounded group by group.

    Raises:
        UnsupportedModelError: the logits before the last position differ.
    """
    if d_vocab < 2 or tokens.shape[1] < 2:
        return
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % d_vocab
    before = run(tokens)[:, :-1]
    change = (run(other)[:, :-1] - before).abs().max()
    rounding = torch.finfo(before.dtype).eps * before.abs().max() if routed else 0
    if change > 8 * rounding and change > 8 * (run(tokens)[:, :-1] - before).abs().max():
        raise UnsupportedModelError(
            f"{name} is not causal: its logits depend on later tokens, so that it would see the "
            "answer that it has to predict. eigenlens needs a causal language model."
        )


def check_same_logits(
    found: Float[Tensor, "1 pos d_vocab"], wanted: Float[Tensor, "1 pos d_vocab"], name: str
) -> None:
    """Check that the bridge computes what the transformers model computes.

    Raises:
        UnsupportedModelError: TransformerLens takes this architecture for another one.
    """
    if not wanted.isfinite().all():
        raise ValueError(
            f"The logits of {name} are not finite in {wanted.dtype}: load it as float32."
        )
    spread = (wanted - wanted.mean()).double().norm()
    error = float((found - wanted).double().norm() / spread.clamp_min(1e-30))
    if not error <= (0.01 if wanted.dtype.itemsize > 2 else 0.2):  # NaN fails as well
        raise UnsupportedModelError(
            f"TransformerLens computes other logits for {name} than transformers does (relative "
            f"difference {error:.2g}): it does not support this configuration."
        )


def is_padding_neutral(
    run: Callable[[Int[Tensor, "1 pos"], Int[Tensor, "1 pos"] | None], Float[Tensor, "1 pos voc"]],
    d_vocab: int,
    n_ctx: int | None,
    device: torch.device,
) -> bool:
    """Whether masked tokens on the left leave the logits as they are.

    They do not where positions are counted from the first column, masked or not, or where
    neighbouring positions are pooled.

    Args:
        run: from tokens and mask to logits.
        d_vocab: size of the vocabulary.
        n_ctx: longest input.
        device: where the tokens have to be.
    """
    tokens = probe(d_vocab, n_ctx, device, _PADDED)
    if tokens.shape[1] <= _PADDING:
        return True
    mask = torch.ones_like(tokens)
    mask[:, :_PADDING] = 0
    alone = run(tokens[:, _PADDING:], None)
    spread = (alone - alone.mean()).double().norm().clamp_min(1e-30)
    change = (run(tokens, mask)[:, _PADDING:] - alone).double().norm()
    return bool(change <= spread * (1e-4 if alone.dtype.itemsize > 2 else 0.1))
