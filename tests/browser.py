"""A headless Chromium for the tests, driven over the DevTools protocol.

The driver is kaleido's (choreographer): where static figures can be drawn, pages can be tested.
"""

import asyncio
import base64
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from eigenlens.plots.export import StaticExportError, find_browser


def browser_path() -> str:
    """Path of the browser; skips the test, with the reason, where there is none."""
    try:
        return find_browser()
    except StaticExportError as error:
        pytest.skip(str(error))


class Page:
    """An open page: what it logged and requested, and what it answers to questions."""

    def __init__(self, tab: Any) -> None:
        self._tab = tab
        self.problems: list[str] = []
        self.requests: list[str] = []

    async def send(self, command: str, **params: Any) -> dict[str, Any]:
        """A command of the protocol."""
        answer = await self._tab.send_command(command, params=params)
        assert "error" not in answer, answer
        return answer["result"]

    async def open(self, file: Path, width: int, height: int = 900) -> None:
        """Show a file in a window of this size, until its figures are drawn."""

        async def log(event: dict[str, Any]) -> None:
            entry = event["params"].get("entry", {})
            if entry.get("level") in ("warning", "error"):
                self.problems.append(entry["text"])

        async def console(event: dict[str, Any]) -> None:
            if event["params"]["type"] in ("error", "warning", "assert"):
                self.problems.append(str(event["params"]["args"]))

        async def thrown(event: dict[str, Any]) -> None:
            self.problems.append(str(event["params"]["exceptionDetails"]))

        async def request(event: dict[str, Any]) -> None:
            self.requests.append(event["params"]["request"]["url"])

        self._tab.subscribe("Log.entryAdded", log)
        self._tab.subscribe("Runtime.consoleAPICalled", console)
        self._tab.subscribe("Runtime.exceptionThrown", thrown)
        self._tab.subscribe("Network.requestWillBeSent", request)
        for domain in ("Log", "Runtime", "Network", "Page"):
            await self.send(f"{domain}.enable")
        await self.resize(width, height)
        loaded = self._tab.subscribe_once("Page.loadEventFired")
        await self.send("Page.navigate", url=file.resolve().as_uri())
        await loaded
        await self.frames()

    async def resize(self, width: int, height: int = 900) -> None:
        """Another size of the window, as on a phone below 500 pixels."""
        await self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )

    async def frames(self) -> None:
        """Wait until what was asked for is drawn."""
        await self.ask("new Promise(r => setTimeout(() => requestAnimationFrame(r), 300))")

    async def ask(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        answer = await self.send(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def screenshot(self, file: Path) -> None:
        """The whole page as PNG."""
        answer = await self.send("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(answer["data"]))

    async def pdf(self, file: Path) -> None:
        """The page as it is printed on A4."""
        answer = await self.send(
            "Page.printToPDF", printBackground=True, paperWidth=8.27, paperHeight=11.69
        )
        file.write_bytes(base64.b64decode(answer["data"]))


def visit(file: Path, width: int, look: Callable[[Page], Awaitable[None]]) -> None:
    """Open a file in a window of this width and do something with the page."""
    path = browser_path()

    async def session() -> None:
        import choreographer

        async with choreographer.Browser(path=path) as browser:
            page = Page(await browser.create_tab("about:blank"))
            await page.open(file, width)
            await look(page)

    asyncio.run(session())


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


async def faults_of_text(page: Page, smallest: float) -> list[str]:
    """Texts of the page's figures that are too small, cut off, or on top of another text."""
    texts = await page.ask(_TEXTS)
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
