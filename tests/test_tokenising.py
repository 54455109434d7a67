"""Tokens spell prompt and answer whatever the tokenizer, fit the model, and are made only once."""

import gc
import math
import weakref

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import EQUAL, MIXED, dataset, word_tokenizer
from tokenizers import pre_tokenizers
from toy_tokenizers import KINDS, SPELLING, toy_tokenizer

import eigenlens as el
from eigenlens.baselines.prompting import PromptEdit, fits
from eigenlens.tasks import Task, make_batches, tokenising
from eigenlens.tasks.tokenising import tokenise

NO_SPACES = pre_tokenizers.Sequence(
    [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
)
TOYS = {kind: toy_tokenizer(kind) for kind in KINDS}
texts = st.text(alphabet="ab 25+3=\n.t\u00e9", max_size=6)


def spelt(tokenizer, tokens):
    return tokenizer.decode(tokens)


def read(tokenizer, text):
    """The text as the tokenizer writes it, having read it whole."""
    return spelt(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])


def encoded(tokenizer, prompt, answer):
    (found,) = tokenise(dataset([(prompt, answer)]), tokenizer)
    return found


@pytest.mark.parametrize("kind", KINDS)
@given(prompt=texts, answer=texts)
@settings(max_examples=150, deadline=None)
def test_tokens_spell_prompt_and_answer_or_are_refused(kind, prompt, answer):
    tokenizer = TOYS[kind]
    try:
        found = encoded(tokenizer, prompt, answer)
    except ValueError as error:
        refusal = str(error)
        assert "to nothing" in refusal or kind not in SPELLING
        whole = f"are read as {read(tokenizer, prompt + answer)!r}"
        assert "to nothing" in refusal or whole in refusal
        return
    assert spelt(tokenizer, found.prompt + found.answer) == read(tokenizer, prompt + answer)


@pytest.mark.parametrize("kind", SPELLING)
@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        *(("2+3= ", "5"), ("2 + 3 =", " 5"), ("2+3=", "5"), ("2+3=  ", "5"), ("2+3= ", " 5")),
        *(("2+3=\n", "5"), ("2+3= ", "=a"), ("the c", "at sat"), ("the ", "cat sat"), ("a", "b")),
    ],
)
def test_the_border_puts_no_space_in(kind, prompt, answer):
    tokenizer = TOYS[kind]
    found = encoded(tokenizer, prompt, answer)
    whole = spelt(tokenizer, found.prompt + found.answer)
    assert whole.removeprefix(" ") == prompt + answer
    # The border itself is where it was put: the answer's tokens spell the answer alone.
    names = "".join(tokenizer.convert_ids_to_tokens(found.answer))
    assert names.translate(str.maketrans("\u2581\u0120\u010a", "  \n")) == answer


def test_both_spellings_are_shown():
    with pytest.raises(ValueError, match=r"Example 1: .* spell '= <unk>', .* are read as '<unk>'"):
        tokenise(dataset([("2 =", " 5"), ("=", "x")]), TOYS["words"])
    long = "cat " * 100 + "="
    with pytest.raises(ValueError, match=r"'…[^']{60}'") as caught:
        tokenise(dataset([(long, "5")]), TOYS["words"])
    assert len(str(caught.value)) < 500


def test_the_tail_of_an_unknown_word_is_no_answer():
    """'foo' and 'foobar' are both unknown, so the tokens of the prompt seem to fit."""
    with pytest.raises(ValueError, match=r"spell '2 <unk> <unk>', .* '2 <unk>'"):
        tokenise(dataset([("2 foo", "bar")]), TOYS["words"])
    found = encoded(TOYS["words"], "2 foo", " 5")
    assert spelt(TOYS["words"], found.prompt + found.answer) == "2 <unk> 5"


def test_a_text_that_cannot_be_read_is_named():
    core = word_tokenizer().backend_tokenizer
    core.model = type(core.model)({"1": 0, "=": 1})  # without a token for unknown words
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=core)
    with pytest.raises(ValueError, match="cannot read '1 = 2'"):
        tokenise(dataset([("1 =", " 1"), ("1 =", " 2")]), tokenizer)
    with pytest.raises(ValueError, match="Example 0: the answer is None"):
        tokenise(dataset([("1 =", None)]), tokenizer)
    with pytest.raises(ValueError, match="no beginning-of-sequence token"):
        tokenise(dataset([("1 =", " 1")]), tokenizer, prepend_bos=True)


def with_tokenizer(folder, tokenizer, n_rows=None, n_positions=32):
    """A model whose vocabulary is the tokenizer's to the last token."""
    torch.manual_seed(0)
    config = tf.GPT2Config(
        vocab_size=n_rows or len(tokenizer),
        n_embd=24,
        n_layer=2,
        n_head=3,
        n_positions=n_positions,
        bos_token_id=None,
        eos_token_id=None,
    )
    tf.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return el.load_model(folder, dtype=torch.float64, device="cpu")


@pytest.mark.parametrize("kind", ["characters", "byte level"])
def test_padding_needs_no_token_of_its_own(kind, tmp_path):
    """Prompts of two lengths give the losses that each has alone."""
    model = with_tokenizer(tmp_path, TOYS[kind])
    assert model.tokenizer.pad_token_id >= len(model.W_E)  # what TransformerLens added
    rows = [("2 + 3 =", " 5"), ("12 + 2 + 3 =", " 5 5"), ("cat =", " 2 + 2")]
    found = el.evaluate(model, dataset(rows)).examples["loss"]
    alone = [el.evaluate(model, dataset([row])).loss for row in rows]
    assert found.tolist() == pytest.approx(alone, rel=1e-9)


def test_a_token_that_the_model_lacks_is_named(tmp_path):
    tokenizer = toy_tokenizer("words")
    n_rows = len(tokenizer)
    tokenizer.add_tokens(["new"])
    model = with_tokenizer(tmp_path, tokenizer, n_rows)
    assert len(make_batches(dataset([("2 =", " 5")]), model, 1)) == 1
    for row in (("2 new =", " 5"), ("2 =", " new")):
        with pytest.raises(ValueError, match=rf"Example 1 .*'new' of id {n_rows}, .* {n_rows} row"):
            make_batches(dataset([("2 =", " 5"), row]), model, 1)


def test_the_last_answer_token_needs_no_room(tiny):
    model = tiny("gpt2")
    assert model.cfg.n_ctx == 32
    full = ("1 + " * 15 + "1 =", " 3")  # 32 tokens to read, one to predict
    longer = ("1 + " * 15 + "1 =", " 3 4")
    assert math.isfinite(el.evaluate(model, dataset([full])).loss)
    with pytest.raises(ValueError, match=r"Example 1 has 33 tokens to read .* holds 32"):
        make_batches(dataset([full, longer]), model, 2)
    same = PromptEdit(settings={"prefix": ""})
    assert fits(model, Task("t", *[dataset([full])] * 3), same)
    assert not fits(model, Task("t", *[dataset([longer])] * 3), same)


@pytest.fixture
def calls(monkeypatch):
    """How many texts each call of a tokenizer was given."""
    counted = []
    original = tokenising._ids

    def ids(texts, tokenizer):
        counted.append(len(texts))
        return original(texts, tokenizer)

    monkeypatch.setattr(tokenising, "_ids", ids)
    return counted


def test_no_example_is_tokenised_twice(tiny, calls):
    model = tiny("gpt2")
    data = dataset([("1 + 40 =", f" {i}") for i in range(10)])
    el.evaluate(model, data)
    made = sum(calls)
    assert made == 20  # each prompt alone, and with its answer
    el.evaluate(model, data)
    el.perplexity(model, data, batch_size=3)
    make_batches(data.select([7, 2, 2]), model, 2)
    assert sum(calls) == made
    make_batches(dataset([("1 + 40 =", " 3"), ("1 + 41 =", " 3")]), model, 2)
    assert sum(calls) == made + 2  # one of them is new


def test_a_search_tokenises_its_data_once(tiny, calls):
    model = tiny("llama")
    spectra = el.decompose(model, progress=False)
    train = dataset([(f"{a} + 50 =", f" {a}") for a in range(12)])
    validation = dataset([(f"{a} + 51 =", f" {a}") for a in range(4)])
    scores = el.score(model, spectra, train, progress=False)
    config = el.LearnedConfig(steps=6, every=2, batch_size=4)
    el.learned(model, scores, train, validation, config, progress=False)
    assert sum(calls) == 2 * (12 + 4)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.add_tokens(["12"]),
        lambda t: setattr(t.backend_tokenizer, "pre_tokenizer", NO_SPACES),
        lambda t: setattr(t, "_tokenizer", toy_tokenizer("words and signs").backend_tokenizer),
    ],
)
def test_a_tokenizer_that_changed_is_asked_again(change):
    tokenizer = toy_tokenizer("characters")
    data = dataset([("12 + 2 =", " 5")])
    (before,) = tokenise(data, tokenizer)
    change(tokenizer)
    (after,) = tokenise(data, tokenizer)
    assert after != before
    assert after.prompt + after.answer == tokenizer("12 + 2 = 5")["input_ids"]
    (other,) = tokenise(data, TOYS["characters"])
    assert other == before


def test_what_is_remembered_is_bounded_and_nobody_elses(monkeypatch):
    monkeypatch.setattr(tokenising, "_MOST_TOKENS", 20)
    tokenizer = word_tokenizer()
    first = tokenise(MIXED, tokenizer)
    memory = tokenising._MEMORIES[tokenizer]
    assert 0 < memory._tokens <= 20
    first[0].answer.append(7)
    first[0].prompt.clear()
    assert tokenise(MIXED, tokenizer) == tokenise(MIXED, word_tokenizer())
    gone = weakref.ref(memory)
    del memory, tokenizer
    gc.collect()
    assert gone() is None


def test_a_tokenizer_written_in_python_is_asked_every_time():
    tokenizer = tf.ByT5Tokenizer()
    assert not tokenizer.is_fast
    (before,) = tokenise(EQUAL.select([0]), tokenizer)
    tokenizer.offset += 1
    (after,) = tokenise(EQUAL.select([0]), tokenizer)
    assert after.prompt == [token + 1 for token in before.prompt]
