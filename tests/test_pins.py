"""Components of the report are pinned by mouse and keyboard, and their cards say what was found.

Every node has a name full of markup here.
"""

import json
from dataclasses import replace

import pytest
from browser import visit

import eigenlens as el
from eigenlens import pipeline
from eigenlens.circuits.nodes import EMBED, LOGITS
from eigenlens.report import inside, write_report

pytestmark = pytest.mark.slow
CONFIG = el.EigenpruneConfig(
    model="arith-tiny",
    device="cpu",
    task_args={"n_train": 30, "n_validation": 20, "n_test": 20},
    search="one_shot",
    search_args={"fractions": [0.008]},
    refine=0,
    protect={},
)
NODES = "[...document.querySelectorAll('#figure-circuit .points path[role=button]')]"
PINNED = "[...document.querySelectorAll('#panel article')].map(a => a.dataset.node)"
CARD = "document.querySelector('#panel article')"


def nasty(name):
    """The name of a node with markup in it."""
    if name in (EMBED, LOGITS):
        return name
    return f"{name}</script><script>document.title='run'</script><b>&amp;\"'"


def renamed(found):
    """What was found, under other names."""
    tables = {}
    for table in ("nodes", "edges", "outflows", "inflows"):
        frame = getattr(found.paths, table)
        own = {"node", "writer", "reader"} & set(frame)
        tables[table] = frame.assign(**{column: frame[column].map(nasty) for column in own})
    return replace(
        found,
        paths=replace(found.paths, **tables),
        nodes=found.nodes.assign(node=found.nodes["node"].map(nasty)),
        examples={nasty(name): e for name, e in found.examples.items()},
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page, and what it was made from."""
    folder = tmp_path_factory.mktemp("pins") / "run"
    result = pipeline.run(CONFIG, folder, progress=False)
    found = renamed(inside.look_inside(result, progress=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eigenlens.report.page.look_inside", lambda *_, **__: found)
        write_report(folder, progress=False)
    return folder / "report.html", found


@pytest.fixture
def page(report):
    """The page in a browser; nothing is logged, run or requested whatever a test does."""
    with visit(report[0], 1280) as page:
        yield page
        assert page.problems == []
        assert "eigenlens report" in page.ask("document.title")
        own = report[0].resolve().as_uri()
        assert [url for url in page.requests if url != own and not url.startswith("data:")] == []


def node_at(page, number):
    return page.ask(f"{NODES}[{number}].getAttribute('aria-label')")


def rows_of(page, title):
    """Rows of one table of the newest card, by what stands above it."""
    return page.ask(
        f"[...([...{CARD}.querySelectorAll('section')].find(s =>"
        f" s.querySelector('h4').textContent === '{title}')).querySelectorAll('tbody tr')]"
        ".map(r => [...r.cells].map(c => c.textContent))"
    )


def test_a_click_on_a_node_shows_what_the_circuit_holds(report, page):
    _, found = report
    drawn = page.ask(f"{NODES}.map(n => n.getAttribute('aria-label'))")
    edges = found.paths.strongest(60)
    assert set(drawn) == {*edges["writer"], *edges["reader"]} - {EMBED, LOGITS}
    for number in (0, len(drawn) // 2, len(drawn) - 1):
        node = drawn[number]
        page.click(f"{NODES}[{number}]")
        assert page.ask(PINNED)[0] == node
        assert page.ask(f"{NODES}[{number}].getAttribute('aria-pressed')") == "true"
        for title, edges, end in (
            ("Reads from", found.paths.sources(node), "writer"),
            ("Read by", found.paths.readers(node), "reader"),
        ):
            expected = [
                [
                    row[end],
                    f"{row['effect']:+.3g} ± {row['stderr']:.1g}".replace("-", "−"),
                    str(row["position"]).replace("-", "−"),
                ]
                for row in edges.head(6).to_dict("records")
            ]
            if expected:
                assert rows_of(page, title) == expected
        row = found.nodes.set_index("node").loc[node]
        text = page.ask(f"{CARD}.innerText")
        for number_shown in (row["sigma"], row["delta_loss"], row["effect"]):
            assert f"{number_shown:.4g}".lstrip("-") in text
        assert ("frozen" in text) == (row["strength"] > 0)
        for tokens in (row["reads"], row["promotes"], row["suppresses"]):
            assert tokens in text
        passages = page.ask(
            f"[...{CARD}.querySelectorAll('.passage')].map(p =>"
            " [...p.querySelectorAll('span, mark')].map(t => t.textContent).join('|'))"
        )
        expected = found.examples[node].passages["tokens"].map("|".join)
        assert passages == list(expected)
    assert page.ask(PINNED) == [drawn[-1], drawn[len(drawn) // 2], drawn[0]]


def test_pins_come_and_go(report, page):
    _, found = report
    one, two = node_at(page, 0), found.nodes["node"].iloc[-1]
    page.click(f"{NODES}[0]")
    table = "[...document.querySelectorAll('#table-answers .pin')]"
    button = f"{table}.find(b => b.textContent === {json.dumps(two)})"
    page.click(button)
    assert page.ask(PINNED) == [two, one]
    assert page.ask(f"{button}.getAttribute('aria-pressed')") == "true"
    page.click(f"{NODES}[0]")
    assert page.ask(PINNED) == [two]
    page.click(f"{NODES}[1]")
    page.press("Escape")
    assert page.ask(PINNED) == [two]
    page.click(button)
    assert page.ask(PINNED) == []
    assert page.ask("document.getElementById('panel').hidden")
    page.click(f"{NODES}[1]")
    page.click(f"{CARD}.querySelector('.close')")
    assert page.ask(PINNED) == []
    first = found.paths.sources(one)["writer"]
    page.click(f"{NODES}[0]")
    writer = next(name for name in first if name != EMBED)
    page.click(f"[...{CARD}.querySelectorAll('.pin')][0]")  # a writer is pinned from its reader
    assert page.ask(PINNED) == [writer, one]


def test_the_keyboard_does_all_of_it(report, page):
    page.ask(f"{NODES}[0].focus()")
    page.press("ArrowRight")
    assert page.ask("document.activeElement.getAttribute('aria-label')") == node_at(page, 1)
    page.press("Enter")
    assert page.ask(PINNED) == [node_at(page, 1)]
    assert page.ask("document.activeElement.getAttribute('aria-label')") == node_at(page, 1)
    assert page.ask(f"{NODES}.filter(n => n.tabIndex === 0).length") == 1
    assert "is pinned" in page.ask("document.getElementById('panel-status').textContent")
    page.ask("document.querySelector('#table-frozen .pin').focus()")
    page.press("Enter")
    name = page.ask("document.activeElement.textContent")
    assert page.ask(PINNED) == [name, node_at(page, 1)]
    page.ask(f"{CARD}.querySelector('.close').focus()")
    page.press("Enter")  # the focus goes back to what had pinned it
    assert page.ask("document.activeElement.textContent") == name
    page.press("Escape")
    assert page.ask(PINNED) == []


@pytest.mark.parametrize("width", [1280, 900, 400])
def test_cards_fit_the_window_and_hide_no_figure(page, width):
    page.resize(width)
    page.click(f"{NODES}[2]")
    assert page.ask("document.documentElement.scrollWidth") <= width
    sizes = page.ask(
        "[document.getElementById('panel'), document.querySelector('main')].map(e =>"
        " { const b = e.getBoundingClientRect(); return [b.left, b.right, b.top]; })"
    )
    (left, right, top), (_, end, _) = sizes
    assert right <= width
    assert end <= left + 1 if width > 800 else top > 400
    wide = page.ask(
        "[...document.querySelectorAll('#panel *')].filter(e => e.scrollWidth > e.clientWidth + 1"
        " && e.clientWidth).map(e => e.outerHTML.slice(0, 80))"
    )
    assert wide == []


def test_a_page_without_the_model_has_no_buttons(report, tmp_path):
    write_report(report[0].parent, tmp_path / "page.html", inside=False)
    with visit(tmp_path / "page.html", 1280) as page:
        assert page.ask("document.querySelectorAll('.pin').length") == 0
        assert page.ask("document.getElementById('panel').hidden")
        assert page.problems == []


def test_the_same_run_gives_the_same_page(report, tmp_path):
    folder = report[0].parent
    pages = [write_report(folder, tmp_path / f"{n}.html", progress=False) for n in range(2)]
    one, two = (path.read_bytes() for path in pages)
    assert one == two
    assert b'id="components"' in one
