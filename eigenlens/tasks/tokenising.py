"""From prompts and answers to token ids.

The tokens of an example spell its text, prompt + answer, as the tokenizer reads it. Prompt and
answer are tokenised together where that splits at their border (as the text would be read).
Elsewhere each is tokenised on its own; an answer without a space before it, for a tokenizer that
begins every text with one, behind a sign whose tokens are then taken away.

Examples are remembered: searches read the same ones over and over.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

Text = tuple[str, str]  # prompt and answer
_SIGNS = ("", "=", "a", "1", "\n")  # to read an answer behind; the empty one: on its own
_MOST_TOKENS = 1_000_000  # remembered for a tokenizer: 40 MB
_SHOWN = 60  # characters of a text in a message


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example."""

    prompt: list[int]
    answer: list[int]

    @property
    def n_read(self) -> int:
        """Tokens that the model reads: the last one of the answer is predicted only."""
        return len(self.prompt) + len(self.answer) - 1


def tokenise(
    data: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prepend_bos: bool = False,
    rows: Sequence[int] | None = None,
) -> list[Encoded]:
    """Token ids of every example of ``data``.

    Args:
        data: columns ``prompt`` and ``answer``.
        tokenizer: the model's.
        prepend_bos: begin each prompt with the beginning-of-sequence token.
        rows: numbers of the examples in messages; by default their places in ``data``.

    Raises:
        ValueError: an example whose prompt or answer is missing or tokenises to nothing, or whose
            tokens would spell another text than prompt and answer do together; no
            beginning-of-sequence token to prepend.
    """
    if prepend_bos and tokenizer.bos_token_id is None:
        raise ValueError(
            "The tokenizer has no beginning-of-sequence token to prepend: "
            "set model.cfg.default_prepend_bos = False."
        )
    bos = [tokenizer.bos_token_id] if prepend_bos else []
    rows = range(len(data)) if rows is None else rows
    texts = _texts(data, rows)
    memory = _memory_of(tokenizer)
    found = memory.recall(texts)
    new = {text: row for text, row in zip(texts, rows, strict=True) if text not in found}
    made = _encode(new, tokenizer)
    memory.keep(made)
    found |= made
    for row, text in zip(rows, texts, strict=True):
        if not found[text].answer:
            raise ValueError(f"Example {row}: the answer {text[1]!r} tokenises to nothing.")
        if not bos and not found[text].prompt:
            raise ValueError(f"Example {row}: the prompt {text[0]!r} tokenises to nothing.")
    return [Encoded(bos + found[text].prompt, [*found[text].answer]) for text in texts]


def _texts(data: Dataset, rows: Sequence[int]) -> list[Text]:
    columns = {name: list(data[name][:]) for name in ("prompt", "answer")}
    for name, values in columns.items():
        if None in values:
            raise ValueError(f"Example {rows[values.index(None)]}: the {name} is None and no text.")
    return list(zip(*columns.values(), strict=True))


def _encode(rows: Mapping[Text, int], tokenizer: PreTrainedTokenizerBase) -> dict[Text, Encoded]:
    """Token ids of texts; ``rows`` are those of the data set, for messages."""
    alone = _ids([prompt for prompt, _ in rows], tokenizer)
    joint = _ids([prompt + answer for prompt, answer in rows], tokenizer)
    found, apart = {}, {}
    for text, prompt, both in zip(rows, alone, joint, strict=True):
        answer = _behind(prompt, both)
        # Of a word that is unknown as a whole, no border shows.
        if answer is None or prompt[-1:] == [tokenizer.unk_token_id]:
            apart[text] = prompt, both
        else:
            found[text] = Encoded(prompt, answer)
    return found | _encode_apart(apart, rows, tokenizer)


def _encode_apart(
    texts: Mapping[Text, tuple[list[int], list[int]]],
    rows: Mapping[Text, int],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[Text, Encoded]:
    """Token ids of texts, given those of the prompt on its own, and of the whole."""
    found: dict[Text, Encoded] = {}
    for sign in _SIGNS:
        left = [text for text in texts if text not in found]
        if not left:
            break
        for text, answer in zip(left, _answers(left, sign, tokenizer), strict=True):
            prompt, both = texts[text]
            if answer and _spelt(prompt + answer, tokenizer) == _spelt(both, tokenizer):
                found[text] = Encoded(prompt, answer)
    for text in texts:
        if text not in found:
            raise ValueError(f"Example {rows[text]}: {_misspelt(text, *texts[text], tokenizer)}")
    return found


def _answers(
    texts: Sequence[Text], sign: str, tokenizer: PreTrainedTokenizerBase
) -> list[list[int] | None]:
    """Tokens of the answers behind a sign, or ``None`` where it is not a token apart."""
    if not sign:
        return [*_ids([answer for _, answer in texts], tokenizer)]
    try:
        head, *both = _ids([sign, *(sign + answer for _, answer in texts)], tokenizer)
    except ValueError:  # a tokenizer that does not know the sign
        return [None] * len(texts)
    return [_behind(head, tokens) for tokens in both]


def _misspelt(
    text: Text, prompt: list[int], both: list[int], tokenizer: PreTrainedTokenizerBase
) -> str:
    ours = _spelt(prompt + _ids([text[1]], tokenizer)[0], tokenizer)
    return (
        f"the tokens of the prompt {_end(text[0])!r} and the answer {text[1]!r} spell "
        f"{_end(ours)!r}, but together they are read as {_end(_spelt(both, tokenizer))!r}. Put the "
        "border where this tokenizer splits a text, such as before a space."
    )


def _ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not texts:
        return []
    try:
        found: list[list[int]] = tokenizer([*texts], add_special_tokens=False)["input_ids"]
    except Exception as error:  # the class that the library tokenizers raises
        if len(texts) > 1:  # which one is it?
            return [_ids([text], tokenizer)[0] for text in texts]
        raise ValueError(f"The tokenizer cannot read {_end(texts[0])!r}: {error}.") from error
    return found


def _spelt(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


def _behind(head: list[int], tokens: list[int]) -> list[int] | None:
    """What follows ``head`` in ``tokens``, or ``None`` if they do not begin with it."""
    return tokens[len(head) :] if tokens[: len(head)] == head else None


def _end(text: str) -> str:
    return text if len(text) <= _SHOWN else "…" + text[-_SHOWN:]


class _Memory:
    """The texts that a tokenizer read last, with their tokens."""

    def __init__(self, state: object) -> None:
        """``state`` is that of the tokenizer, which must not change."""
        self.state = state
        self._examples: OrderedDict[Text, Encoded] = OrderedDict()
        self._tokens = 0

    def recall(self, texts: Iterable[Text]) -> dict[Text, Encoded]:
        """Those of ``texts`` that are known."""
        found = {text: self._examples[text] for text in texts if text in self._examples}
        for text in found:
            self._examples.move_to_end(text)
        return found

    def keep(self, new: Mapping[Text, Encoded]) -> None:
        """Remember more, and forget what was not asked for longest."""
        self._examples |= new
        self._tokens += sum(example.n_read for example in new.values())
        while self._tokens > _MOST_TOKENS:
            self._tokens -= self._examples.popitem(last=False)[1].n_read


_MEMORIES: WeakKeyDictionary[PreTrainedTokenizerBase, _Memory] = WeakKeyDictionary()


def _memory_of(tokenizer: PreTrainedTokenizerBase) -> _Memory:
    """What is known of this tokenizer as it is now."""
    state = _state(tokenizer)
    memory = _MEMORIES.get(tokenizer)
    if memory is None or memory.state != state:
        memory = _MEMORIES[tokenizer] = _Memory(state)
    return memory


def _state(tokenizer: PreTrainedTokenizerBase) -> object:
    """Equal as long as the tokenizer reads alike."""
    if not tokenizer.is_fast:
        return object()  # written in Python, and free to change in any way: never equal
    core = tokenizer.backend_tokenizer
    steps = (core.normalizer, core.pre_tokenizer, core.decoder)
    return core, len(tokenizer), tokenizer.unk_token_id, *map(repr, steps)
