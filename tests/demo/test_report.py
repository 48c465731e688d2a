"""The report: one valid file, escaped, without links out of it, in colours that stand out."""

from __future__ import annotations

import re
import xml.etree.ElementTree
from html.parser import HTMLParser

import pytest
from browser import assert_readable, layout, needs_chromium
from records import chat, results

from poc_kernels.demo import report
from poc_kernels.demo.results import Callback, Check

VOID = {"meta"}
SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "<script>alert('x')</script>&\"<b>"
SIZES = ("wide", "narrow")


class Page(HTMLParser):
    """Checks that elements nest; keeps tags, attributes, and the text of the elements that a test asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: dict[str, list[str]] = {tag: [] for tag in ("th", "td", "p", "li", "h1", "h2", "span")}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag in self.texts:
            self.texts[tag].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        for tag in set(self.open) & set(self.texts):
            self.texts[tag][-1] += data

    def all(self, tag: str) -> list[str]:
        """The text of each element, with single spaces."""
        return [" ".join(text.split()) for text in self.texts[tag]]

    def values(self, name: str) -> list[str]:
        """The values of an attribute."""
        return [value for key, value in self.attributes if key == name and value is not None]


def plots(text: str) -> dict[tuple[str, str], xml.etree.ElementTree.Element]:
    """The SVG elements of a report, by plot and size."""
    elements = [xml.etree.ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    names = [(plot, size) for plot in ("timeline", "claims", "distances", "latency") for size in SIZES]
    assert [element.get("class") for element in elements] == [size for _, size in names]
    return dict(zip(names, elements, strict=True))


def marks(plot: xml.etree.ElementTree.Element, name: str) -> list[str]:
    """Every path and use in the groups of a class."""
    groups = [group for group in plot.iter(f"{SVG}g") if group.get("class") == name]
    return [
        mark.get("d") or mark.get("x", "")
        for group in groups
        for mark in group.iter()
        if mark.tag in (f"{SVG}path", f"{SVG}use") and mark.get("d") != ""
    ]


def across(path: str) -> list[float]:
    """The x coordinates of a path's points."""
    return [float(x) for x, _ in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path)]


@pytest.fixture(scope="module")
def text():
    return report.html(results())


def test_the_page_says_first_what_it_shows_then_three_figures_then_the_round(text):
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert [tag for tag in page.seen if re.fullmatch(r"h\d", tag)] == ["h1", *["h2"] * 8]
    assert page.all("h2")[:4] == ["The rounds", "Fingerprints", "Distances", "Latency of chats"]
    paragraphs = page.all("p")
    assert paragraphs[0].endswith("All 3 checks of the round passed.")
    assert paragraphs[1:10] == [
        "Proofs",
        "500 fingerprints per second",
        "while GENERATING. 250 per second, 50% of that rate, are kept while users are served.",
        "Random projections",
        "1.0% of the compute",
        "Memory for P: 0 bytes, and 8 for its seed. Stored, P would take 512.0 KiB.",
        "Users",
        "50.0 ms between tokens",
        "median while validating; 10.0 ms with users alone. 99th percentile: 50.0 and 10.0 ms.",
    ]


def test_tables_have_what_was_measured(text):
    page = Page(text)
    assert {"honest proofs are accepted", "3 batches"} <= set(page.all("span"))
    cells = page.all("td")
    claims = ["nothing", "0.150", "2 of 2", "honest", "memory", "1.100", "0 of 2", "fraud"]
    assert cells[:14] == [*claims, "3", "20.0", "20.0", "1", "100.0", "100.0"]
    assert cells.count("passed") == 3
    assert {"1.800", "90.00%", "tiny"} <= set(cells)


def test_legends_are_in_the_order_of_the_round(text):
    keys = Page(text).all("li")
    assert keys[:8] == [
        *("IDLE", "GENERATING", "VALIDATING", "STOPPED"),
        *("checked", "valid", "recomputed", "✕refused with 503"),
    ]
    assert "r_target 1.4010: 20.0% below it expected, 21.0% found" in keys


@pytest.mark.parametrize("size", SIZES)
def test_no_plot_is_empty_while_validating(text, size):
    drawn = plots(text)
    timeline = drawn["timeline", size]
    band = across(marks(timeline, "band-validating")[0])
    (recomputed,) = marks(timeline, "recomputed")
    points = [x for x in across(recomputed) if min(band) - 0.01 <= x <= max(band) + 0.01]
    # The line goes from where the phase begins to where it ends.
    assert len(points) >= 3
    assert (min(points), max(points)) == pytest.approx((min(band), max(band)), abs=0.01)
    served = [float(x) for x in marks(timeline, "served") if re.fullmatch(r"[\d.]+", x)]
    assert len(served) == 5
    assert sum(min(band) <= x <= max(band) for x in served) == 1
    assert marks(timeline, "checked")
    assert marks(timeline, "valid")
    assert marks(timeline, "refused")
    assert len(marks(drawn["distances", size], "survey")) == 8
    assert marks(drawn["distances", size], "theory")
    for what in ("first-token", "between-tokens"):
        for when in ("users-alone", "while-validating"):
            assert marks(drawn["latency", size], f"{what}-{when}")
    points = [x for x in marks(drawn["claims", size], "honest") if re.fullmatch(r"[\d.]+", x)]
    forged = [x for x in marks(drawn["claims", size], "cheat") if re.fullmatch(r"[\d.]+", x)]
    threshold = across(marks(drawn["claims", size], "threshold")[0])[0]
    assert len(points) == 2
    assert len(forged) == 1
    assert max(map(float, points)) < threshold < float(forged[0])


@pytest.mark.parametrize("size", SIZES)
def test_latencies_are_on_one_axis(text, size):
    plot = plots(text)["latency", size]
    labels = [element.text for element in plot.iter(f"{SVG}text")]
    assert labels.count("milliseconds") == 1
    assert {"time to the first token", "time between tokens"} <= set(labels)
    # 100 ms to the first token are as far right as they would be between tokens: both panels end there.
    ends = [max(across(marks(plot, f"{what}-while-validating")[0])) for what in ("first-token", "between-tokens")]
    assert ends[0] > ends[1]


def luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_stand_out_in_light_and_dark(text):
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", text, re.S)
    )
    assert light.keys() == dark.keys()
    for colours in (light, dark):
        for paper in (colours["paper"], colours["card"]):
            for name in ("ink", "dim", "good", "bad"):
                assert contrast(colours[name], paper) >= 4.5, name
        for name in ("idle", "generating", "validating", "stopped", "good", "bad"):
            assert contrast(colours[name], colours["paper"]) >= 3, name


def test_plots_are_drawn_in_the_pages_colours(text):
    known = set(re.findall(r"--(\w+): #", text))
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        assert not re.findall(r"#[0-9a-f]{6}\b", svg)
        assert set(re.findall(r"var\(--(\w+)\)", svg)) <= known
    described = Page(text).values("aria-label")
    assert len(described) == 4
    assert all(len(description) > 40 for description in described)


def test_nothing_links_out_of_the_file_and_ids_are_unique(text):
    page = Page(text)
    assert not {"script", "link", "img"} & set(page.seen)
    assert set(re.findall(r"https?://[^\s\"'<>]*", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "@import" not in text
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    targets = page.values("xlink:href") + re.findall(r"url\(([^)]*)\)", text)
    assert targets
    assert {target.removeprefix("#") for target in targets} <= set(ids)


def test_all_text_is_escaped():
    given = results(
        about={HOSTILE: HOSTILE},
        checks=[Check(HOSTILE, False, HOSTILE)],
        parts={HOSTILE: 1.0},
        callbacks=[Callback(1.0, HOSTILE, 200, False, HOSTILE, HOSTILE, (1,), True)],
    )
    page = Page(report.html(given))
    assert not {"script", "b"} & set(page.seen)
    assert page.all("td").count(HOSTILE) == 2
    assert page.all("th").count(HOSTILE) == 2
    assert page.all("span").count(HOSTILE) == 2


def test_failures_are_marked():
    page = Page(report.html(results(checks=[Check("a", True), Check("b", False)])))
    assert page.all("p")[0].endswith("1 of 2 checks of the round failed.")
    assert page.all("td").count("FAILED") == 1
    assert "passed." not in page.all("p")[0]


def test_callbacks_are_summed_up(text):
    page = Page(text)
    assert page.seen.count("details") == 1
    assert "open" not in dict(page.attributes)
    assert [line for line in page.all("p") if line.startswith("/")] == [
        "/generated: 1 delivered with 3 nonces, 1 refused and repeated; all signatures valid.",
        "/validated: 1 delivered with 2 nonces, 0 refused and repeated; all signatures valid.",
    ]


def test_verdicts_and_signatures_of_callbacks():
    frauds = (None, False, True)
    calls = [Callback(at, "/validated", 401, False, "hash", "key", (1, 2), fraud) for at, fraud in enumerate(frauds)]
    page = Page(report.html(results(callbacks=calls)))
    cells = page.all("td")
    first = cells.index("/validated") - 1
    rows = [cells[start : start + 6] for start in (first, first + 6, first + 12)]
    assert rows == [
        [f"{at}.00", "/validated", "401", "INVALID", "2", verdict] for at, verdict in enumerate(("", "honest", "fraud"))
    ]
    assert "/validated: 0 delivered with 0 nonces, 3 refused and repeated; 3 signatures INVALID." in page.all("p")


def test_a_long_callback_log_is_cut_in_the_middle():
    calls = [Callback(float(at), f"/call{at}", 200, True, "hash", "key", (), None) for at in range(100)]
    text = report.html(results(callbacks=calls))
    cells = Page(text).all("td")
    assert "60 in the middle are not shown." in text
    assert {"/call0", "/call19", "/call80", "/call99"} <= set(cells)
    assert not {"/call20", "/call79"} & set(cells)


def test_a_round_in_which_nothing_happened_has_a_report():
    lists = {name: [] for name in ("checks", "chats", "callbacks", "bands", "samples", "survey", "judged", "noise")}
    empty = results(**lists, parts={}, fingerprints=0, checked=0, valid=0)
    text = report.html(empty)
    page = Page(text)
    assert len(plots(text)) == 8
    assert page.all("td")[:3] == ["0", "-", "-"]
    assert "No callback arrived." in page.all("p")


def test_a_survey_far_from_theory_is_shown_whole():
    given = results(survey=[1.2, 1.21, 1.22], r_target=1.205, geometric=False)
    drawn = plots(report.html(given))
    for size in SIZES:
        plot = drawn["distances", size]
        (axes,) = [group for group in plot.iter(f"{SVG}g") if group.get("class") == "axes_1"]
        frame = across(next(axes.iter(f"{SVG}path")).get("d", ""))
        bars = [x for bar in marks(plot, "survey") for x in across(bar)]
        assert min(frame) <= min(bars) < max(bars) <= max(frame)


def test_the_same_results_give_the_same_file(text, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    report.write(path, results())
    assert path.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [path]


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 480])
def test_the_page_is_readable(text, tmp_path, width, dark):
    assert_readable(text, tmp_path, width, dark=dark, plots=4)


@needs_chromium
def test_large_numbers_are_readable_too(tmp_path):
    chats = [chat("IDLE", 0.0, 0.001), chat("VALIDATING", 5.0, 8.0)]
    given = results(chats=chats, generating_rate=123456.7, validating_rate=1234.5, stored_bytes=2**31 - 1)
    assert_readable(report.html(given), tmp_path, 480, dark=False, plots=4)


@needs_chromium
def test_words_that_are_too_long_for_any_line_do_not_widen_the_page(tmp_path):
    long = "x" * 300
    given = results(about={"model": long}, checks=[Check(long, False, long)])
    found = layout(report.html(given), tmp_path, 480, dark=False)
    assert found["scroll_width"] == 480
    assert set(found["broken"]) == {long}
