"""Figures of the studies: drawn from stored tables alone, legible, the same every time."""

import shutil
import struct
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest
from browser import faults_of_text, visit
from typer.testing import CliRunner

from eigenlens.cli import app
from eigenlens.errors import StaticExportError
from eigenlens.paper.studies import EXPERIMENTS
from eigenlens.paper.studies.figures import redraw, stored, write_index
from eigenlens.plots import export
from eigenlens.plots.export import find_browser
from eigenlens.plots.style import COLUMN_WIDTH, FULL_WIDTH

FIGURES = Path(__file__).parent.parent / "figures"
STORED = [name for name in EXPERIMENTS if (FIGURES / f"{name}.parquet").is_file()]


@pytest.fixture
def tables(tmp_path):
    """A folder with the tables and pictures that the repository keeps."""
    for file in FIGURES.iterdir():
        if file.suffix in (".parquet", ".svg"):
            shutil.copy(file, tmp_path)
    return tmp_path


@pytest.fixture
def no_browser(monkeypatch):
    """A machine on which no Chromium is found."""
    chromium = pytest.importorskip("choreographer.browsers.chromium")
    monkeypatch.setattr(chromium.Chromium, "find_browser", lambda **_: None)


@pytest.mark.slow
def test_pages_and_index_say_what_the_tables_hold(tables):
    """Fails when a study's texts changed: `eigenlens figures` writes the pages anew."""
    for name in STORED:
        stored(name, tables).save_page(tables)
    write_index(tables)
    for page in (*(f"{name}.md" for name in STORED), "README.md"):
        kept = (FIGURES / page).read_text(encoding="utf-8")
        assert (tables / page).read_text(encoding="utf-8") == kept


@pytest.mark.parametrize("name", STORED)
def test_every_axis_is_titled_and_the_width_is_a_papers(name):
    figure = stored(name, FIGURES).figure
    assert figure.layout.width in (FULL_WIDTH, COLUMN_WIDTH)
    assert figure.layout.height
    for column in {trace.xaxis or "x" for trace in figure.data}:
        assert figure.layout[column.replace("x", "xaxis")].title.text
    assert any(axis.title.text for axis in figure.select_yaxes())


@pytest.mark.slow
def test_no_text_is_small_cut_off_or_on_top_of_another(tmp_path):
    html = [
        stored(name, FIGURES).figure.to_html(
            full_html=False, include_plotlyjs=i == 0, div_id=name, default_width="auto"
        )
        for i, name in enumerate(STORED)
    ]
    page = f"<!DOCTYPE html><meta charset='utf-8'>{''.join(html)}"
    (tmp_path / "all.html").write_text(page, encoding="utf-8")
    with visit(tmp_path / "all.html", 1000) as shown:
        assert faults_of_text(shown, smallest=12) == []
        assert shown.problems == []


@pytest.mark.slow
def test_files_have_the_size_of_the_paper_and_never_change(tmp_path):
    try:
        find_browser()
    except StaticExportError as error:
        pytest.skip(str(error))
    widths = {"page": (FULL_WIDTH, 7.0), "column": (COLUMN_WIDTH, 3.3)}
    figures = {
        name: go.Figure(go.Scatter(x=[1, 2], y=[3, 1]), {"width": width, "height": 300})
        for name, (width, _) in widths.items()
    }
    one, two = tmp_path / "one", tmp_path / "two"
    files = export.export(figures, one)
    assert sorted(file.suffix for file in files) == sorted([".html", ".pdf", ".png", ".svg"] * 2)
    export.export({"page": figures["page"]}, two, ("pdf", "svg"))
    for form in ("svg", "pdf"):
        assert (one / f"page.{form}").read_bytes() == (two / f"page.{form}").read_bytes()
    for name, (width, inches) in widths.items():
        media = (one / f"{name}.pdf").read_bytes().split(b"/MediaBox [0 0 ")[1].split()[0]
        assert float(media) / 72 == pytest.approx(inches, abs=0.02)
        size = struct.unpack(">II", (one / f"{name}.png").read_bytes()[16:24])
        assert size == (3 * width, 900)
    with visit(one / "page.html", 1000) as page:
        assert page.ask("document.querySelectorAll('.points path').length") == 2
        assert {url.rsplit("/", 1)[-1] for url in page.requests} == {"page.html", "plotly.min.js"}


def test_without_a_browser_html_is_written_and_the_message_says_what_to_install(tables, no_browser):
    found = CliRunner().invoke(app, ["figures", STORED[0], "--out", str(tables)])
    assert found.exit_code == 2
    assert "apt-get install chromium" in found.output
    assert (tables / f"{STORED[0]}.html").is_file()
    assert not (tables / f"{STORED[0]}.png").exists()
    written = redraw(tables, [STORED[0]], ("html",))
    assert [result.name for result in written] == [STORED[0]]


def test_a_study_without_a_browser_has_an_html_figure(tmp_path, no_browser):
    with pytest.warns(UserWarning, match="Install one"):
        stored(STORED[0], FIGURES).save(tmp_path)
    assert f"]({STORED[0]}.html)" in (tmp_path / f"{STORED[0]}.md").read_text(encoding="utf-8")
    assert (tmp_path / f"{STORED[0]}.html").is_file()
    table = pd.read_parquet(tmp_path / f"{STORED[0]}.parquet")
    assert table.equals(stored(STORED[0], FIGURES).table)


def test_what_cannot_be_drawn_is_said(tables, tmp_path):
    with pytest.raises(ValueError, match=r"Unknown study 'nonsense'; choose from ambiguous"):
        redraw(tables, ["nonsense"])
    with pytest.raises(ValueError, match=r"Unknown format gif; choose from svg"):
        redraw(tables, [STORED[0]], ("gif",))
    (tables / f"{STORED[0]}.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=f"eigenlens experiment {STORED[0]} --out"):
        redraw(tables, [STORED[0]])
    with pytest.raises(FileNotFoundError, match="holds no table of a study"):
        redraw(tmp_path / "nothing")
