"""The shared HTML page: no external requests, escaped text, deterministic bytes, accessible to all readers.

What a browser does with it is tried in headless Chromium, where there is one.
"""

import base64
import hashlib
import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from report import Card, Page, plots
from report.page import embed

if TYPE_CHECKING:
    from tests.browser import Opened

pytest_plugins = ["tests.browser"]

HOSTILE = """<script>alert("x")</script> & 'one' "two" </style> $a$ <img src=http://e.x/a>"""


class Reader(HTMLParser):
    """Tags with their attributes, and all text outside scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self._open):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def scene(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)


def full_page() -> Page:
    page = Page(HOSTILE, HOSTILE)
    page.facts({HOSTILE: (HOSTILE, HOSTILE), "Images": "10,000"})
    page.section(HOSTILE, HOSTILE)
    page.note(HOSTILE)
    page.table(["name", "value", HOSTILE], [[HOSTILE, 0.5, None], ["b", -1234, "x"]], caption=HOSTILE)
    page.section("Plots")
    page.figure(plots.intervals([HOSTILE, "b"], [0.5, 0.7], [0.4, 0.6], [0.6, 0.8], highlight="b"), HOSTILE)
    page.figure(plots.learning_curve([1, 2, 3], [3, 2, 1], [2, 3], [0.5, 0.6], seconds=[10, 60, 200]), alt=HOSTILE)
    page.figure(plots.histogram(np.linspace(0, 1, 99), HOSTILE), "c")
    page.figure(plots.bars([HOSTILE, "b"], [3, 2], [4, 4], label=HOSTILE), "c")
    page.figure(plots.curves({HOSTILE: [(1, 0.5), (2, 0.6)], "b": [(1, 0.4)]}, HOSTILE), "c")
    page.figure(plots.rate([0, 9], [10, 20], [5, 5], label=HOSTILE, resumed=[9]), "c")
    series = {"b": ([1, 2], [0.4, 0.5], [0.3, 0.4], [0.5, 0.6]), "c": ([1], [0.4], [0.3], [0.5])}
    page.figure(plots.trend(series, ([1, 2], [0.3, 0.6]), HOSTILE, "cosine"), "c")
    page.matrix([[0.9, -0.1], [0.2, 0.8]], [HOSTILE, "b"], HOSTILE, HOSTILE)
    page.words({HOSTILE: 3, "b": 1})
    page.lists({HOSTILE: (HOSTILE, [HOSTILE, "b"])})
    page.section("Plots")
    page.gallery([Card(scene(64), HOSTILE, [HOSTILE, (HOSTILE, HOSTILE)], 0.7261)], caption=HOSTILE)
    page.contact_sheet([scene(300, i) for i in range(3)], [HOSTILE, "b", "c"])
    line = ("0.5", HOSTILE, HOSTILE)
    page.gallery([Card(scene(64), "b", [line], more=(HOSTILE, [line]), values={HOSTILE: 1.0}, kinds=[HOSTILE])])
    page.settings({HOSTILE: HOSTILE, "group": {"key": {"deep": [1, None, HOSTILE]}}})
    return page


@pytest.fixture(scope="module")
def html() -> str:
    return full_page().html()


@pytest.mark.slow
def test_page_makes_no_requests(html: str) -> None:
    for _, attributes in Reader(html).tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
        assert not re.search(r"url\((?!#)", attributes.get("style") or "")
    style = "".join(re.findall(r"<style>.*?</style>", html, re.S))
    assert "url(" not in style
    assert "@import" not in style


@pytest.mark.slow
def test_policy_allows_only_own_script(html: str) -> None:
    scripts = re.findall(r"<script>(.*?)</script>", html, re.S)
    assert len(scripts) == 1
    policy = next(m["content"] for m in Reader(html).all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert policy is not None
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_text_is_escaped_and_complete(html: str) -> None:
    page = Reader(html)
    assert len(page.all("script")) == 1
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    # Title ×2, subtitle, tile ×3, navigation, heading, lead, note, table ×3, figure caption, axis label ×2 × 4,
    # title of curves ×2, matrix ×2, word, list ×3, gallery ×5, sheet, sorted gallery ×7, settings ×2. The plots'
    # wrapped names and the third setting, in JSON, are not whole.
    assert page.text.count(HOSTILE) == 45
    assert all(image["alt"] for image in page.all("img")[:-1])  # the last is the viewer's, filled when it opens


def test_svg_is_well_formed_themed_and_self_contained(html: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", html, re.S)
    assert len(drawings) == 15  # seven figures, for a desk and for a phone, and a matrix
    ids: list[str] = []
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        ids += [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
        assert "var(--accent)" in drawing
        assert "currentColor" in drawing or "var(--muted)" in drawing
        assert "#0102" not in drawing
        assert "font-family" not in drawing
        assert root.findall(".//text") or root.findall('.//rect[@class="at"]')
    assert len(ids) == len(set(ids))
    for used in re.findall(r'(?:href="#|url\(#)([^")]+)', "".join(drawings)):
        assert used in ids


@pytest.mark.slow
def test_page_is_deterministic(html: str) -> None:
    assert full_page().html() == html


def test_plots_do_not_change_matplotlib_settings() -> None:
    before = dict(matplotlib.rcParams)
    figure = plots.histogram([1.0, 2.0], "x")
    size = tuple(figure.get_size_inches())
    plots.svg(figure, width=300)
    assert dict(matplotlib.rcParams) == before
    assert tuple(figure.get_size_inches()) == size
    code = "import sys, report; assert not any(m.startswith('matplotlib') for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plot_values_survive_the_shortening_of_coordinates() -> None:
    drawing = plots.svg(plots.intervals(["a", "b"], [0.7264, 0.4791], [0.7, 0.4], [0.8, 0.5]))
    assert ">0.726<" in drawing
    assert drawing.index(">0.479<") < drawing.index(">0.726<")  # drawn from the bottom: the best is on top


def test_differences_have_signs_and_a_line_at_zero() -> None:
    figure = plots.intervals(["a", "b"], [0.1, -0.2], [0.05, -0.3], [0.15, 0.1], highlight=["a"], zero=True)
    assert ">+0.100<" in plots.svg(figure)
    assert ">−0.200<" in plots.svg(figure)
    zero, *rows = figure.axes[0].lines
    assert np.ptp(zero.get_xdata()) == 0  # pyright: ignore
    assert [line.get_color() for line in rows] == [plots.MUTED] * 2 + [plots.ACCENT] * 2  # from the bottom


def test_a_heatmap_shades_from_the_lowest_to_the_highest_and_frames_the_diagonal() -> None:
    root = ElementTree.fromstring(plots.heatmap([[-1, 1, np.nan], [0, 0.5, 1]], cell=10))
    squares, frames = root.findall("g")
    assert [float(s.attrib["fill-opacity"]) for s in squares] == [0, 1, 0, 0.5, 0.75, 1]
    assert [s.attrib["d"].split("h")[0] for s in squares][:4] == ["M0 0", "M10 0", "M20 0", "M0 10"]
    assert [f.attrib["d"].split("h")[0] for f in frames] == ["M0.5 0.5", "M10.5 10.5"]


@pytest.mark.slow
@pytest.mark.parametrize("values", [[], [0.5], [0.5, 0.5, float("nan")]])
def test_plots_of_little_data(values: list[float]) -> None:
    plots.svg(plots.histogram(values, "x"))
    steps = list(range(len(values)))
    plots.svg(plots.learning_curve(steps, values, steps, values, seconds=[10.0 * s for s in steps]))
    plots.svg(plots.intervals(["n"] * len(values), values, values, values))
    plots.svg(plots.histogram(np.rint(values), "x", limit=(77, "the most")))
    plots.svg(plots.bars(["n"] * len(values), np.nan_to_num(values)))
    plots.svg(plots.curves({"a": list(zip(steps, values, strict=True)), "b": []}, "label", zero=True))
    plots.svg(plots.rate(steps, np.add(steps, 1), steps, label="x"))
    plots.svg(plots.trend({"a": (steps, values, values, values)}, (steps, values), "x", "y"))
    ElementTree.fromstring(plots.heatmap(np.array(values)[:, None]))


def test_labels_of_curves_do_not_overlap() -> None:
    same = {f"set {i}": [(0, 0.5), (1, 0.7)] for i in range(10)} | {"low": [(0, 0.1), (1, 0.2)]}
    figure = plots.curves(same, "cosine")
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[0]
    labels = [label for child in axes.child_axes for label in child.get_yticklabels()]
    boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.y0)
    assert len(boxes) == 11
    assert all(below.y1 <= above.y0 + 1 for below, above in pairwise(boxes))
    assert boxes[-1].y0 <= axes.get_window_extent().y1


def test_rate_matches_counts() -> None:
    """A shard of 60 in 30 s beside one of 30 in 60 s: 2.5 a second, then .5."""
    axes = plots.rate([0, 0], [30, 60], [60, 30], label="x").axes[0]
    edges, values = axes.patches[0].get_data().edges, axes.patches[0].get_data().values  # pyright: ignore
    assert np.allclose(values[edges[1:] <= 0.5], 2.5)
    assert np.allclose(values[edges[:-1] >= 0.5], 0.5)
    assert edges[-1] == 1  # minutes


def test_histogram_bins_of_integers() -> None:
    bars = plots.histogram([2, 2, 3, 7], "x").axes[0].patches
    assert [round(bar.get_height()) for bar in bars] == [2, 1, 0, 0, 0, 1]  # pyright: ignore
    assert bars[0].get_x() == 1.5  # pyright: ignore


def test_words_by_count_then_alphabet() -> None:
    page = Page("t")
    page.words({"b": 4, "a": 4, "c": 100, "left": 1}, max_words=3)
    sizes = dict(re.findall(r'<li class="first" style="font-size: (\d+)px" title="\d+">(\w+)</li>', page.html()))
    assert sizes == {"13": "b", "42": "c"} or sizes == {"13": "a", "42": "c"}
    assert "left" not in page.html().partition("<body>")[2]


def test_tables_sort_by_full_numbers(html: str) -> None:
    page = Page("t")
    page.table(["name", "score", "n"], [["a", 0.12345, 12345], ["b", None, 2], ["c", np.float32(0.5), np.int64(-3)]])
    cells = Reader(page.html()).all("td")
    assert [c["data-sort"] for c in cells] == ["0.12345", "12345.0", "", "2.0", "0.5", "-3.0"]
    assert all(c["class"] == "number" for c in cells)
    assert [c.get("class") for c in Reader(page.html()).all("th")][:3] == [None, "number", "number"]
    text = Reader(page.html()).text
    assert all(shown in text for shown in ("0.123", "12,345", "–", "0.500", "−3"))
    assert {a["id"] for a in Reader(html).all("section") if "id" in a} >= {"plots", "plots-2"}
    with pytest.raises(ValueError, match="a row has 1 cells, the table has 2 columns"):
        page.table(["a", "b"], [["only"]])


def test_a_number_with_its_interval_sorts_by_the_number() -> None:
    page = Page("t")
    page.table(["name", "score"], [["a", (0.5, 0.4, 0.625)], ["b", None]], formats={"score": ".2f"})
    assert [(c["data-sort"], c["class"]) for c in Reader(page.html()).all("td")] == [("0.5", "number"), ("", "number")]
    assert '>0.50<span class="detail">0.40 – 0.62</span>' in page.html()


def test_inconsistent_cards_and_matrices_are_refused() -> None:
    page = Page("t")
    cards = [Card(scene(8), "a", values={"x": 1.0}), Card(scene(8), "b", values={"y": 1.0})]
    with pytest.raises(ValueError, match=r"every card needs the values \['x'\]"):
        page.gallery(cards)
    with pytest.raises(ValueError, match=r"every card needs the values \['x', 'z'\]"):
        page.gallery(cards[:1], compare=["z"])
    with pytest.raises(ValueError, match=r"a matrix of 3 names is not \[2, 2\]"):
        page.matrix(np.eye(2), ["a", "b", "c"], "")


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))


def test_small_images_keep_their_pixels() -> None:
    image = scene(112)
    uri, width, height = embed(image, 256)
    assert (width, height) == (112, 112)
    assert np.array_equal(np.asarray(decoded(uri).convert("RGB")), image)


def test_large_images_shrink() -> None:
    wide = np.repeat(np.arange(200, dtype=np.uint8)[:, None, None], 800, 1).repeat(3, 2)
    uri, width, height = embed(wide, 256)
    assert (width, height) == decoded(uri).size == (256, 64)
    assert abs(int(np.asarray(decoded(uri).convert("L"))[32, 128]) - 100) <= 4


def test_encoded_images_are_kept_if_smallest() -> None:
    out = io.BytesIO()
    Image.fromarray(scene(112)).save(out, "jpeg", quality=40)
    assert base64.b64decode(embed(out.getvalue(), 256)[0].split(",")[1]) == out.getvalue()


def test_unusable_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\], got float64 \[3, 8, 8\]"):
        embed(np.zeros((3, 8, 8)), 256)
    with pytest.raises(OSError, match="cannot identify"):
        embed(b"no image", 256)


@pytest.mark.slow
def test_write_is_atomic(tmp_path: Path, html: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = full_page().write(tmp_path / "deep" / "page.html")
    assert path.is_absolute()
    assert path.read_text(encoding="utf-8") == html
    broken = Page("t")
    monkeypatch.setattr(broken, "html", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        broken.write(path)
    assert path.read_text(encoding="utf-8") == html
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("text", ["ink", "muted", "accent", "second"])
@pytest.mark.parametrize("behind", ["ground", "surface"])
def test_colours_have_sufficient_contrast(html: str, theme: int, text: str, behind: str) -> None:
    colours = {m[1]: (m[2], m[3]) for m in re.finditer(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\)", html)}
    low, high = sorted(luminance(colours[name][theme]) for name in (text, behind))
    assert (high + 0.05) / (low + 0.05) >= 4.5  # WCAG 2 AA


ODD = 'a "b" <c>'


@pytest.fixture
def sorted_page(tmp_path: Path) -> Path:
    """Four cards: scores of two systems, of which one did not see the third image, and a count."""
    page = Page("t")
    scores = {"w": (0.5, 0.9, 3), "x": (0.7, 0.1, 20), "y": (0.25, None, 100), "z": (-0.1, 0.2, 7)}
    cards = [
        Card(
            scene(8, i),
            title,
            [("0.1", "knn", f"says {title}{title}")],
            own,
            values={ODD: own, "knn": other, "words": count},
            kinds=["even"] if i % 2 == 0 else ["odd", "any"],
        )
        for i, (title, (own, other, count)) in enumerate(scores.items())
    ]
    page.gallery(cards, compare=[ODD, "knn"])
    page.matrix([[0.9, -0.125], [0.2, 0.8]], ["first", "second"], "from {row} to {column}")
    return page.write(tmp_path / "page.html")


@pytest.mark.slow
def test_the_gallery_sorts_and_filters(sorted_page: Path, opened: "Opened") -> None:
    page = opened(sorted_page)
    by, minus, order = (page.locator(f".{name}") for name in ("by", "minus", "order"))

    def shown() -> str:
        return "".join(page.locator(".gallery figure:visible .title").all_inner_texts())

    def scores() -> list[str]:
        return page.locator(".gallery figure:visible .score").all_inner_texts()

    assert shown() == "xwyz"
    assert scores() == [f"0.700 {ODD}", f"0.500 {ODD}", f"0.250 {ODD}", f"−0.100 {ODD}"]
    order.click()
    assert (shown(), order.inner_text()) == ("zywx", "Lowest first")
    by.select_option("words")
    assert (shown(), scores()[0]) == ("wzxy", "3 words")
    assert minus.is_disabled()
    by.select_option("knn")
    assert shown() == "xzwy"  # what has no value stays last
    order.click()
    assert shown() == "wzxy"
    minus.select_option(ODD)
    assert shown() == "wzxy"
    assert scores() == [f"{gap} knn − {ODD}" for gap in ("+0.400", "+0.300", "−0.600", "–")]
    page.locator(".from").fill("-0.7")
    page.locator(".to").fill("0.3")
    assert (shown(), page.locator(".count").inner_text()) == ("zx", "2 of 4 images")
    page.locator(".all").click()
    page.locator(".kind").select_option("odd")
    assert shown() == "zx"
    page.locator(".search").fill("XX says")
    assert shown() == "x"
    page.locator(".all").click()
    assert shown() == "wzxy"
    assert not opened.errors


@pytest.mark.slow
def test_the_gallery_is_usable_by_keyboard(sorted_page: Path, opened: "Opened") -> None:
    """Tab from control to control; the viewer goes through what is shown, in the order shown."""
    page = opened(sorted_page, width=390)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.locator(".by").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Tab")  # minus is off: words are not compared
    page.keyboard.press("Enter")
    assert "".join(page.locator(".gallery .title").all_inner_texts()) == "wzxy"
    page.locator(".to").fill("20")
    page.locator(".zoom").first.focus()
    page.keyboard.press("Enter")
    titles = []
    for _ in range(4):
        titles.append(page.locator("dialog .title").inner_text())
        page.keyboard.press("ArrowRight")
    assert titles == ["w", "z", "x", "x"]
    page.keyboard.press("Escape")
    # the event of closing comes a little later; a locator waits for it, where the page forbids to evaluate a string
    page.locator("figure:focus-within .title", has_text="x").wait_for()
    assert not opened.errors


@pytest.mark.slow
def test_matrix_shows_cell_values(sorted_page: Path, opened: "Opened") -> None:
    page = opened(sorted_page)
    reading, svg = page.locator(".reading"), page.locator(".grid svg")
    box = svg.bounding_box()
    assert box is not None
    svg.hover(position={"x": 0.75 * box["width"], "y": 0.25 * box["height"]})
    assert reading.inner_text() == "−0.125 from 1 “first” to 2 “second”"
    page.locator(".grid").focus()
    page.keyboard.press("ArrowDown")
    assert reading.inner_text() == "0.800 from 2 “second” to 2 “second”"
    page.keyboard.press("ArrowRight")  # there is no third
    page.keyboard.press("ArrowLeft")
    assert reading.inner_text() == "0.200 from 2 “second” to 1 “first”"
    assert page.locator(".names .at-row").inner_text() == "second"
    assert not opened.errors
