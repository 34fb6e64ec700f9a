"""The page: a person drops or chooses an image and sees the five best classes."""

import asyncio
import base64

import pytest
import requests

from tests.extras import needs
from tests.serve.browser import browser_page, find_browser

needs_server = needs("uvicorn", "aiohttp")
needs_browser = pytest.mark.skipif(find_browser() is None, reason="needs Chromium, which is not installed here")

DONE = "!document.getElementById('classes').hidden || document.getElementById('status').className === 'bad'"
SHOWN = """[...document.querySelectorAll('#classes tbody tr:not([aria-hidden])')].map(
  (row) => [row.querySelector('th').textContent, row.querySelector('td').textContent])"""
DROP = """(() => {
  const bytes = Uint8Array.from(atob('%s'), (letter) => letter.charCodeAt(0));
  const carried = new DataTransfer();
  carried.items.add(new File([bytes], '%s'));
  const options = {bubbles: true, cancelable: true, dataTransfer: carried};
  const there = document.getElementById('drop');
  there.dispatchEvent(new DragEvent('dragover', options));
  return there.dispatchEvent(new DragEvent('drop', options));
})()"""

IS_RED = """(() => {
  const seen = document.querySelector('canvas').getContext('2d').getImageData(0, 0, 448, 448).data;
  return seen.some((value, place) => place % 4 == 0 && value > seen[place + 2] + 40);
})()"""


def dropping(data: bytes, name: str) -> str:
    return DROP % (base64.b64encode(data).decode(), name)


@needs_server
def test_the_page_brings_everything_with_it(server):
    for path in ("/", "/docs"):
        answer = requests.get(server.url + path, timeout=9)
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert "http://" not in answer.text
        assert "https://" not in answer.text


@needs_server
@needs_browser
@pytest.mark.parametrize("width", [1280, 375])
def test_an_image_is_dropped_and_its_classes_are_shown(server, served, pixels, pictures, expected, tmp_path, width):
    def shown(number):
        best = served.best(expected[number])
        return [[one.label, f"{100 * one.probability:.1f} %"] for one in best]

    async def visit():
        async with browser_page(tmp_path / "profile") as page:
            await page.open(server.url + "/", width, 800)
            assert await page.run("document.querySelector('[role=status]').textContent") == "No image yet."
            # What a drop would open instead, were it not handled.
            assert await page.run(dropping(pictures[0], "zero.png")) is False
            await page.until(DONE)
            assert await page.run(SHOWN) == shown(0)
            assert (await page.run("document.getElementById('status').textContent")).startswith("zero.png: ")
            await page.until("!document.getElementById('why').hidden")
            assert await page.run("document.querySelector('figcaption').textContent.endsWith(' is')")
            assert await page.run(IS_RED)
            await page.run("document.getElementById('classes').hidden = true")
            (tmp_path / "one.png").write_bytes(pictures[1])
            await page.choose("#choose", tmp_path / "one.png")
            await page.until(DONE)
            assert await page.run(SHOWN) == shown(1)
            # Nothing is wider than the window, and the file field can be reached by the keyboard.
            assert await page.run("document.documentElement.scrollWidth") <= width
            await page.run("document.getElementById('choose').focus()")
            assert await page.run("document.activeElement.id") == "choose"
            assert page.complaints == []
            await page.run(dropping(b"<b>no image</b>", "<img src=x onerror=alert(1)>.txt"))
            await page.until(DONE)
            text = await page.run("document.getElementById('status').textContent")
            assert text.startswith("It can't be classified: image_bytes[0]: "), text

    asyncio.run(visit())
