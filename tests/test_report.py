"""The shared HTML page: nothing from outside, everything escaped, same input same bytes, readable by all."""

import base64
import hashlib
import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from report import Card, Page, plots
from report.page import embed

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
    page.words({HOSTILE: 3, "b": 1})
    page.lists({HOSTILE: (HOSTILE, [HOSTILE, "b"])})
    page.section("Plots")
    page.gallery([Card(scene(64), HOSTILE, [HOSTILE, (HOSTILE, HOSTILE)], 0.7261)], caption=HOSTILE)
    page.contact_sheet([scene(300, i) for i in range(3)], [HOSTILE, "b", "c"])
    page.settings({HOSTILE: HOSTILE, "group": {"key": {"deep": [1, None, HOSTILE]}}})
    return page


@pytest.fixture(scope="module")
def html() -> str:
    return full_page().html()


def test_nothing_is_fetched(html: str) -> None:
    for _, attributes in Reader(html).tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
        assert not re.search(r"url\((?!#)", attributes.get("style") or "")
    style = "".join(re.findall(r"<style>.*?</style>", html, re.S))
    assert "url(" not in style
    assert "@import" not in style


def test_policy_allows_our_script_alone(html: str) -> None:
    scripts = re.findall(r"<script>(.*?)</script>", html, re.S)
    assert len(scripts) == 1
    policy = next(m["content"] for m in Reader(html).all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert policy is not None
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_text_is_escaped_and_whole(html: str) -> None:
    page = Reader(html)
    assert len(page.all("script")) == 1
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    # Title ×2, subtitle, tile ×3, navigation, heading, lead, note, table ×3, figure caption, axis label ×2 × 3,
    # title of curves ×2, word, list ×3, gallery ×5, sheet, settings ×2. The plots' wrapped names and the third setting,
    # in JSON, are not whole.
    assert page.text.count(HOSTILE) == 34
    assert all(image["alt"] for image in page.all("img")[:-1])  # the last is the viewer's, filled when it opens


def test_svg_is_well_formed_themed_and_alone(html: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", html, re.S)
    assert len(drawings) == 12  # six figures, for a desk and for a phone
    ids: list[str] = []
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        ids += [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
        assert "var(--accent)" in drawing
        assert "currentColor" in drawing
        assert "#0102" not in drawing
        assert "font-family" not in drawing
        assert root.findall(".//text")
    assert len(ids) == len(set(ids))
    for used in re.findall(r'(?:href="#|url\(#)([^")]+)', "".join(drawings)):
        assert used in ids


def test_same_input_same_bytes(html: str) -> None:
    assert full_page().html() == html


def test_plots_leave_matplotlib_as_it_was() -> None:
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


def test_the_names_beside_curves_do_not_touch() -> None:
    same = {f"set {i}": [(0, 0.5), (1, 0.7)] for i in range(10)} | {"low": [(0, 0.1), (1, 0.2)]}
    figure = plots.curves(same, "cosine")
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[0]
    labels = [label for child in axes.child_axes for label in child.get_yticklabels()]
    boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.y0)
    assert len(boxes) == 11
    assert all(below.y1 <= above.y0 + 1 for below, above in pairwise(boxes))
    assert boxes[-1].y0 <= axes.get_window_extent().y1


def test_the_rate_is_what_was_done_in_the_time() -> None:
    """A shard of 60 in 30 s beside one of 30 in 60 s: 2.5 a second, then .5."""
    axes = plots.rate([0, 0], [30, 60], [60, 30], label="x").axes[0]
    edges, values = axes.patches[0].get_data().edges, axes.patches[0].get_data().values  # pyright: ignore
    assert np.allclose(values[edges[1:] <= 0.5], 2.5)
    assert np.allclose(values[edges[:-1] >= 0.5], 0.5)
    assert edges[-1] == 1  # minutes


def test_bars_of_whole_numbers_begin_at_whole_numbers() -> None:
    bars = plots.histogram([2, 2, 3, 7], "x").axes[0].patches
    assert [round(bar.get_height()) for bar in bars] == [2, 1, 0, 0, 0, 1]  # pyright: ignore
    assert bars[0].get_x() == 1.5  # pyright: ignore


def test_words_by_count_then_alphabet() -> None:
    page = Page("t")
    page.words({"b": 4, "a": 4, "c": 100, "left": 1}, most=3)
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


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))


def test_small_pictures_keep_their_pixels() -> None:
    picture = scene(112)
    uri, width, height = embed(picture, 256)
    assert (width, height) == (112, 112)
    assert np.array_equal(np.asarray(decoded(uri).convert("RGB")), picture)


def test_large_pictures_shrink() -> None:
    wide = np.repeat(np.arange(200, dtype=np.uint8)[:, None, None], 800, 1).repeat(3, 2)
    uri, width, height = embed(wide, 256)
    assert (width, height) == decoded(uri).size == (256, 64)
    assert abs(int(np.asarray(decoded(uri).convert("L"))[32, 128]) - 100) <= 4


def test_encoded_pictures_pass_as_they_are_when_that_is_smallest() -> None:
    out = io.BytesIO()
    Image.fromarray(scene(112)).save(out, "jpeg", quality=40)
    assert base64.b64decode(embed(out.getvalue(), 256)[0].split(",")[1]) == out.getvalue()


def test_unusable_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\], got float64 \[3, 8, 8\]"):
        embed(np.zeros((3, 8, 8)), 256)
    with pytest.raises(OSError, match="cannot identify"):
        embed(b"no picture", 256)


def test_write_is_whole_or_not_at_all(tmp_path: Path, html: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_contrast(html: str, theme: int, text: str, behind: str) -> None:
    colours = {m[1]: (m[2], m[3]) for m in re.finditer(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\)", html)}
    low, high = sorted(luminance(colours[name][theme]) for name in (text, behind))
    assert (high + 0.05) / (low + 0.05) >= 4.5  # WCAG 2 AA
