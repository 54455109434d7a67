"""A headless Chromium for the tests, driven over the DevTools protocol.

The driver is kaleido's (choreographer): where static figures can be drawn, pages can be tested.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from eigenlens.errors import StaticExportError
from eigenlens.plots.export import find_browser

_KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowRight": 39, "ArrowLeft": 37}
_DRAWN = "new Promise(r => setTimeout(() => requestAnimationFrame(r), 300))"


@contextmanager
def visit(file: Path, width: int) -> Iterator["Page"]:
    """Open a file in a window of this width; skips the test, with the reason, without a browser."""
    try:
        path = find_browser()
    except StaticExportError as error:
        pytest.skip(str(error))
    import choreographer

    with asyncio.Runner() as runner:
        browser = choreographer.Browser(path=path)
        runner.run(browser.open())
        try:
            page = Page(runner, runner.run(browser.create_tab("about:blank")))
            page.open(file, width)
            yield page
        finally:
            runner.run(browser.close())


class Page:
    """An open page: what it logged and requested, and what it answers to questions."""

    def __init__(self, runner: asyncio.Runner, tab: Any) -> None:
        self._runner = runner
        self._tab = tab
        self.problems: list[str] = []
        self.requests: list[str] = []
        for event in ("Log.entryAdded", "Runtime.*", "Network.requestWillBeSent"):
            tab.subscribe(event, self._note)
        for domain in ("Log", "Runtime", "Network", "Page"):
            self.send(f"{domain}.enable")

    async def _note(self, event: dict[str, Any]) -> None:
        what = event["params"]
        if event["method"] == "Network.requestWillBeSent":
            self.requests.append(what["request"]["url"])
        elif event["method"] == "Runtime.exceptionThrown":
            self.problems.append(str(what["exceptionDetails"]))
        elif what.get("entry", {}).get("level") in ("warning", "error"):
            self.problems.append(what["entry"]["text"])
        elif event["method"] == "Runtime.consoleAPICalled" and what["type"] in (
            "assert",
            "error",
            "warning",
        ):
            self.problems.append(str(what["args"]))

    def send(self, command: str, **params: Any) -> dict[str, Any]:
        """A command of the protocol."""
        answer = self._runner.run(self._send(command, params))
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    async def _send(self, command: str, params: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = await self._tab.send_command(command, params=params)
        return answer

    def open(self, file: Path, width: int) -> None:
        """Show a file in a window of this width, until its figures are drawn."""
        self.resize(width)

        async def navigate() -> None:
            loaded = self._tab.subscribe_once("Page.loadEventFired")
            await self._send("Page.navigate", {"url": file.resolve().as_uri()})
            await loaded

        self._runner.run(navigate())
        self.ask(_DRAWN)

    def resize(self, width: int) -> None:
        """Another width of the window; a phone's below 500 pixels."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        self.ask(_DRAWN)

    def click(self, element: str) -> None:
        """Press the left button of the mouse on an element, given as a JavaScript expression."""
        x, y = self.ask(
            f"(e => {{ e.scrollIntoView({{block: 'center', inline: 'center'}});"
            f" const b = e.getBoundingClientRect();"
            f" return [b.x + b.width / 2, b.y + b.height / 2]; }})({element})"
        )
        for kind, button in (("Moved", "none"), ("Pressed", "left"), ("Released", "left")):
            where = {"x": x, "y": y, "button": button, "clickCount": 1}
            self.send("Input.dispatchMouseEvent", type=f"mouse{kind}", **where)
            self.ask(_DRAWN)

    def press(self, key: str) -> None:
        """Press and release a key, such as ``Enter`` or ``ArrowRight``."""
        code = _KEYS[key]
        text = {"text": "\r"} if key == "Enter" else {}
        named = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", type="keyDown", **named, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **named)
        self.ask(_DRAWN)

    def ask(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        answer = self.send(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")


# Texts of plotly figures: each with its box in the window, and the box of its figure.
_TEXTS = """[...document.querySelectorAll('.js-plotly-plot')].flatMap(figure => {
  const outer = figure.querySelector('.main-svg').getBoundingClientRect();
  return [...figure.querySelectorAll('svg text')].filter(t => t.textContent.trim()).map(t => {
    const box = t.getBoundingClientRect();
    return {figure: figure.id, text: t.textContent, size: parseFloat(getComputedStyle(t).fontSize),
      left: box.left, right: box.right, top: box.top, bottom: box.bottom,
      cut: box.left < outer.left - 1 || box.right > outer.right + 1
        || box.top < outer.top - 1 || box.bottom > outer.bottom + 1};
  });
})"""
_SLACK = 2.0  # pixels: line boxes are a little larger than the letters in them


def faults_of_text(page: Page, smallest: float) -> list[str]:
    """Texts of the page's figures that are too small, cut off, or on top of another text."""
    texts = page.ask(_TEXTS)
    assert texts
    faults = [
        f"{t['text']!r} is {'cut off' if t['cut'] else 'small'}: {t}"
        for t in texts
        if t["cut"] or t["size"] < smallest
    ]
    for i, one in enumerate(texts):
        for two in texts[i + 1 :]:
            across = min(one["right"], two["right"]) - max(one["left"], two["left"])
            down = min(one["bottom"], two["bottom"]) - max(one["top"], two["top"])
            if one["figure"] == two["figure"] and across > _SLACK and down > _SLACK:
                faults.append(f"{one['text']!r} overlaps {two['text']!r} in {one['figure']}")
    return faults
