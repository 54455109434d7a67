"""Small tokenizers of every kind that is in use, trained in a moment on one sentence."""

from collections.abc import Callable

import transformers as tf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "2 + 3 = 5\nab ba, aab: the cat sat. The 12 cats don't = 32 abab 5.5 =2 +3 a5 5a caf\u00e9"
]
_SIGNS = "ab 25+3=\n.,:'tTheEcsfon1d\u00e9\u0301"


def _core(model, trainer, pre_tokenizer, decoder, normalizer=None) -> Tokenizer:
    core = Tokenizer(model)
    if normalizer is not None:
        core.normalizer = normalizer
    if pre_tokenizer is not None:
        core.pre_tokenizer = pre_tokenizer
    if decoder is not None:
        core.decoder = decoder
    core.train_from_iterator(CORPUS, trainer)
    return core


def _bpe(**options):
    alphabet = list(_SIGNS.replace(" ", "\u2581"))
    return trainers.BpeTrainer(
        vocab_size=120, show_progress=False, initial_alphabet=alphabet, **options
    )


def _metaspace(scheme: str) -> Tokenizer:
    space = {"prepend_scheme": scheme}
    return _core(
        models.BPE(unk_token="<unk>"),
        _bpe(special_tokens=["<unk>"]),
        pre_tokenizers.Metaspace(**space),
        decoders.Metaspace(**space),
    )


def _llama() -> Tokenizer:
    """As Llama 2: the space is put before a text while it is normalised."""
    core = _metaspace("never")
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    core.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")  # any that is not in the way
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return core


def _unigram() -> Tokenizer:
    space = {"prepend_scheme": "always"}
    return _core(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=100,
            show_progress=False,
            initial_alphabet=list(_SIGNS.replace(" ", "\u2581")),
            special_tokens=["<unk>"],
            unk_token="<unk>",
        ),
        pre_tokenizers.Metaspace(**space),
        decoders.Metaspace(**space),
    )


def _byte_level(prefix: bool) -> Tokenizer:
    return _core(
        models.BPE(),
        trainers.BpeTrainer(
            vocab_size=300,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=prefix),
        decoders.ByteLevel(),
    )


def _words(pre_tokenizer) -> Tokenizer:
    return _core(
        models.WordLevel(unk_token="<unk>"),
        trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False),
        pre_tokenizer,
        None,
    )


def _characters() -> Tokenizer:
    vocabulary = {sign: i for i, sign in enumerate(_SIGNS)}
    core = Tokenizer(models.WordLevel(vocabulary))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return core


def _wordpiece() -> Tokenizer:
    return _core(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer(
            vocab_size=120,
            show_progress=False,
            initial_alphabet=list(_SIGNS.replace(" ", "")),
            special_tokens=["<unk>"],
        ),
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(),
        normalizers.BertNormalizer(lowercase=True),
    )


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "metaspace always": lambda: _metaspace("always"),
    "metaspace first": lambda: _metaspace("first"),
    "metaspace never": lambda: _metaspace("never"),
    "llama": _llama,
    "unigram": _unigram,
    "byte level": lambda: _byte_level(False),
    "byte level, prefix": lambda: _byte_level(True),
    "words": lambda: _words(pre_tokenizers.WhitespaceSplit()),
    "words and signs": lambda: _words(pre_tokenizers.Whitespace()),
    "characters": _characters,
    "wordpiece": _wordpiece,
}
# These can spell every text of their signs, with a border anywhere.
SPELLING = tuple(k for k in KINDS if not k.startswith("word"))


def toy_tokenizer(kind: str) -> tf.PreTrainedTokenizerFast:
    """A tokenizer of a kind, without any special token but, where words may be unknown, one."""
    core = KINDS[kind]()
    unknown = {} if core.token_to_id("<unk>") is None else {"unk_token": "<unk>"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=core, **unknown)
