"""SuperGLUE tasks: prompts to the letter, official counts, and complaints with file and line."""

import json
import os
import re
from collections import Counter
from pathlib import Path

import datasets
import pytest

import eigenlens as el
from eigenlens.evaluation import majority_accuracy
from eigenlens.tasks.rows import DataError
from eigenlens.tasks.sources import MissingDataError

CB = [
    {"premise": f"It rained on day {i}.", "hypothesis": "It rained.", "label": label, "idx": i}
    for i, label in enumerate(["entailment", "contradiction", "neutral", "entailment"] * 5)
]
COPA = [
    {
        "premise": f"The cup fell {i} times.",
        "choice1": "It broke.",
        "choice2": "It sang.",
        "question": ["effect", "cause"][i % 2],
        "label": i % 2,
        "idx": i,
    }
    for i in range(10)
]
RTE = [
    {"premise": f"Tea {i}.", "hypothesis": "{Milk}", "label": label, "idx": i}
    for i, label in enumerate(["entailment", "not_entailment"] * 5)
]
ROWS = {"cb": ("CB", CB), "copa": ("COPA", COPA), "rte": ("RTE", RTE)}
PROMPTS = {
    "cb": (
        "Premise: It rained on day 2.\n\nHypothesis: It rained.\n\n"
        "Does the premise entail, contradict or is neutral to the hypothesis?\n"
        "Answer (entails, contradicts, is neutral): The premise",
        " is neutral",
        [" entails", " contradicts", " is neutral"],
    ),
    "copa": (
        "Premise: The cup fell 2 times.\nWhat happened as a result?\n\n"
        "Alternative 1: It broke.\nAlternative 2: It sang.\n\n"
        "What is the correct alternative?\nThe correct alternative is alternative",
        " 1",
        [" 1", " 2"],
    ),
    "rte": (
        "Premise: Tea 2.\n\nHypothesis: {Milk}\n\n"
        "Does the premise entail or contradict to the hypothesis?\n"
        "Answer (entails or contradicts): The premise",
        " entails",
        [" entails", " contradicts"],
    ),
}


def write(path: Path, lines: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    for name, rows in ROWS.values():
        write(tmp_path / "superglue" / name / "train.jsonl", rows)
        write(tmp_path / "superglue" / name / "val.jsonl", [{**r, "premise": "V."} for r in rows])
    return tmp_path


@pytest.mark.parametrize("name", ROWS)
def test_prompts_to_the_letter(name, folder):
    write(folder / "superglue" / ROWS[name][0] / "val.jsonl", ROWS[name][1])
    example = el.load_task(name, data=folder).test[2]
    prompt, answer, candidates = PROMPTS[name]
    assert example == {"prompt": prompt, "answer": answer, "candidates": candidates}


def test_every_label_and_question(folder):
    write(folder / "superglue" / "COPA" / "val.jsonl", COPA)
    answers = el.load_task("cb", data=folder).test["answer"]
    assert list(answers[:4]) == [" entails", " contradicts", " is neutral", " entails"]
    assert list(el.load_task("rte", data=folder).test["answer"][:2]) == [" entails", " contradicts"]
    copa = el.load_task("copa", data=folder).test[1]
    assert (copa["answer"], "What was the cause of this?" in copa["prompt"]) == (" 2", True)


def folder_row(prompt: str) -> int:
    return int(re.search(r"on day (\d+)", prompt)[1])


def test_splits_and_sizes(folder):
    write(folder / "superglue" / "CB" / "val.jsonl", CB)
    whole = el.load_task("cb", data=folder)
    assert (len(whole.train), len(whole.validation), len(whole.test)) == (16, 4, 20)
    assert not set(whole.train["prompt"]) & set(whole.validation["prompt"])
    part = el.load_task("cb", data=folder, n_train=5, n_validation=4, n_test=3, seed=0)
    assert list(part.train["prompt"]) == list(whole.train["prompt"][:5])
    assert list(part.validation["prompt"]) == list(whole.validation["prompt"])
    assert list(part.test["prompt"]) == list(whole.test["prompt"][:3])
    other = el.load_task("cb", data=folder, seed=1)
    assert other.test.to_list() == whole.test.to_list()
    assert set(other.validation["prompt"]) != set(whole.validation["prompt"])
    tests = [  # 3 of 20 rows serve six seeds
        [folder_row(p) for p in el.load_task("cb", data=folder, n_test=3, seed=seed).test["prompt"]]
        for seed in range(7)
    ]
    assert len({row for rows in tests[:6] for row in rows}) == 18
    assert (tests[0], tests[6]) == ([0, 1, 2], [0, 1, 2])
    assert all(rows == sorted(rows) for rows in tests)  # in the order of the file
    for sizes in ({"n_train": 17}, {"n_validation": 20}, {"n_test": 21}):
        with pytest.raises(ValueError, match=r"of 20|are 20|are 16"):
            el.load_task("cb", data=folder, **sizes)
    with pytest.raises(ValueError, match="n_tset"):
        el.load_task("cb", data=folder, n_tset=3)


def test_a_repeated_row_is_on_one_side(folder):
    write(folder / "superglue" / "RTE" / "train.jsonl", [RTE[i // 2] for i in range(20)])
    for seed in range(5):
        task = el.load_task("rte", data=folder, n_validation=5, seed=seed)
        assert not set(task.train["prompt"]) & set(task.validation["prompt"])
        assert len(task.validation) == 5


def test_where_the_folder_comes_from(folder, monkeypatch):
    by_argument = el.load_task("cb", data=folder)
    monkeypatch.setenv("EIGENLENS_DATA", str(folder / "superglue"))
    assert el.load_task("cb").hash == by_argument.hash
    monkeypatch.setenv("EIGENLENS_DATA", str(folder / "elsewhere"))
    assert el.load_task("cb", data=folder).hash == by_argument.hash
    with pytest.raises(MissingDataError, match=r"elsewhere.*EIGENLENS_DATA"):
        el.load_task("cb")


def test_the_hub_gives_the_same_task(folder, monkeypatch):
    """The Hub numbers its labels; rows and splits are otherwise those of the files."""
    names = {
        "cb": ["entailment", "contradiction", "neutral"],
        "copa": ["choice1", "choice2"],
        "rte": ["entailment", "not_entailment"],
    }
    asked = []

    def load_dataset(path, config, split, revision):
        assert re.fullmatch("[0-9a-f]{40}", revision)  # a commit, not a branch
        asked.append((path, config, split))
        file = {"train": "train", "validation": "val"}[split]
        source = folder / "superglue" / ROWS[config][0] / f"{file}.jsonl"
        rows = [json.loads(line) for line in source.read_text().splitlines()]
        if config != "copa":
            rows = [{**row, "label": names[config].index(row["label"])} for row in rows]
        data = datasets.Dataset.from_list(rows)
        return data.cast_column("label", datasets.ClassLabel(names=names[config]))

    monkeypatch.delenv("EIGENLENS_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ROWS:
        assert el.load_task(name).hash == el.load_task(name, data=folder).hash
    assert ("aps/super_glue", "cb", "train") in asked
    assert ("aps/super_glue", "copa", "validation") in asked


def test_offline_says_what_to_do(monkeypatch):
    monkeypatch.delenv("EIGENLENS_DATA", raising=False)
    with pytest.raises(MissingDataError, match=r"set EIGENLENS_DATA or data="):
        el.load_task("cb")


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("cb", '{"premise": "A.",', "not valid JSON"),
        ("cb", "[1, 2]", r"expected a JSON object, not '\[1, 2\]'"),
        ("cb", {"premise": "A.", "label": "neutral"}, "'hypothesis' is missing"),
        ("cb", {"premise": "A.", "hypothesis": 3, "label": "neutral"}, "must be a text, not 3"),
        ("cb", {"premise": " ", "hypothesis": "B.", "label": "neutral"}, "must be a text, not ' '"),
        ("cb", {**CB[0], "label": "maybe"}, "unknown label 'maybe'; .*'neutral'"),
        ("cb", {k: v for k, v in CB[0].items() if k != "label"}, "'label' is missing"),
        ("cb", {**CB[0], "label": ["neutral"]}, "unknown label"),
        ("copa", {**COPA[0], "label": 2}, "unknown label 2; it must be one of 0, 1"),
        ("copa", {**COPA[0], "label": True}, "unknown label True"),
        ("copa", {**COPA[0], "question": "why"}, "unknown question 'why'"),
        ("rte", {**RTE[0], "label": "contradiction"}, "unknown label 'contradiction'"),
    ],
)
def test_a_bad_row_is_named(name, bad, message, folder):
    file = folder / "superglue" / ROWS[name][0] / "train.jsonl"
    write(file, [ROWS[name][1][0], bad, ROWS[name][1][1]])
    with pytest.raises(DataError, match=rf"train\.jsonl, line 2: .*{message}"):
        el.load_task(name, data=folder)


def test_bad_files(folder):
    file = folder / "superglue" / "CB" / "train.jsonl"
    write(file, ["", ""])
    with pytest.raises(DataError, match=r"CB.train\.jsonl is empty"):
        el.load_task("cb", data=folder)
    file.write_bytes(json.dumps(CB[0]).encode() + b"\n" + '{"premise": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"train\.jsonl, line 2: not UTF-8"):
        el.load_task("cb", data=folder)
    # Signs that str.splitlines takes for line breaks, a byte-order mark and Windows line ends.
    rows = [{**row, "premise": f"{i}\u2028.\u0085"} for i, row in enumerate(CB)]
    texts = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(texts).encode())
    assert len(el.load_task("cb", data=folder).train) == 16


def official_folder() -> Path | None:
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("EIGENLENS_DATA") or beside)
    return folder if (folder / "superglue").is_dir() or (folder / "CB").is_dir() else None


@pytest.mark.skipif(
    official_folder() is None, reason="needs the official files: set EIGENLENS_DATA to their folder"
)
@pytest.mark.parametrize(
    ("name", "train", "test"),
    [
        (
            "cb",
            {" entails": 115, " contradicts": 119, " is neutral": 16},
            {" entails": 23, " contradicts": 28, " is neutral": 5},
        ),
        ("copa", {" 1": 195, " 2": 205}, {" 1": 55, " 2": 45}),
        (
            "rte",
            {" entails": 1249, " contradicts": 1241},
            {" entails": 146, " contradicts": 131},
        ),
    ],
)
def test_official_counts(name, train, test):
    task = el.load_task(name, data=official_folder())
    assert Counter(task.test["answer"]) == test
    learned_from = list(task.train) + list(task.validation)
    prompts = {example["prompt"] for example in learned_from}
    # RTE's training file repeats two rows; a repeated prompt is never on both sides.
    assert 0 <= sum(train.values()) - len(learned_from) <= 2
    assert len(prompts) == sum(train.values()) - 2 * (name == "rte")
    assert not set(task.train["prompt"]) & set(task.validation["prompt"])
    assert not prompts & set(task.test["prompt"])
    if len(learned_from) == sum(train.values()):
        assert Counter(example["answer"] for example in learned_from) == train
    assert all(example["answer"] in example["candidates"] for example in learned_from)
    share = max(test.values()) / sum(test.values())
    assert majority_accuracy(task.train, task.test) == pytest.approx(
        share if name != "copa" else 0.45
    )
