"""The report: one valid file, escaped, without links out of it."""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree
from html.parser import HTMLParser

import pytest
from records import results

from poc_kernels.demo import report
from poc_kernels.demo.results import Callback, Check

VOID = {"meta", "img"}
NAMESPACES = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
HOSTILE = "<script>alert('x')</script>&\"<b>"


class Page(HTMLParser):
    """Checks that elements nest; keeps attributes, images and the text of table cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data

    def images(self) -> list[str]:
        """The SVG of each image."""
        prefix = "data:image/svg+xml;base64,"
        sources = [value for name, value in self.attributes if name == "src" and value is not None]
        assert all(source.startswith(prefix) for source in sources)
        return [base64.b64decode(source.removeprefix(prefix), validate=True).decode() for source in sources]


@pytest.fixture(scope="module")
def text():
    return report.html(results())


def test_elements_nest_and_the_tables_are_there(text):
    page = Page(text)
    assert page.open == []
    assert text.startswith("<!DOCTYPE html>")
    assert page.seen.count("table") == 5
    assert "All 1 checks passed." in text
    assert {"500.0 per second", "honest proofs are accepted", "3 batches", "/generated", "90.00 %"} <= set(page.cells)


def test_three_figures_are_drawn_for_light_and_dark(text):
    images = Page(text).images()
    assert len(images) == 3
    for svg, label in zip(images, ("distance to the target", "nonces checked", "time between tokens"), strict=True):
        assert xml.etree.ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
        assert label in svg
        assert "currentColor" in svg
        assert "prefers-color-scheme" in svg


def test_nothing_links_out_of_the_file(text):
    page = Page(text)
    assert "script" not in page.seen
    assert "link" not in page.seen
    assert not re.search(r"https?:|url\(|@import|src=\"//", text)
    for svg in page.images():
        assert set(re.findall(r"https?://[^\s\"'<>]*", svg)) <= NAMESPACES
        assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', svg))
        assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", svg))


def test_all_text_is_escaped():
    given = results(
        about={HOSTILE: HOSTILE},
        checks=[Check(HOSTILE, False, HOSTILE)],
        callbacks=[Callback(1.0, HOSTILE, 200, False, HOSTILE, HOSTILE, (1,), True)],
    )
    page = Page(report.html(given))
    assert "script" not in page.seen
    assert "b" not in page.seen
    assert page.cells.count(HOSTILE) == 7


def test_failures_are_marked():
    text = report.html(results(checks=[Check("a", True), Check("b", False)]))
    assert "1 of\n2 checks failed." in text
    assert Page(text).cells.count("FAILED") == 1


@pytest.mark.parametrize("fraud", [None, False, True])
def test_verdicts_and_signatures_of_callbacks(fraud):
    calls = [Callback(1.0, "/validated", 401, False, "hash", "key", (1, 2), fraud)]
    cells = Page(report.html(results(callbacks=calls))).cells
    row = cells[cells.index("/validated") - 1 :][:8]
    assert row == [
        "1.00",
        "/validated",
        "401",
        "INVALID",
        "2",
        "key",
        "hash",
        {None: "", False: "honest", True: "fraud"}[fraud],
    ]


def test_a_long_callback_log_is_cut_in_the_middle():
    calls = [Callback(float(at), f"/call{at}", 200, True, "hash", "key", (), None) for at in range(100)]
    text = report.html(results(callbacks=calls))
    cells = Page(text).cells
    assert "60 callbacks in the middle are not shown." in text
    assert {"/call0", "/call19", "/call80", "/call99"} <= set(cells)
    assert not {"/call20", "/call79"} & set(cells)


def test_a_round_in_which_nothing_happened_has_a_report():
    empty = results(checks=[], chats=[], callbacks=[], bands=[], samples=[], survey=[], parts={})
    page = Page(report.html(empty))
    assert page.open == []
    assert len(page.images()) == 3


def test_the_same_results_give_the_same_file(text, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    report.write(path, results())
    assert path.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [path]
