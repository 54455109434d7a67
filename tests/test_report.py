"""The report shows what the run found, on one page that needs nothing else.

In a browser: nothing is logged, nothing requested, every figure drawn, every table sortable.
"""

import html
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from browser import faults_of_text, visit
from typer.testing import CliRunner

import eigenlens as el
from eigenlens import pipeline, run_folder
from eigenlens.cli import app
from eigenlens.evaluation import Evaluation
from eigenlens.frozen_set import FrozenSet
from eigenlens.report import inside, write_report

CONFIG = el.EigenpruneConfig(
    model="arith-tiny",
    device="cpu",
    task_args={"n_train": 60, "n_validation": 40, "n_test": 40},
    search="guarded",
    search_args={"step": 5, "steps": 3},
    protect={"int_add": {"high": 20, "n_train": 10, "n_validation": 10, "n_test": 10}},
)
FIGURES = {"map", "spectrum", "trace", "losses", "activations", "circuit"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder with its report, and what the run returned."""
    folder = tmp_path_factory.mktemp("report") / "run"
    result = pipeline.run(CONFIG, folder, progress=False)
    assert len(result.frozen) > 0
    write_report(folder, progress=False)
    return folder, result


@pytest.fixture(scope="module")
def page(finished):
    """The report in a browser."""
    with visit(finished[0] / "report.html", 1200) as page:
        yield page


@pytest.fixture
def copy(finished, tmp_path):
    """The run folder again, to be changed, without a report."""
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "report.html").unlink()
    return tmp_path / "run"


def page_html(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def page_text(folder):
    return html.unescape(page_html(folder))


def test_a_run_is_read_back_as_it_was(finished):
    folder, result = finished
    again, metrics = run_folder.load_run(folder)
    assert again.config == result.config
    assert again.comparison == result.comparison
    assert again.scores.to_pandas().equals(result.scores.to_pandas())
    assert again.frozen.to_pandas().equals(result.frozen.to_pandas())
    assert again.search.protected.equals(result.search.protected)
    assert again.seconds == metrics["seconds"] == pytest.approx(result.seconds)


def test_numbers_config_and_versions_are_those_of_the_run(finished, tmp_path):
    folder, result = finished
    text = page_text(folder)
    for e in (result.before, result.after):
        low, high = e.interval
        assert f"{e.accuracy:.1%}" in text
        assert f"{low:.1%} … {high:.1%}" in text
    test = result.comparison
    assert f"{test.gained} gained, {test.lost} lost" in text
    assert f"{100 * test.accuracy_change:+.1f} points".replace("-", "−") in text
    (config,) = re.findall(r"<pre>(.*?)</pre>", text, re.DOTALL)
    (tmp_path / "config.yaml").write_text(config, encoding="utf-8")
    assert el.EigenpruneConfig.from_yaml(tmp_path / "config.yaml") == result.config
    assert f'<td data-value="{el.provenance.versions()["torch"]}">' in text
    assert result.scores.provenance.model_fingerprint in text


def test_in_a_browser_it_is_whole_and_asks_for_nothing(finished, page):
    folder, result = finished
    was, now = result.before.examples, result.after.examples
    changed = now[(was["predicted"] != now["predicted"]) | (was["correct"] != now["correct"])]
    assert page.problems == []
    own = (folder / "report.html").resolve().as_uri()
    assert [url for url in page.requests if url != own and not url.startswith("data:")] == []
    drawn = page.ask(
        "Object.fromEntries([...document.querySelectorAll('.js-plotly-plot')].map(f => [f.id,"
        " f.querySelectorAll('.points path, .lines path, image, canvas').length]))"
    )
    assert set(drawn) == {f"figure-{name}" for name in FIGURES}
    assert all(drawn.values())
    assert faults_of_text(page, smallest=12) == []
    rows = page.ask(
        "[...document.querySelectorAll('#table-changed tbody tr')]"
        ".map(r => [...r.cells].map(c => c.textContent))"
    )
    expected = {
        (prompt, answer, was["predicted"][i], predicted)
        for i, prompt, answer, predicted in changed[["prompt", "answer", "predicted"]].itertuples()
    }
    assert {tuple(row[:4]) for row in rows} == expected
    assert len(rows) == len(expected) > 0


def test_every_table_sorts_by_every_column(finished, page):
    _, result = finished
    column = "[...document.querySelectorAll('#table-frozen tbody tr')].map(r => r.cells[{}].{})"
    # Both orders of every column, by the numbers behind the texts where there are numbers.
    wrong = page.ask(
        """[...document.querySelectorAll('table.sortable th')].flatMap(th => {
          const rows = () => [...th.closest('table').tBodies[0].rows]
            .map(r => r.cells[th.cellIndex].dataset.value).filter(v => v !== '');
          const compare = th.classList.contains('number')
            ? (a, b) => a - b : (a, b) => a.localeCompare(b, undefined, {numeric: true});
          const before = rows();
          return [['ascending', 1], ['descending', -1]].flatMap(([state, sign]) => {
            th.querySelector('button').click();
            const now = rows();
            const right = th.getAttribute('aria-sort') === state && now.length === before.length
              && now.every((v, i) => i === 0 || sign * compare(now[i - 1], v) <= 0)
              && [...now].sort().join() === [...before].sort().join();
            return right ? [] : [th.textContent + ' ' + state];
          });
        })"""
    )
    assert wrong == []
    page.ask("document.querySelector('#table-frozen th:nth-child(7) button').click()")
    scores = result.frozen.to_pandas().merge(result.scores.to_pandas())["delta_loss"]
    shown = [float(v) for v in page.ask(column.format(6, "dataset.value"))]
    np.testing.assert_array_equal(shown, np.sort(scores.to_numpy()))
    states = page.ask("[...document.querySelectorAll('#table-frozen th')].map(t => t.ariaSort)")
    assert states == ["none"] * 6 + ["ascending", "none"]
    focus = page.ask(
        "document.querySelector('#table-frozen th button').focus(), document.activeElement.tagName"
    )
    assert focus == "BUTTON"


@pytest.mark.slow
def test_on_a_phone_nothing_is_wider_than_the_screen(finished):
    folder, _ = finished
    with visit(folder / "report.html", 390) as page:
        assert page.ask("document.documentElement.scrollWidth") <= 390
        wide = page.ask(
            "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, pre'))"
            ".filter(e => e.getBoundingClientRect().right > 390).map(e => e.outerHTML.slice(0, 80))"
        )
        assert wide == []
        assert faults_of_text(page, smallest=12) == []
        assert page.problems == []


def test_in_print_figures_and_tables_fit_the_paper(page):
    page.send("Emulation.setEmulatedMedia", media="print")
    page.resize(690)  # A4 within its margins
    cut = page.ask(
        "[...document.querySelectorAll('main *')].filter(e =>"
        " e.getBoundingClientRect().right > 691).map(e => e.outerHTML.slice(0, 80))"
    )
    assert cut == []
    hidden = page.ask(
        "[...document.querySelectorAll('.scroll')].filter(e => e.scrollHeight >"
        " e.clientHeight + 1 && getComputedStyle(e).overflowY !== 'visible').length"
    )
    assert hidden == 0
    page.send("Emulation.setEmulatedMedia", media="")
    page.resize(1200)


def test_without_the_model_the_page_says_why(copy):
    runner = CliRunner()
    found = runner.invoke(app, ["report", str(copy), "--no-circuit"])
    assert found.exit_code == 0, found.output
    assert "--no-circuit" in page_text(copy)
    assert 'id="figure-circuit"' not in page_text(copy)
    assert 'id="figure-spectrum"' in page_text(copy)
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("model: arith-tiny", "model: /gone/away.gguf"))
    out = copy / "elsewhere" / "page.html"
    found = runner.invoke(app, ["report", str(copy), "--out", str(out)])
    assert found.exit_code == 0, found.output
    assert "No such GGUF file: /gone/away.gguf" in html.unescape(out.read_text(encoding="utf-8"))


def test_another_model_is_not_taken_for_that_of_the_run(copy, tiny_folder):
    config = copy / "config.yaml"
    other = str(tiny_folder("llama"))
    config.write_text(config.read_text().replace("model: arith-tiny", f"model: {other}"))
    write_report(copy, progress=False)
    assert "other weights" in page_text(copy)
    assert 'id="figure-circuit"' not in page_text(copy)


def test_what_is_no_finished_run_is_refused_with_what_to_do(copy, tmp_path):
    runner = CliRunner()
    (copy / "after.parquet").unlink()
    found = runner.invoke(app, ["report", str(copy)])
    assert found.exit_code == 2
    message = " ".join(found.output.split())
    assert "after.parquet is not there" in message
    assert "eigenlens run --config" in message
    found = runner.invoke(app, ["report", str(tmp_path / "nothing")])
    assert found.exit_code == 2
    assert "is no run folder" in " ".join(found.output.split())
    assert not (copy / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("basis", "what"),
    [
        ("qk_ov", "joint maps (QK: W_Q W_Kᵀ, OV: W_V W_O)"),
        ("neurons", "neurons"),
        ("pca", "principal components of the activations"),
    ],
)
def test_a_run_in_another_basis_has_a_whole_report(tmp_path, basis, what):
    """With the directions, those of ``pca`` as well, which follow from data."""
    search = {"search": "one_shot", "search_args": {"fractions": [0.01, 0.02]}}
    config = CONFIG.model_copy(update={**search, "basis": basis, "protect": {}, "refine": 0})
    result = pipeline.run(config, tmp_path, progress=False)
    write_report(tmp_path, progress=False)
    text = page_text(tmp_path)
    assert f"of {result.frozen.n_candidates:,} " in text
    assert f"{what} were" in text
    assert 'id="figure-circuit"' in text
    kinds = set(result.frozen.components["matrix"])
    assert kinds <= {"qk_ov": {"QK", "OV"}, "neurons": {"W_out"}}.get(basis, kinds)
    assert bool(re.search(r"query: [^;<]+; key: [^;<]+", text)) == (basis == "qk_ov")
    with visit(tmp_path / "report.html", 1200) as page:
        assert page.problems == []
        assert faults_of_text(page, smallest=12) == []


@pytest.mark.slow
def test_texts_of_a_task_stay_texts(copy):
    """A prompt with markup is shown letter by letter and runs nothing."""
    nasty = "</td></script><script>document.title='run'</script><b>&amp;"
    for name in ("before", "after"):
        e = Evaluation.load(copy / f"{name}.parquet")
        replace(e, examples=e.examples.assign(prompt=nasty)).save(copy / f"{name}.parquet")
    write_report(copy, inside=False)
    with visit(copy / "report.html", 1200) as page:
        assert page.problems == []
        assert "eigenlens report" in page.ask("document.title")
        shown = page.ask("document.querySelector('#table-changed tbody td').textContent")
        assert shown == nasty


def test_a_run_that_froze_nothing_has_a_report(copy, finished):
    _, result = finished
    nothing = FrozenSet.from_scores(result.scores, np.array([], dtype=int))
    nothing.save(copy / "frozen.safetensors")
    shutil.copy(copy / "before.parquet", copy / "after.parquet")
    write_report(copy, progress=False)
    text = page_text(copy)
    assert "There are no pruned paths" in text
    assert "No answer changed" in text
    assert 'id="figure-map"' not in text


@pytest.mark.slow
def test_passages_are_those_of_examples(finished, copy):
    """Of a text that is given, too: one component at a time, the extreme token marked."""
    _, result = finished
    model, task = pipeline.load_as(result.config)
    for text in (task.train, task.test):
        write_report(copy, text=text, progress=False)
        (table,) = re.findall(r'<table [^>]*id="table-answers".*?</table>', page_html(copy), re.S)
        rows = re.findall(
            r"<tr>.*?([^<>]+)</button></td><td .*?>(.*?)</td><td .*?>(.*?)</td>", table, re.S
        )
        found = {row[0]: row[1:] for row in rows}
        spectra = result.scores.spectra_on(model)
        for place in result.frozen.components.itertuples(index=False):
            own = el.examples(model, spectra, place[:4], text, top=3, around=8, progress=False)
            for end, shown in zip(("largest", "smallest"), found[own.node], strict=True):
                expected = []
                for _, row in own.passages[own.passages["end"] == end].iterrows():
                    parts = list(map(html.escape, row["tokens"]))
                    parts[row["at"]] = f"<mark>{parts[row['at']]}</mark>"
                    value = f"{row['coordinate']:+.3g}".replace("-", "−")
                    expected.append(f"<b>{value}</b> {''.join(parts)}")
                assert shown.split("\n") == expected


@pytest.mark.slow
def test_the_edit_scaled_back_is_that_of_frontier(finished, copy):
    """Where there is text besides the task's own: half of it chooses, half of it reports."""
    _, result = finished
    assert "table-rewound" not in page_html(finished[0])  # it protected another task, and no text
    model, task = pipeline.load_as(result.config)
    write_report(copy, text=task.test, progress=False)
    halves = (task.test.select(range(first, len(task.test), 2)) for first in (0, 1))
    options = {"batch_size": result.config.batch_size, "progress": False}
    found = el.frontier(model, {"it": result.frozen}, task, *halves, **options).show()
    (table,) = re.findall(r'<table [^>]*id="table-rewound".*?</table>', page_html(copy), re.S)
    rows = re.findall(r"<tr>(<td.*?)</tr>", table, re.S)
    shown = [[re.sub("<.*?>", "", c) for c in re.findall(r"<td.*?</td>", r, re.S)] for r in rows]
    assert len(shown) == len(found)
    for (strength, components, accuracy, harm, chosen), row in zip(
        shown, found.itertuples(), strict=True
    ):
        assert (float(strength), int(components)) == (row.strength, row.components)
        assert accuracy == f"{row.test_accuracy:.1%}"
        assert float(harm.replace("−", "-")) == pytest.approx(row.test_harm, abs=1e-4)
        assert chosen == ("chosen" if row.chosen else "")
    assert 'id="figure-frontier"' in page_html(copy)


def test_groups_are_those_of_groups(finished, page):
    _, result = finished
    model, task = pipeline.load_as(result.config)
    train = task.train.select(range(50))
    spectra = result.scores.spectra_on(model)
    count = len(result.frozen) // 3
    options = {"count": count, "singles": True, "progress": False}
    found = el.groups(model, spectra, result.frozen, train, **options)
    rows = page.ask(
        "[...document.querySelectorAll('#table-groups tbody tr')]"
        ".map(r => [...r.cells].map(c => c.textContent))"
    )
    for row, expected in zip(
        sorted(rows, key=lambda r: int(r[0])), found.table.to_dict("records"), strict=True
    ):
        numbers = [
            f"{expected[n]:+.3g}".replace("-", "−") for n in ("first_order", "single", "joint")
        ]
        assert row[:6] == [
            str(expected["group"]),
            str(expected["components"]),
            expected["where"],
            *numbers,
        ]
        assert row[7:] == [expected["reads"], expected["writes"]]
    assert len(rows) == len(found) == count > 1


@pytest.mark.slow
def test_tokens_of_passages_stay_texts(copy, monkeypatch):
    nasty = "</td></script><script>document.title='run'</script><b>&amp;"
    look = inside.look_inside

    def renamed(*arguments, **options):
        found = look(*arguments, **options)
        spoilt = {
            node: replace(
                e,
                passages=e.passages.assign(tokens=[[nasty] * len(t) for t in e.passages["tokens"]]),
            )
            for node, e in found.examples.items()
        }
        return replace(found, examples=spoilt)

    monkeypatch.setattr("eigenlens.report.page.look_inside", renamed)
    write_report(copy, progress=False)
    with visit(copy / "report.html", 1200) as page:
        assert page.problems == []
        assert "eigenlens report" in page.ask("document.title")
        marked = "[...document.querySelectorAll('#table-answers mark')].map(m => m.textContent)"
        assert set(page.ask(marked)) == {nasty}


def test_tasks_with_candidates_show_both_accuracies(copy):
    n = 40
    for name, right in (("before", 10), ("after", 30)):
        e = Evaluation.load(copy / f"{name}.parquet")
        chosen = {"choice": e.examples["answer"], "choice_correct": np.arange(n) < right}
        replace(e, examples=e.examples.assign(**chosen)).save(copy / f"{name}.parquet")
    write_report(copy, inside=False)
    text = page_text(copy)
    assert 'Choice accuracy before</dt><dd class="large">25.0%' in text
    assert 'Choice accuracy after</dt><dd class="large">75.0%' in text
