"""Plain text as examples: verbatim, consecutive, and of the length that was asked for."""

import re

import datasets
import pytest
from tiny_models import word_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import eigenlens as el
from eigenlens.tasks import text_examples
from eigenlens.tasks.batches import tokenise
from eigenlens.tasks.rows import DataError
from eigenlens.tasks.sources import MissingDataError

TEXT = " \n = Lobsters = \n \n" + " ".join(
    f"Lobster {i} was {i * 7} years old ; nobody asked it unnecessarily complicated questions ."
    for i in range(40)
)


def byte_tokenizer(trim_offsets: bool) -> PreTrainedTokenizerFast:
    """Byte-pair encoding of spaced words, trained on a part of the text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=275, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator([TEXT[:400]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="!")


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama's first: a space is put before every text, and is a sign like others."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=55, special_tokens=["<unk>"], show_progress=False)
    core.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


TOKENIZERS = {
    "bytes": lambda: byte_tokenizer(False),
    "trimmed": lambda: byte_tokenizer(True),
    "metaspace": metaspace_tokenizer,
}


def test_passages_are_the_text():
    for tokenizer in (None, TOKENIZERS["bytes"]()):
        data = text_examples(TEXT, tokenizer, n_prompt_tokens=20, n_answer_tokens=7)
        assert len(data) > 10
        at = 0
        for example in data:
            begin = TEXT.index(example["prompt"] + example["answer"], at)
            assert not TEXT[at:begin].strip()  # consecutive: nothing but white space between
            at = begin + len(example["prompt"]) + len(example["answer"])
            assert example["prompt"][0].strip()
            assert not example["answer"][0].strip()
            assert example["candidates"] == []


def test_words_are_counted_without_a_tokenizer():
    text = "one two three  four\nfive six seven eight nine ten"
    data = text_examples(text, n_prompt_tokens=3, n_answer_tokens=2)
    assert list(data["prompt"]) == ["one two three", "six seven eight"]
    assert list(data["answer"]) == ["  four\nfive", " nine ten"]
    assert len(text_examples(text + " eleven", n_prompt_tokens=3, n_answer_tokens=2)) == 2
    assert len(text_examples(text[:-4], n_prompt_tokens=3, n_answer_tokens=2)) == 1


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokens_are_as_many_as_asked(kind):
    tokenizer = TOKENIZERS[kind]()
    n_prompt, n_answer = 40, 15
    data = text_examples(TEXT, tokenizer, n_prompt_tokens=n_prompt, n_answer_tokens=n_answer)
    longest = max(
        len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) for word in TEXT.split()
    )
    assert 5 < longest < n_answer
    for example, encoded in zip(data, tokenise(data, tokenizer), strict=True):
        assert n_prompt - longest < len(encoded.prompt) <= n_prompt + 1
        assert n_answer - longest < len(encoded.answer) <= n_answer
        joint = tokenizer(example["prompt"] + example["answer"], add_special_tokens=False)
        assert joint["input_ids"] == encoded.prompt + encoded.answer
        if kind != "metaspace":
            assert tokenizer.decode(encoded.prompt) == example["prompt"]
            assert tokenizer.decode(encoded.answer) == example["answer"]


def test_a_word_that_is_too_long_stands_alone():
    tokenizer = TOKENIZERS["bytes"]()
    sizes = {"n_prompt_tokens": len(tokenizer("a b")["input_ids"]), "n_answer_tokens": 3}
    (example,) = text_examples("a b xxxxxxxxxxxxxxxxxxxx c d", tokenizer, **sizes)
    assert (example["prompt"], example["answer"]) == ("a b", " xxxxxxxxxxxxxxxxxxxx")


def test_a_draw(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    options = {"n_prompt_tokens": 12, "n_answer_tokens": 4}
    every = {e["prompt"] for e in text_examples(path, **options)}
    drawn = text_examples(path, n_examples=9, seed=1, **options)
    assert len(set(drawn["prompt"])) == 9
    assert set(drawn["prompt"]) < every
    assert drawn.to_list() == text_examples(TEXT, n_examples=9, seed=1, **options).to_list()
    assert drawn.to_list() != text_examples(TEXT, n_examples=9, seed=2, **options).to_list()


def test_what_cannot_be_cut(tmp_path):
    with pytest.raises(ValueError, match=r"no whole passage.*pathlib\.Path"):
        text_examples("text.txt")
    with pytest.raises(ValueError, match="no whole passage"):
        text_examples("")
    with pytest.raises(ValueError, match=r"n_examples=1000 .* there are"):
        text_examples(TEXT, n_examples=1000)
    with pytest.raises(ValueError, match="at least one token"):
        text_examples(TEXT, n_answer_tokens=0)
    with pytest.raises(FileNotFoundError, match="absent"):
        text_examples(tmp_path / "absent.txt")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        text_examples(tmp_path / "latin.txt")


@pytest.fixture
def wiki(tmp_path):
    folder = tmp_path / "wikitext-2"
    folder.mkdir()
    for name, shift in (("valid", 0), ("test", 1000)):
        lines = (" ".join(str(shift + 20 * line + i) for i in range(20)) for line in range(50))
        (folder / f"{name}.txt").write_text(" \n ".join(lines), encoding="utf-8")
    return tmp_path


SIZES = {"n_train": 20, "n_validation": 10, "n_test": 5, "n_prompt_words": 6, "n_answer_words": 4}


def test_wikitext(wiki, monkeypatch):
    task = el.load_task("wikitext", data=wiki, **SIZES)
    splits = [task.train, task.validation, task.test]
    assert [len(split) for split in splits] == [20, 10, 5]
    numbers = [
        {int(n) for e in split for n in (e["prompt"] + e["answer"]).split()} for split in splits
    ]
    assert [len(seen) for seen in numbers] == [200, 100, 50]  # no word is in two passages
    assert not numbers[0] & numbers[1]
    assert max(numbers[0] | numbers[1]) < 1000 <= min(numbers[2])
    assert el.load_task("wikitext", data=wiki / "wikitext-2", **SIZES).hash == task.hash
    monkeypatch.setenv("EIGENLENS_DATA", str(wiki))
    assert el.load_task("wikitext", word_tokenizer(), **SIZES).hash == task.hash
    assert el.load_task("wikitext", seed=1, **SIZES).hash != task.hash
    with pytest.raises(ValueError, match=r"n_train \+ n_validation=110 .* there are 100"):
        el.load_task("wikitext", **SIZES | {"n_train": 100})
    with pytest.raises(MissingDataError, match=r"nowhere.*valid\.txt"):
        el.load_task("wikitext", data=wiki / "nowhere")


def test_wikitext_from_the_hub(wiki, monkeypatch):
    def load_dataset(path, config, split, revision):
        assert re.fullmatch("[0-9a-f]{40}", revision)  # a commit, not a branch
        assert (path, config) == ("Salesforce/wikitext", "wikitext-2-v1")
        file = wiki / "wikitext-2" / f"{ {'validation': 'valid'}.get(split, split) }.txt"
        return datasets.Dataset.from_dict({"text": file.read_text().splitlines(keepends=True)})

    monkeypatch.delenv("EIGENLENS_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = el.load_task("wikitext", **SIZES)
    assert task.hash == el.load_task("wikitext", data=wiki, **SIZES).hash
