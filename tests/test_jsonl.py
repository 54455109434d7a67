"""A user's own files: splits, and complaints with file and line."""

import json

import pytest

import eigenlens as el
from eigenlens.tasks.rows import DataError

ROWS = [{"prompt": f"{i} =", "answer": f" {i}", "note": "kept out"} for i in range(20)]


@pytest.fixture
def write(tmp_path):
    def file(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return file


def prompts(task):
    return [set(split["prompt"]) for split in (task.train, task.validation, task.test)]


def test_one_file(write):
    path = write("mine.jsonl", ROWS)
    task = el.load_task("jsonl", path=path, seed=3)
    train, validation, test = prompts(task)
    assert (len(train), len(validation), len(test)) == (13, 3, 4)  # 20 % of 20, of 16
    assert train | validation | test == {row["prompt"] for row in ROWS}
    assert task.hash == el.load_task("jsonl", path=path, seed=3).hash
    assert task.hash != el.load_task("jsonl", path=path, seed=4).hash
    sized = el.load_task("jsonl", path=path, n_train=2, n_validation=5, n_test=6)
    assert [len(split) for split in prompts(sized)] == [2, 5, 6]
    assert all(e["answer"] == f" {e['prompt'].split()[0]}" for e in sized.train)
    with pytest.raises(ValueError, match=r"n_train=10 .* there are 9"):
        el.load_task("jsonl", path=path, n_train=10, n_validation=5, n_test=6)
    with pytest.raises(ValueError, match="leaves none"):
        el.load_task("jsonl", path=path, n_test=20)


def test_a_file_a_split(write):
    train, test = write("train.jsonl", ROWS[:12]), write("test.jsonl", ROWS[12:])
    task = el.load_task("jsonl", train=train, test=test)
    assert list(task.test["prompt"]) == [row["prompt"] for row in ROWS[12:]]
    assert [len(split) for split in prompts(task)] == [10, 2, 8]
    validation = write("validation.jsonl", ROWS[8:12])
    short = write("short.jsonl", ROWS[:8])
    task = el.load_task("jsonl", train=short, validation=validation, test=test, n_test=3)
    assert [len(split) for split in prompts(task)] == [8, 4, 3]


def test_splits_that_share_prompts_are_named(write):
    files = {
        "train": write("train.jsonl", [*ROWS[:12], ROWS[0]]),
        "validation": write("validation.jsonl", ROWS[8:14]),
        "test": write("test.jsonl", [*ROWS[14:], ROWS[9]]),
    }
    with pytest.raises(ValueError, match="share") as caught:
        el.load_task("jsonl", **files)
    message = str(caught.value)
    assert "train and validation share 4 prompts, such as '" in message
    assert "train and test share 1 prompt, such as '9 ='; validation and test share" in message
    assert message.endswith("such as '9 =': take them out of one of the files.")
    files["validation"] = write("validation.jsonl", ROWS[12:14])
    with pytest.raises(ValueError, match=r"^train and test share 1 prompt"):
        el.load_task("jsonl", **files)


def test_candidates(write):
    rows = [{**row, "candidates": [row["answer"], " none"]} for row in ROWS]
    task = el.load_task("jsonl", path=write("c.jsonl", rows))
    assert all(e["candidates"] == [e["answer"], " none"] for e in task.test)
    assert el.load_task("jsonl", path=write("n.jsonl", ROWS)).test[0]["candidates"] == []


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": "a"}, r"'answer' is missing \(the row has 'prompt'\)"),
        ({}, "'answer' is missing"),
        ({"answer": " b"}, "'prompt' is missing"),
        ({"prompt": "a", "answer": ""}, "'answer' must be a text, not ''"),
        ({"prompt": "a", "answer": 7}, "'answer' must be a text, not 7"),
        ({"prompt": "a", "answer": " b", "candidates": [" c", " d"]}, "' b' is not among"),
        ({"prompt": "a", "answer": " b", "candidates": " b"}, "must be a list of texts"),
        ({"prompt": "a", "answer": " b", "candidates": [" b", 3]}, "must be a list of texts"),
        ({"prompt": "a", "answer": " b", "candidates": [" b", ""]}, "must be a list of texts"),
        ({"prompt": "a", "answer": " b", "candidates": [" b", " b"]}, "listed twice"),
    ],
)
def test_a_bad_row_is_named(bad, message, write):
    path = write("bad.jsonl", [*ROWS[:3], bad])
    with pytest.raises(DataError, match=rf"bad\.jsonl, line 4: .*{message}"):
        el.load_task("jsonl", path=path)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"prompt": "a", "answer": "\\ud83d"}', r"\\ud83d is half of a surrogate pair"),
        (b'{"prompt": "a", "answer": " b", "note": ["\\uDC00"]}', r"\\udc00 is half"),
        (b'{"prompt": "a", "answer": " b", "\\ud800": 1}', r"\\ud800 is half"),
        (b'{"prompt": "a", "answer": ' + b"1" * 5000 + b"}", r"cannot be read: .*5000 digits"),
        (b'{"prompt": "a", "answer": ' + b"[" * 100_000, r"cannot be read: .*recursion"),
        (b'{"prompt": "a", "answer": " b", "answer": " c"}', r"the key 'answer' comes twice"),
        (b'{"prompt": "a", "answer": " b", "x": [{"y": 1, "y": 1}]}', "the key 'y' comes twice"),
        (b"[1, 2]", r"expected a JSON object, not '\[1, 2\]'"),
        (b'"prompt"', "expected a JSON object"),
        (b"null", "expected a JSON object, not 'null'"),
        (b"{'prompt': 'a'}", "not valid JSON"),
        (b'{"prompt": "a"} {"prompt": "b"}', r"not valid JSON \(Extra data\)"),
        (b'\xef\xbb\xbf{"prompt": "a", "answer": " b"}', r"not valid JSON \(.*BOM"),
        (b'{"prompt": "\xe9"}', "not UTF-8"),
        (b'{"prompt": ["a"], "answer": " b"}', r"'prompt' must be a text, not \['a'\]"),
        (b'{"prompt": null, "answer": " b"}', "'prompt' must be a text, not None"),
    ],
)
def test_a_bad_line_is_named(line, problem, tmp_path):
    path = tmp_path / "bad.jsonl"
    good = b'{"prompt": "1 =", "answer": " 1"}\r\n\n'
    path.write_bytes(good + line + b"\n" + good)
    with pytest.raises(DataError, match=rf"bad\.jsonl, line 3: .*{problem}"):
        el.load_task("jsonl", path=path)


def test_marks_and_line_ends_of_other_systems_are_no_fault(tmp_path):
    path = tmp_path / "windows.jsonl"
    rows = [f'{{"prompt": "{i} = \\ud83d\\ude00", "answer": " {i}\u2028"}}' for i in range(10)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n \r\n".join(rows).encode() + b"\r\n\r\n")
    task = el.load_task("jsonl", path=path)
    found = {
        row["prompt"]: row["answer"]
        for split in (task.train, task.validation, task.test)
        for row in split
    }
    assert found == {f"{i} = \U0001f600": f" {i}\u2028" for i in range(10)}


def test_a_row_that_does_not_tokenise_is_named_with_its_split(write, tiny):
    train = write("train.jsonl", ROWS)
    test = write(
        "test.jsonl", [{"prompt": "1 +", "answer": " 1"}, {"prompt": "40 =", "answer": "2"}]
    )
    with pytest.raises(ValueError, match=r"'jsonl', split test: Example 1: .* spell '40 = 2'"):
        el.load_task("jsonl", tiny("gpt2").tokenizer, train=train, test=test)


def test_bad_arguments(write, tmp_path):
    path = write("mine.jsonl", ROWS)
    for arguments in ({}, {"path": path, "test": path}, {"train": path}, {"validation": path}):
        with pytest.raises(ValueError, match="either path="):
            el.load_task("jsonl", **arguments)
    with pytest.raises(FileNotFoundError, match="absent"):
        el.load_task("jsonl", path=tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="is empty"):
        el.load_task("jsonl", path=write("none.jsonl", []))


def test_complaints_name_the_file_and_quote_little(write):
    with pytest.raises(ValueError, match=r"one\.jsonl: n_test=1 of 1 examples leaves none"):
        el.load_task("jsonl", path=write("one.jsonl", ROWS[:1]))
    long = write("long.jsonl", [{"prompt": "a", "answer": " b", "candidates": ["x" * 9999]}])
    with pytest.raises(DataError, match=r"long\.jsonl, line 1: .* is not among") as caught:
        el.load_task("jsonl", path=long)
    assert len(str(caught.value)) < 1500
