"""What a tokenizer puts around a text by itself, and a tokenizer that TransformerLens leaves alone.

TransformerLens probes tokenizers with the letter "a", which not every vocabulary holds.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import configure_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids that the tokenizer puts before and after a text."""
    special = set(tokenizer.all_special_ids)
    for text in _texts(tokenizer):
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        if plain and special.isdisjoint(plain):
            break
    else:
        return tokenizer("")["input_ids"], []
    full = tokenizer(text)["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []


def _texts(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Texts of one token each, in the order of the vocabulary."""
    return (tokenizer.decode([token]) for token in range(len(tokenizer)))


@contextmanager
def kept_as_is(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Let TransformerLens take this very tokenizer.

    It would read another one from ``name_or_path``, if any, unless it believes that this one
    prepends a beginning-of-sequence token.
    """
    before = tokenizer.init_kwargs
    tokenizer.init_kwargs = {"name_or_path": "", **deepcopy(before), "add_bos_token": True}
    try:
        yield
    finally:
        tokenizer.init_kwargs = before


def give_tokenizer(model: TransformerBridge, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the tokenizer of a bridge, and nothing else: its setter would change ``cfg.d_vocab``."""
    sizes = model.cfg.d_vocab, model.cfg.d_vocab_out
    with kept_as_is(tokenizer):
        model.tokenizer = configure_tokenizer(tokenizer, model.cfg)
    model.cfg.d_vocab, model.cfg.d_vocab_out = sizes


def as_published(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer that lies where this one comes from, if it can be read again.

    TransformerLens makes the tokenizers that it reads prepend a token, whatever they did before.
    """
    if not tokenizer.name_or_path:
        return tokenizer
    try:
        return AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    except (OSError, ValueError):
        return tokenizer


def note_special_tokens(
    model: TransformerBridge, published: PreTrainedTokenizerBase | None = None
) -> None:
    """Record in ``model.cfg`` what tokenizers do, which TransformerLens may have mistaken.

    Args:
        model: with the tokenizer that it uses.
        published: the checkpoint's own, which decides whether prompts begin with a token
            (default: the one that the model uses).
    """
    tokenizer = model.tokenizer
    before, after = added_tokens(tokenizer)
    prepends = bool(before) and before[0] == tokenizer.bos_token_id
    own = added_tokens(published)[0] if published else before
    model.cfg.tokenizer_prepends_bos = prepends
    model.cfg.tokenizer_appends_eos = bool(after) and after[-1] == tokenizer.eos_token_id
    model.cfg.default_prepend_bos = bool(own) and own[0] == tokenizer.bos_token_id
