"""Self-contained HTML page: figures, tables, plots and images in one file that needs no network.

    page = Page("Quickstart", "10,000 scenes, 2 epochs")
    page.section("Scores", "Mean cosine to the true prompt's vector.")
    page.facts({"Validation cosine": ("0.726", "95 % interval 0.721–0.731")})
    page.write("report.html")

All text is escaped (prompts are untrusted), and the page's content security policy forbids every external request and
every script but its own. Layout and style are in `page.html.j2`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, SupportsFloat, TypeAlias

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from core.files import write_bytes
from core.settings import leaves
from report import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pixels: TypeAlias = "np.ndarray | bytes"  # uint8 [H, W, 3], or an encoded JPEG, PNG or WebP
Cell: TypeAlias = "str | SupportsFloat | tuple[float, float, float] | None"
"""Cell of a table; a triple is a value with the ends of its interval."""
Line: TypeAlias = "str | tuple[str, str] | tuple[str, str, str]"
"""Line of a card: a text; a figure and a text; or a figure, its source and a text."""
SMALL = 160  # px: an image no larger than this is embedded without loss


@dataclass(frozen=True)
class Card:
    """Image of a gallery with its texts."""

    image: Pixels
    """Image as uint8 [H, W, 3], or an encoded JPEG, PNG or WebP."""
    title: str
    """Title, such as the prompt; also the alternative text for screen readers."""
    lines: Sequence[Line] = ()
    """Smaller lines below the title; figures and texts are in two columns."""
    score: float | None = None
    """Score, shown with three decimals."""
    more: tuple[str, Sequence[Line]] = ("", ())
    """Heading that expands at a click, and the lines under it."""
    values: Mapping[str, float | None] = field(default_factory=dict)
    """Values to sort and filter the gallery by; all cards of a gallery have the same names."""
    kinds: Sequence[str] = ()
    """Kinds that the card belongs to, by which the gallery can be filtered."""


class Page:
    """Builder of a page: each method adds a block to the latest section."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self._title, self._subtitle = title, subtitle
        self._sections: list[dict[str, Any]] = [{"id": "top", "heading": "", "lead": "", "blocks": []}]
        self._drawings = 0

    def section(self, heading: str, lead: str = "") -> None:
        """Begin a section; `lead` is one sentence on how to read it."""
        slug = re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-") or "section"
        same_slug = sum(re.fullmatch(re.escape(slug) + r"(-\d+)?", s["id"]) is not None for s in self._sections)
        anchor = f"{slug}-{same_slug + 1}" if same_slug else slug
        self._sections.append({"id": anchor, "heading": heading, "lead": lead, "blocks": []})

    def note(self, text: str) -> None:
        """Add a paragraph."""
        self._add("note", text=text)

    def facts(self, facts: Mapping[str, str | tuple[str, str]]) -> None:
        """Add key figures as tiles: name → value, or name → (value, explanation)."""
        tiles = [(name, *((value, "") if isinstance(value, str) else value)) for name, value in facts.items()]
        self._add("facts", tiles=tiles)

    def table(
        self,
        columns: Sequence[str],
        rows: Iterable[Sequence[Cell]],
        caption: str = "",
        formats: Mapping[str, str] | None = None,
    ) -> None:
        """Add a table that readers can sort by any column.

        Columns of numbers are right-aligned, None is a dash; a number with an interval sorts by the number. `formats`
        maps a column to its format (`".1f"`); by default integers get thousands separators, other numbers three
        decimals.

        Raises:
            ValueError: a row has another number of cells than there are columns.
        """
        rows = [list(row) for row in rows]
        for row in rows:
            if len(row) != len(columns):
                raise ValueError(f"a row has {len(row)} cells, the table has {len(columns)} columns: {row}")
        formats = formats or {}
        numeric = [all(_is_number(_value(r[i])) or r[i] is None for r in rows) for i in range(len(columns))]
        body = [[_cell(v, formats.get(c, "")) for c, v in zip(columns, r, strict=True)] for r in rows]
        heads = list(zip(columns, numeric, strict=True))
        self._add("table", heads=heads, rows=body, caption=caption)

    def settings(self, values: Mapping[str, Any]) -> None:
        """Add nested settings, one list per group, with values as in YAML or JSON."""
        plain = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
        groups = [("general", plain), *((key, value) for key, value in values.items() if isinstance(value, Mapping))]
        texts = [(name, [(key, _as_text(value)) for key, value in leaves(group)]) for name, group in groups if group]
        self._add("settings", groups=texts)

    def figure(self, figure: Figure, caption: str = "", alt: str = "") -> None:
        """Add a matplotlib figure (see `report.plots`) in two layouts, for wide and narrow screens.

        `alt` is the alternative text for screen readers; the default is the caption.
        """
        self._drawings += 1
        drawings = [
            (name, plots.svg(figure, width=width, prefix=f"{name}{self._drawings}-"))
            for name, width in (("wide", plots.WIDE), ("narrow", plots.NARROW))
        ]
        self._add("figure", drawings=drawings, caption=caption, alt=alt or caption)

    def words(self, counts: Mapping[str, int], max_words: int = 120) -> None:
        """Add a cloud of the `max_words` most frequent words; frequent words are larger, the first twelve coloured.

        The same counts give the same cloud. It is text, which wraps at any width.
        """
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:max_words]
        # sizes follow the roots of the counts, because readers compare areas
        low, high = (math.sqrt(ranked[k][1]) for k in (-1, 0)) if ranked else (0.0, 0.0)
        sized = [
            (
                word,
                count,
                round(13 + 29 * (math.sqrt(count) - low) / ((high - low) or 1)),
                "first" if rank < 12 else "rare" if rank > 50 else "",
            )
            for rank, (word, count) in enumerate(ranked)
        ]
        Random(0).shuffle(sized)
        self._add("words", words=sized)

    def lists(self, groups: Mapping[str, tuple[str, Sequence[str]]], opened: int = 0) -> None:
        """Add texts under headings that expand at a click: heading → (details, texts).

        The first `opened` headings are expanded.
        """
        entries = [(name, detail, list(texts), n < opened) for n, (name, (detail, texts)) in enumerate(groups.items())]
        self._add("lists", groups=entries)

    def matrix(self, values: ArrayLike, names: Sequence[str], reading: str, caption: str = "") -> None:
        """Add a square matrix as a heatmap beside the names of its rows and columns, which are the same.

        Pointing at a cell, touching it or moving to it with the arrow keys shows its row, column and value in the
        format `reading`, such as "predicted for {row}, prompt of {column}".

        Raises:
            ValueError: the matrix is not [n, n] for n names.
        """
        value_NN = np.asarray(values, dtype=float)
        if value_NN.shape != (len(names), len(names)):
            raise ValueError(f"a matrix of {len(names)} names is not {list(value_NN.shape)}")
        finite = value_NN[np.isfinite(value_NN)]
        ends = (_format(float(finite.min())), _format(float(finite.max()))) if finite.size else ("–", "–")
        cells = json.dumps([[_format(float(value)) for value in row] for row in value_NN])
        drawing = plots.heatmap(value_NN)
        self._add("matrix", drawing=drawing, names=names, cells=cells, ends=ends, reading=reading, caption=caption)

    def gallery(self, cards: Iterable[Card], caption: str = "", pixels: int = 512, compare: Sequence[str] = ()) -> None:
        """Add a grid of images with their texts; a click enlarges. Larger images shrink to `pixels` px per side.

        Readers can sort and filter cards with `values` by each value, by the difference of any two that `compare`
        names, by kind and by words of their texts.

        Raises:
            ValueError: the cards have different names of values, or `compare` names another.
        """
        cards = list(cards)
        measures = list(cards[0].values) if cards else []
        if any(list(card.values) != measures for card in cards) or (cards and not set(compare) <= set(measures)):
            raise ValueError(f"every card needs the values {[*measures, *compare]}")
        entries = [
            (card, *embed(card.image, pixels), _format(card.score) if card.score is not None else "") for card in cards
        ]
        kinds = list(dict.fromkeys(kind for card in cards for kind in card.kinds))
        controls = {"measures": measures, "compare": compare, "kinds": kinds} if measures else None
        self._add("gallery", cards=entries, caption=caption, dense=False, controls=controls)

    def contact_sheet(
        self, images: Iterable[Pixels], captions: Iterable[str], caption: str = "", pixels: int = 256
    ) -> None:
        """Add a dense gallery of many images with one caption each."""
        cards = (Card(image, text) for image, text in zip(images, captions, strict=True))
        entries = [(card, *embed(card.image, pixels), "") for card in cards]
        self._add("gallery", cards=entries, caption=caption, dense=True, controls=None)

    def html(self) -> str:
        """Render the page as HTML."""
        import jinja2

        loader = jinja2.FileSystemLoader(Path(__file__).parent)
        environment = jinja2.Environment(
            loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        sections = [s for s in self._sections if s["heading"] or s["blocks"]]
        template = environment.get_template("page.html.j2")
        return template.render(title=self._title, subtitle=self._subtitle, sections=sections, small=SMALL)

    def write(self, path: str | Path) -> Path:
        """Write the page atomically to `path`, and return its absolute path."""
        path = Path(path).absolute()
        write_bytes(path, self.html().encode())
        return path

    def _add(self, kind: str, **content: Any) -> None:
        self._sections[-1]["blocks"].append({"kind": kind, **content})


def embed(image: Pixels, pixels: int) -> tuple[str, int, int]:
    """Encode an image, at most `pixels` px per side, as a data URI in the smallest format; and its width and height.

    Raises:
        ValueError: the array is not uint8 [H, W, 3].
        OSError: the bytes are not an image.
    """
    candidates: list[tuple[str, bytes]] = []
    if isinstance(image, bytes):
        with Image.open(io.BytesIO(image)) as opened:
            pil_image, kind = opened.convert("RGB"), (opened.format or "").lower()
        if max(pil_image.size) <= pixels and kind in ("jpeg", "png", "webp"):
            candidates.append((kind, image))  # the encoding of the dataset, unless another one is smaller
    else:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"an image must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
        pil_image = Image.fromarray(image)
    pil_image.thumbnail((pixels, pixels), Image.Resampling.LANCZOS)
    if max(pil_image.size) <= SMALL:
        codings: list[tuple[str, dict[str, Any]]] = [("png", {"optimize": True}), ("webp", {"lossless": True})]
    else:
        codings = [("jpeg", {"quality": 88}), ("webp", {"quality": 86})]
    for kind, options in codings:
        out = io.BytesIO()
        pil_image.save(out, kind, **options)
        candidates.append((kind, out.getvalue()))
    kind, data = min(candidates, key=lambda c: len(c[1]))
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}", *pil_image.size


def _value(cell: Any) -> Any:
    """Value of a cell, without its interval."""
    return cell[0] if isinstance(cell, tuple) else cell


def _cell(cell: Any, form: str) -> tuple[str, str, str]:
    """Format a cell: its text, its smaller text, and its sort key."""
    detail = f"{_format(cell[1], form)} – {_format(cell[2], form)}" if isinstance(cell, tuple) else ""
    return _format(_value(cell), form), detail, _sort_key(_value(cell))


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _format(value: Any, form: str = "") -> str:
    if value is None or (_is_number(value) and math.isnan(value)):
        return "–"
    if not _is_number(value):
        return str(value)
    return format(value, form or ("," if isinstance(value, numbers.Integral) else ".3f")).replace("-", "−")


def _sort_key(value: Any) -> str:
    """Sort key of a value: a number in full precision, or the text itself."""
    if value is None or (_is_number(value) and math.isnan(value)):
        return ""
    return repr(float(value)) if _is_number(value) else str(value)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
