"""How headless Chromium lays a page out, and in what colours."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason=f"none of {', '.join(NAMES)} is in PATH")

# Chromium's window is at least 500 pixels wide; a frame may have any width.
FRAME = '<!DOCTYPE html><pre id="measured"></pre><iframe style="width: {width}px; border: 0" srcdoc="{page}"></iframe>'
MEASURE = r"""<script>
document.querySelectorAll("details").forEach(element => element.open = true);
const root = document.documentElement;
const shown = element => element.getClientRects().length > 0;
const channels = colour => colour.match(/[\d.]+/g).map(Number);
function luminance(colour) {
  const linear = c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const [r, g, b] = channels(colour).map(c => linear(c / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function background(element) {
  for (; element; element = element.parentElement) {
    const colour = getComputedStyle(element).backgroundColor;
    if (channels(colour)[3] !== 0) return colour;
  }
  return "rgb(255, 255, 255)";
}
function contrast(element) {
  const style = getComputedStyle(element), text = element.closest("svg") ? style.fill : style.color;
  const [low, high] = [luminance(text), luminance(background(element))].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}
const broken = [], pale = [];
let words = 0;
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let node; node = walker.nextNode();) {
  const element = node.parentElement;
  if (!node.data.trim() || element.closest("script, style") || !shown(element)) continue;
  if (contrast(element) < 4.5) pale.push(node.data.trim());
  if (element.closest("svg")) continue;
  for (const word of node.data.matchAll(/[\p{L}\p{N}_.,%']+/gu)) {  // a line may end at a hyphen
    const range = document.createRange();
    range.setStart(node, word.index);
    range.setEnd(node, word.index + word[0].length);
    words += 1;
    if (new Set([...range.getClientRects()].map(box => Math.round(box.top))).size > 1) broken.push(word[0]);
  }
}
const wide = [...document.querySelectorAll("main, main *:not(.scroll)")].filter(element =>
  !element.closest("svg") && element.clientWidth && element.scrollWidth > element.clientWidth + 1);
const clipped = [], overlapping = [];
for (const plot of [...document.querySelectorAll("svg")].filter(shown)) {
  const frame = plot.getBoundingClientRect();
  const texts = [...plot.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect()]);
  texts.forEach(([text, a], index) => {
    if (a.left < frame.left - 1 || a.right > frame.right + 1 || a.top < frame.top - 1 || a.bottom > frame.bottom + 1)
      clipped.push(text);
    for (const [other, b] of texts.slice(index + 1))
      if (a.left < b.right && b.left < a.right && a.top + 3 < b.bottom && b.top + 3 < a.bottom)
        overlapping.push(`${text} / ${other}`);
  });
}
parent.document.getElementById("measured").textContent = JSON.stringify({
  width: root.clientWidth, scroll_width: root.scrollWidth, dark: luminance(background(document.body)) < 0.1,
  wide: wide.map(element => element.textContent.trim()),
  words, broken, pale, clipped, overlapping,
  plots: [...document.querySelectorAll("svg")].filter(shown).length,
});
</script></body>"""


def layout(page: str, folder: Path, width: int, *, dark: bool) -> dict[str, Any]:
    """Lay a page out in a frame ``width`` pixels wide, with every <details> open, and return what `MEASURE` found."""
    assert CHROMIUM is not None
    path = folder / "page.html"
    measuring = html.escape(page.replace("</body>", MEASURE))
    path.write_text(FRAME.format(width=width, page=measuring), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    options += [f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    done = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    (found,) = re.findall(r'<pre id="measured">(.*?)</pre>', done.stdout)
    measured: dict[str, Any] = json.loads(html.unescape(found))
    return measured


def assert_readable(page: str, folder: Path, width: int, *, dark: bool, plots: int) -> None:
    """Assert that nothing scrolls sideways or sticks out, no word is broken, no label collides, and text stands out."""
    found = layout(page, folder, width, dark=dark)
    words = found.pop("words")
    assert words > 100
    assert found == {
        "width": width,
        "scroll_width": width,
        "dark": dark,
        "wide": [],
        "broken": [],
        "pale": [],
        "clipped": [],
        "overlapping": [],
        "plots": plots,
    }
