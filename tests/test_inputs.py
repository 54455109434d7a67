"""What is handed over by mistake is answered by a sentence that says what to pass instead."""

import jaxtyping
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, Value
from tiny_models import MIXED, dataset

import eigenlens as el
from eigenlens.evaluation import majority_accuracy
from eigenlens.metrics import kl_to_unedited, wrong_candidates
from eigenlens.monitors import output_statistics
from eigenlens.tasks import Task, make_batches, text_examples

ROWS = [{"prompt": "1 + 2 =", "answer": " 3"}]


@pytest.fixture(autouse=True)
def _as_users_run_it(monkeypatch):
    """Without the type checks that the tests put on every function."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


OF_DATA = {
    "evaluate": el.evaluate,
    "perplexity": el.perplexity,
    "make_batches": lambda model, data: make_batches(data, model, 2),
    "kl_to_unedited": kl_to_unedited,
    "output_statistics": output_statistics,
    "majority_accuracy": lambda model, data: majority_accuracy(MIXED, data),
    "wrong_candidates": lambda model, data: wrong_candidates(data, model.tokenizer),
}
OF_MODEL = {
    "evaluate": lambda model: el.evaluate(model, MIXED),
    "perplexity": lambda model: el.perplexity(model, MIXED),
    "make_batches": lambda model: make_batches(MIXED, model, 2),
    "output_statistics": lambda model: output_statistics(model, MIXED),
    "weight_matrices": el.weight_matrices,
    "decompose": lambda model: el.decompose(model, progress=False),
    "eigenprune": lambda model: el.eigenprune(model, Task("t", MIXED, MIXED, MIXED)),
}


QUIET = {"progress": False}
OF_SCORES = {
    "score": lambda model, scores, data: el.score(model, scores.spectra, data, **QUIET),
    "learned": lambda model, scores, data: el.learned(model, scores, data, MIXED, **QUIET),
    "guarded": lambda model, scores, data: el.guarded(model, scores, MIXED, data, **QUIET),
    "one_shot": lambda model, scores, data: el.one_shot(model, scores, data),
    "circuit": lambda model, scores, data: el.circuit(model, scores, data, **QUIET),
    "Protection": lambda model, scores, data: el.Protection(model, {"mine": data}),
    "activations": lambda model, scores, data: el.activation_change(
        model, el.select(scores, 0.1), data
    ),
}


@pytest.mark.parametrize("function", OF_SCORES)
def test_functions_of_scores_say_what_to_pass(function, tiny):
    model = tiny("gpt2")
    scores = el.score(model, el.decompose(model, progress=False), MIXED, progress=False)
    call = OF_SCORES[function]
    with pytest.raises(ValueError, match=r"a list .* datasets\.Dataset\.from_list\(data\)"):
        call(model, scores, ROWS)
    with pytest.raises(ValueError, match=r"a DatasetDict .* such as data\['dev'\]"):
        call(model, scores, DatasetDict(dev=MIXED))
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel .*load_model\(model, tokenizer\)"):
        call(model.original_model, scores, MIXED)


@pytest.mark.parametrize("function", OF_DATA)
@pytest.mark.parametrize(
    ("data", "advice"),
    [
        (ROWS, r"a list .* datasets\.Dataset\.from_list\(data\)"),
        (tuple(ROWS), r"a tuple .* datasets\.Dataset\.from_list\(data\)"),
        (pd.DataFrame(ROWS), r"a DataFrame .* datasets\.Dataset\.from_pandas\(data\)"),
        ({"prompt": ["1"], "answer": [" 2"]}, r"a dict .* datasets\.Dataset\.from_dict\(data\)"),
        (DatasetDict(dev=MIXED), r"a DatasetDict .* one of its splits, such as data\['dev'\]"),
        (Task("t", MIXED, MIXED, MIXED), r"a Task .* one of its splits, such as task\.train"),
        (IterableDataset.from_generator(lambda: iter(ROWS)), r"from_list\(list\(data\)\)"),
        ("mine.jsonl", r"a str .*eigenlens\.load_task\('jsonl', path='mine\.jsonl'\)"),
        (None, r"a NoneType and no datasets\.Dataset: pass one with the columns"),
    ],
)
def test_other_kinds_of_data(function, data, advice, tiny):
    with pytest.raises(ValueError, match=advice):
        OF_DATA[function](tiny("gpt2"), data)


@pytest.mark.parametrize("function", OF_DATA)
@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (
            Dataset.from_dict({"question": ["1"], "answer": [" 2"]}),
            r"lack the column 'prompt' \(there are 'question', 'answer'\): .*rename_column",
        ),
        (Dataset.from_dict({"prompt": ["1"], "label": [" 2"]}), "lack the column 'answer'"),
        (Dataset.from_dict({}), r"'prompt' \(there are no columns\)"),
        (Dataset.from_dict({"prompt": ["1"], "answer": [2]}), r"'answer' holds int64 .*cast_col"),
        (Dataset.from_dict({"prompt": [["1"]], "answer": [" 2"]}), "'prompt' holds list"),
        (
            Dataset.from_dict(
                {"prompt": ["1"], "answer": [0]},
                features=Features({"prompt": Value("string"), "answer": ClassLabel(names=["a"])}),
            ),
            "'answer' holds int64",
        ),
    ],
)
def test_columns_that_are_missing_or_no_texts(function, data, problem, tiny):
    with pytest.raises(ValueError, match=problem):
        OF_DATA[function](tiny("gpt2"), data)


@pytest.mark.parametrize("function", OF_MODEL)
def test_other_kinds_of_models(function, tiny):
    plain = tiny("gpt2").original_model
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel .*load_model\(model, tokenizer\)"):
        OF_MODEL[function](plain)
    with pytest.raises(ValueError, match=r"a str .*eigenlens\.load_model\('gpt2'\)"):
        OF_MODEL[function]("gpt2")
    with pytest.raises(ValueError, match=r"a NoneType .*what eigenlens\.load_model returns"):
        OF_MODEL[function](None)


def test_other_kinds_of_tokenizers(tiny, monkeypatch):
    model = tiny("gpt2")
    with pytest.raises(ValueError, match=r"a TransformerBridge: pass .* model\.tokenizer"):
        el.load_task("int_add", model)
    with pytest.raises(ValueError, match="a str"):
        wrong_candidates(dataset([("1", " 2")]), "gpt2")
    with pytest.raises(ValueError, match="a TransformerBridge"):
        text_examples("a b c", model)
    monkeypatch.setattr(model, "tokenizer", None)
    with pytest.raises(ValueError, match=r"no tokenizer: set model\.tokenizer"):
        el.evaluate(model, MIXED)


def test_what_pandas_and_files_make_is_taken(tiny, tmp_path):
    """Strings of any Arrow type, and columns in any format."""
    model = tiny("gpt2")
    expected = el.evaluate(model, MIXED).loss
    frame = MIXED.to_pandas()[["prompt", "answer"]]
    for data in (
        Dataset.from_pandas(frame),
        Dataset.from_pandas(frame.astype("string[pyarrow]")),
        MIXED.cast_column("prompt", Value("large_string")),
        MIXED.with_format("pandas"),
        MIXED.with_format("numpy"),
        MIXED.with_format("torch"),
    ):
        assert el.evaluate(model, data).loss == expected
