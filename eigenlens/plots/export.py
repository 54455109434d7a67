"""Figures as files: SVG, PDF and PNG through kaleido and a Chromium, HTML beside one plotly.js.

A figure of :data:`~eigenlens.plots.style.FULL_WIDTH` pixels becomes a PDF page of 7 inches. Drawn
twice, a figure gives the same SVG and PDF byte for byte: version control sees real changes only.
"""

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from eigenlens.errors import StaticExportError
from eigenlens.files import atomic_path, write_text
from eigenlens.plots.style import FULL_WIDTH

STATIC = ("svg", "pdf", "png")
FORMATS = (*STATIC, "html")
_PLOTLY = "plotly.min.js"
_POINTS_PER_PIXEL = 0.75
_SCALES = {"svg": 1.0, "pdf": 7 * 72 / (_POINTS_PER_PIXEL * FULL_WIDTH), "png": 3.0}
_NO_KALEIDO = "Install it with `pip install 'eigenlens[figures]'`."
_NO_BROWSER = (
    "Install one from the system's packages (`apt-get install chromium`, `brew install chromium`) "
    "or with `plotly_get_chrome`, or set BROWSER_PATH to one."
)


def find_browser() -> str:
    """Path of the Chromium (Chrome, Edge, Brave) that draws static figures.

    Raises:
        StaticExportError: kaleido or the browser is missing.
    """
    try:
        # kaleido draws, choreographer is its way to the browser.
        import kaleido  # noqa: F401
        from choreographer.browsers.chromium import Chromium
    except ImportError as error:
        raise StaticExportError(f"SVG, PDF and PNG take kaleido. {_NO_KALEIDO}") from error
    found = Chromium.find_browser(skip_local=False)
    if found is None or not os.access(found, os.X_OK):
        where = f" ({found} of BROWSER_PATH is no program)" if found else ""
        raise StaticExportError(f"SVG, PDF and PNG take a Chromium{where}. {_NO_BROWSER}")
    return str(found)


def export(
    figures: Mapping[str, go.Figure],
    folder: str | os.PathLike[str],
    formats: Iterable[str] = FORMATS,
) -> list[Path]:
    """Write ``NAME.FORMAT`` for every figure and format; one start of the browser serves all.

    HTML files share ``plotly.min.js`` in the same folder, and open without a network.

    Args:
        figures: by name, each with a width and a height.
        folder: made if it is not there.
        formats: of :data:`FORMATS`.

    Raises:
        ValueError: an unknown format.
        StaticExportError: kaleido or a Chromium is missing; HTML has been written before.
    """
    formats = list(dict.fromkeys(formats))
    unknown = set(formats) - set(FORMATS)
    if unknown:
        raise ValueError(
            f"Unknown format {', '.join(sorted(unknown))}; choose from {', '.join(FORMATS)}."
        )
    folder = Path(folder)
    if "html" in formats:
        _write_plotly(folder / _PLOTLY)
        for name, figure in figures.items():
            write_html(figure, folder / f"{name}.html", name, include_plotlyjs=_PLOTLY)
    static = [(name, form) for name in figures for form in STATIC if form in formats]
    if static:
        find_browser()
        _draw(figures, static, folder)
    return [folder / f"{name}.{form}" for name in figures for form in formats]


def write_html(figure: go.Figure, path: Path, name: str, **options: Any) -> None:
    """Write a figure as a page, atomically; the same figure gives the same bytes.

    Args:
        figure: to write.
        path: of the file.
        name: ``id`` of its element, which plotly would draw at random.
        **options: of plotly's own function.
    """
    with atomic_path(path) as temporary:
        figure.write_html(temporary, div_id=name, **options)


def _write_plotly(path: Path) -> None:
    """Put plotly.js there whole: plotly itself would leave half of one as it is."""
    library = get_plotlyjs()
    if not path.is_file() or path.read_bytes() != library.encode():
        write_text(path, library)


def _draw(figures: Mapping[str, go.Figure], wanted: list[tuple[str, str]], folder: Path) -> None:
    import kaleido

    with ExitStack() as stack:
        files = {
            (name, form): stack.enter_context(atomic_path(folder / f"{name}.{form}"))
            for name, form in wanted
        }
        kaleido.write_fig_from_object_sync(
            [
                {
                    "fig": figures[name],
                    "path": file,
                    "opts": {"format": form, "scale": _SCALES[form]},
                }
                for (name, form), file in files.items()
            ],
            cancel_on_error=True,
            kopts={"mathjax": False},  # kaleido would ask a server for it
        )
        for (name, form), file in files.items():
            if form in _STABLE:
                file.write_bytes(_STABLE[form](file.read_bytes(), name))


def _stable_svg(content: bytes, name: str) -> bytes:
    """Replace the random names that plotly.js gives to the figure and its traces."""
    found = re.search(rb'id="defs-([0-9a-f]+)"', content)
    if found is not None:
        own = rb"(?<=[a-z-])" + found[1] + rb"(?![0-9a-f])"
        content = re.sub(own, name.encode(), content)
    return re.sub(rb'(class="trace \w+ trace)[0-9a-f]{6}\b', rb"\1", content)


def _stable_pdf(content: bytes, name: str) -> bytes:
    """Replace the time of drawing by one of the same length: offsets in the file still hold."""
    return re.sub(rb"(/(?:CreationDate|ModDate) \(D:)\d{14}", rb"\g<1>20000101000000", content)


_STABLE = {"svg": _stable_svg, "pdf": _stable_pdf}
