"""Plots in one style: arrays → matplotlib `Figure` → SVG inside the page.

    page.figure(plots.histogram(values, "cosine"), caption="…")

A figure is drawn in placeholder colours, which `svg` replaces by the page's CSS variables, so that one drawing works in
light and dark mode. One unit of a figure is one CSS pixel. Text remains text, in the page's font. This module does not
use pyplot or change matplotlib's settings, and the same input gives the same bytes. It imports matplotlib when needed.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, NARROW = 936, 358  # px: width of the page's text column on a desktop and on a phone

# placeholder colours that no figure uses otherwise, with their replacements
INK, MUTED, RULE, ACCENT, SECOND = "#010203", "#010204", "#010205", "#010206", "#010207"
_CSS = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    ACCENT: "var(--accent)",
    SECOND: "var(--second)",
}
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "im2emb",
    "text.parse_math": False,  # a name may hold dollar signs
    "font.family": ["DejaVu Sans"],  # measures the layout only; wider than any system font, so nothing collides
    "font.size": 12,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 12,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 1,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 11.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 6,
    "ytick.major.pad": 8,
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
}
_DASHED: dict[str, Any] = {"linewidth": 1.5, "linestyle": (0, (3, 2))}


def intervals(
    names: Sequence[str],
    means: ArrayLike,
    lows: ArrayLike,
    highs: ArrayLike,
    *,
    label: str = "",
    highlight: str | Collection[str] | None = None,
    zero: bool = False,
) -> Figure:
    """Plot means with their intervals as dots and whiskers, highest on top, with values at the right.

    `means`, `lows` and `highs` are [n], in the order of `names`; `label` is the label of the axis; rows named in
    `highlight` have the accent colour, None means all. `zero` is for differences: it adds a line at zero and signs.
    """
    highlighted = {highlight} if isinstance(highlight, str) else names if highlight is None else highlight
    mean_N, low_N, high_N = (np.asarray(values, dtype=float) for values in (means, lows, highs))
    order: list[int] = np.argsort(mean_N, kind="stable").tolist()
    rows = np.arange(len(order))
    labels = ["\n".join(textwrap.wrap(names[i], 22)) for i in order]  # narrow, to leave room for the plot on a phone
    with _axes((34 if any("\n" in label for label in labels) else 28) * len(order) + 52) as (figure, axes):
        if zero:
            axes.axvline(0, color=INK, **_DASHED)
        for row, i in zip(rows, order, strict=True):
            colour = ACCENT if names[i] in highlighted else MUTED
            axes.plot([low_N[i], high_N[i]], [row, row], color=colour, linewidth=3, alpha=0.45)
            axes.plot(mean_N[i], row, "o", color=colour, markersize=8, markeredgewidth=0)
        axes.margins(x=0.06)
        form = "+.3f" if zero else ".3f"
        _name_rows(axes, rows, labels, [format(mean_N[i], form).replace("-", "−") for i in order])
        axes.set_xlabel(label)
    return figure


def learning_curve(
    steps: ArrayLike,
    train_loss: ArrayLike,
    val_steps: ArrayLike,
    val_cosine: ArrayLike,
    *,
    val_low: ArrayLike | None = None,
    val_high: ArrayLike | None = None,
    seconds: ArrayLike | None = None,
) -> Figure:
    """Plot validation cosine above training loss, by step.

    `train_loss` is [n] at `steps` [n]; the `val_*` are [m] at `val_steps` [m], and `val_low` with `val_high` shade the
    interval. `seconds` [n] is the wall time at `steps`, for a second scale along the top.
    """
    step_N, loss_N = np.asarray(steps, dtype=float), np.asarray(train_loss, dtype=float)
    val_step_M, cosine_M = np.asarray(val_steps, dtype=float), np.asarray(val_cosine, dtype=float)
    with _axes(440, rows=2) as (figure, (above, below)):
        above.set_title("Validation cosine")
        if val_low is not None and val_high is not None:
            above.fill_between(val_step_M, val_low, val_high, color=ACCENT, alpha=0.18, linewidth=0)
        above.plot(val_step_M, cosine_M, "o-", color=ACCENT, markersize=5, markeredgewidth=0)
        if len(cosine_M):
            above.annotate(
                f"{cosine_M[-1]:.3f}",
                (val_step_M[-1], cosine_M[-1]),
                xytext=(0, 9),
                textcoords="offset points",
                ha="right",
                color=INK,
                weight="bold",
            )
        above.margins(y=0.18)
        below.set_title("Training loss")
        smooth_N = _running_mean(loss_N, max(1, len(loss_N) // 25))
        if len(loss_N) > 50:  # a long log is noise around a trend: show both
            below.plot(step_N, loss_N, color=SECOND, linewidth=1, alpha=0.35)
        else:
            smooth_N = loss_N
        below.plot(step_N, smooth_N, color=SECOND)
        below.set_xlabel("Step")
        for axes in (above, below):
            _few_ticks(axes)
        if seconds is not None and len(step_N) > 1:
            ticks, labels = _time_ticks(np.asarray(seconds, dtype=float), step_N)
            clock = above.secondary_xaxis("top")
            clock.set_xticks(ticks, labels)
            clock.spines["top"].set_visible(False)
    return figure


def curves(series: Mapping[str, Sequence[tuple[float, float]]], title: str, *, zero: bool = False) -> Figure:
    """Plot lines by step, each with its name and last value at the right.

    Args:
        series: name → (step, value) pairs, in order.
        title: title of the plot: the quantity.
        zero: for rates: begin the scale at 0, and show the mean at the right.
    """
    arrays = {name: np.asarray(pairs, dtype=float).T for name, pairs in series.items() if pairs}
    dashes = (("—", "-"), ("--", (0, (4, 2))), ("··", (0, (1, 1.5))))
    styles = [(colour, *dash) for dash in dashes for colour in (ACCENT, SECOND, INK, MUTED)]
    styles = [styles[i % len(styles)] for i in range(len(arrays))]
    with _axes(max(220, 20 * len(arrays) + 90)) as (figure, axes):
        axes.set_title(title)
        for (colour, _, dash), (step_N, value_N) in zip(styles, arrays.values(), strict=True):
            if len(value_N) > 50:  # a long log is noise around a trend: show both
                axes.plot(step_N, value_N, color=colour, linewidth=1, alpha=0.35)
                axes.plot(step_N, _running_mean(value_N, len(value_N) // 25), color=colour, linestyle=dash)
            else:
                axes.plot(step_N, value_N, "o", color=colour, linestyle=dash, markersize=4, markeredgewidth=0)
        axes.margins(y=0.12)
        if zero:
            axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.set_xlabel("Step")
        _few_ticks(axes)
        value_S = np.array([np.nanmean(v) if zero else v[-1] for _, v in arrays.values()])
        labels = [
            f"{mark} {_shortened(name)} " if name else "" for (_, mark, _), name in zip(styles, arrays, strict=True)
        ]
        labels = [f"{label}{value:.3g}" for label, value in zip(labels, value_S, strict=True)]
        _label_at_right(axes, value_S, labels, [colour for colour, *_ in styles])
    return figure


def histogram(
    values: ArrayLike, label: str, *, count_label: str = "Images", limit: tuple[float, str] | None = None
) -> Figure:
    """Plot a histogram of `values` [n], with their mean marked.

    `label` and `count_label` are the labels of the axes; `limit` is a further value to mark, and its text. Bins of
    integers are centred on integers.
    """
    value_N = np.asarray(values, dtype=float).ravel()
    value_N = value_N[np.isfinite(value_N)]
    with _axes(260) as (figure, axes):
        if len(value_N):
            bins: int | np.ndarray = int(np.clip(2 * len(value_N) ** (1 / 3), 8, 48))
            if np.array_equal(value_N, np.rint(value_N)):
                low, high = value_N.min(), value_N.max() + 1
                step = math.ceil((high - low) / 80)
                bins = np.arange(low, high + step, step) - 0.5
            count_B, edge_B = np.histogram(value_N, bins)
            axes.bar(edge_B[:-1], count_B, np.diff(edge_B) * 0.92, align="edge", color=ACCENT, alpha=0.75, linewidth=0)
            mean = float(value_N.mean())
            marks = [(mean, f"mean {mean:.3f}" if abs(mean) < 10 else f"mean {mean:,.0f}", INK)]
            if limit:
                marks.append((*limit, SECOND))
            left, right = axes.get_xlim()
            right = max(right, limit[0] + 0.02 * (right - left)) if limit else right
            axes.set_xlim(left, right)
            for line, (x, text, colour) in enumerate(marks):
                right_of_it = x < (left + right) / 2
                axes.axvline(x, color=colour, **_DASHED)
                axes.annotate(
                    text,
                    (x, 1),
                    xycoords=("data", "axes fraction"),
                    xytext=(6 if right_of_it else -6, -2 - 17 * line),  # on separate lines, because they may be close
                    textcoords="offset points",
                    ha="left" if right_of_it else "right",
                    va="top",
                    weight="bold",
                    color=colour,
                )
            axes.set_ylim(0, (1.35 if limit else 1.2) * count_B.max())
        axes.grid(visible=False, axis="x")
        axes.set_xlabel(label)
        axes.set_ylabel(count_label)
        _few_ticks(axes)
    return figure


def trend(
    series: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike]],
    points: tuple[ArrayLike, ArrayLike],
    label: str,
    value_label: str,
) -> Figure:
    """Plot group means along a scale with their intervals, over single values; names at the right.

    Args:
        series: name → positions, means, lows and highs of its groups, [g] each, positions ascending; the first name has
            the accent colour.
        points: positions and values of single points in the background, [n] each.
        label: label of the x axis.
        value_label: label of the y axis.
    """
    styles = ((ACCENT, "—", "-"), (SECOND, "--", (0, (4, 2))), (INK, "··", (0, (1, 1.5))))
    styles = [styles[i % len(styles)] for i in range(len(series))]
    arrays = {name: tuple(np.asarray(part, dtype=float) for part in parts) for name, parts in series.items()}
    with _axes(320) as (figure, axes):
        axes.plot(*points, "o", color=MUTED, markersize=4.5, markeredgewidth=0, alpha=0.3)
        # the first in front of the others
        for (colour, _, dash), (x_G, mean_G, low_G, high_G) in reversed(
            list(zip(styles, arrays.values(), strict=True))
        ):
            axes.vlines(x_G, low_G, high_G, color=colour, linewidth=3, alpha=0.45)
            axes.plot(x_G, mean_G, "o", color=colour, linestyle=dash, markersize=7, markeredgewidth=0)
        axes.margins(x=0.03, y=0.06)
        axes.set_xlabel(label)
        axes.set_ylabel(value_label)
        _few_ticks(axes)
        last_S = np.array([mean_G[-1] if len(mean_G) else np.nan for _, mean_G, _, _ in arrays.values()])
        labels = [f"{mark} {_shortened(name)}" for (_, mark, _), name in zip(styles, arrays, strict=True)]
        _label_at_right(axes, last_S, labels, [colour for colour, *_ in styles])
    return figure


def heatmap(values: ArrayLike, cell: int = 20) -> str:
    """Draw a matrix [R, C] as an `<svg>` element of squares of `cell` px, with stronger colour for higher values.

    The scale goes from the lowest to the highest value; the diagonal is framed; NaN is empty. The hidden frame `.at` is
    for the page to mark a cell.
    """
    value_RC = np.asarray(values, dtype=float)
    rows, columns = value_RC.shape
    finite = value_RC[np.isfinite(value_RC)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    shade_RC = np.where(np.isfinite(value_RC), (value_RC - low) / ((high - low) or 1), 0)
    squares = [
        f'<path d="M{c * cell} {r * cell}h{cell - 1}v{cell - 1}h-{cell - 1}z" fill-opacity="{shade_RC[r, c]:.2f}"/>'
        for r in range(rows)
        for c in range(columns)
    ]
    side = cell - 2
    frames = [
        f'<path d="M{d * cell + 0.5} {d * cell + 0.5}h{side}v{side}h-{side}z"/>' for d in range(min(rows, columns))
    ]
    frame = f'<rect class="at" width="{cell - 1}" height="{cell - 1}" fill="none" stroke="currentColor"'
    return (
        f'<svg viewBox="0 0 {columns * cell - 1} {rows * cell - 1}" aria-hidden="true" focusable="false">'
        f'<g fill="var(--accent)">{"".join(squares)}</g>'
        f'<g fill="none" stroke="var(--second)">{"".join(frames)}</g>'
        f'{frame} stroke-width="2" visibility="hidden"/></svg>'
    )


def bars(
    names: Sequence[str],
    parts: ArrayLike,
    wholes: ArrayLike | None = None,
    *,
    label: str = "",
    form: str = ",.0f",
) -> Figure:
    """Plot counts or fractions as bars, first name on top, with figures at the right.

    `parts` are [n]; `wholes` [n], their totals, are bars in the background; `label` is the label of the axis; `form` is
    the format of the figures.
    """
    part_N = np.asarray(parts, dtype=float)
    whole_N = part_N if wholes is None else np.asarray(wholes, dtype=float)
    rows = np.arange(len(names))[::-1]
    labels = ["\n".join(textwrap.wrap(name, 24)) for name in names]
    with _axes(sum(34 if "\n" in label else 28 for label in labels) + 52) as (figure, axes):
        if wholes is not None:
            axes.barh(rows, whole_N, 0.62, color=MUTED, alpha=0.3, linewidth=0)
        axes.barh(rows, part_N, 0.62, color=ACCENT, alpha=0.85, linewidth=0)
        axes.set_xlim(0, (whole_N.max(initial=0) or 1) * 1.02)
        axes.set_xlabel(label)
        _few_ticks(axes, y=False)
        axes.xaxis.set_major_formatter("{x:" + (form if form == ",.0f" else "g") + "}")
        texts = [
            format(p, form) if wholes is None else f"{p:{form}} of {w:{form}}"
            for p, w in zip(part_N, whole_N, strict=True)
        ]
        _name_rows(axes, rows, labels, texts)
    return figure


def rate(starts: ArrayLike, ends: ArrayLike, counts: ArrayLike, *, label: str, resumed: Sequence[float] = ()) -> Figure:
    """Plot a rate per second over time, from intervals of work.

    Interval i is from `starts[i]` to `ends[i]`, seconds since the beginning, and has `counts[i]` items, evenly spread.
    `resumed` are the seconds at which a run resumed after a pause.
    """
    start_N, end_N, count_N = (np.asarray(values, dtype=float) for values in (starts, ends, counts))
    with _axes(240) as (figure, axes):
        if len(start_N):
            edge_B = np.linspace(0, end_N.max(), int(np.clip(4 * len(start_N), 2, 120)) + 1)
            # items finished by each edge: the finished fraction of each interval, summed
            share_BN = np.clip((edge_B[:, None] - start_N) / np.maximum(end_N - start_N, 1e-9), 0, 1)
            rate_B = np.diff(share_BN @ count_N) / np.diff(edge_B)
            unit, name = _time_unit(float(edge_B[-1]))
            axes.stairs(rate_B, edge_B / unit, color=ACCENT, linewidth=2)
            axes.stairs(rate_B, edge_B / unit, color=ACCENT, alpha=0.14, fill=True, linewidth=0)
            mean = float(count_N.sum() / edge_B[-1])
            axes.axhline(mean, color=INK, **_DASHED)
            axes.annotate(
                f"mean {mean:.3g}",
                (1, 1),
                xycoords="axes fraction",
                xytext=(-4, -2),
                textcoords="offset points",
                ha="right",
                va="top",
                weight="bold",
            )
            for resume_s in resumed:
                axes.axvline(resume_s / unit, color=SECOND, linewidth=1.5, linestyle=(0, (1, 2)))
            axes.set_xlim(0, edge_B[-1] / unit)
            axes.set_ylim(0, 1.25 * rate_B.max() or 1)
            axes.set_xlabel(f"Working time, {name}")
        axes.set_ylabel(label)
        _few_ticks(axes)
    return figure


def svg(figure: Figure, *, width: int = WIDE, prefix: str = "") -> str:
    """Render a figure at `width` px, with its own height, as an `<svg>` element in the page's colours and font.

    Every id starts with `prefix`, which must differ between the drawings of a page. The size of the figure is restored.
    """
    width_now, height = map(float, figure.get_size_inches())
    out = io.StringIO()
    with _style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the browser has it
        try:
            figure.set_size_inches(width / 72, height)
            no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure.savefig(out, format="svg", transparent=True, metadata=no_metadata)
        finally:
            figure.set_size_inches(width_now, height)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<style.*?</style>|<defs>\s*</defs>", "", text, flags=re.S)
    used_ids = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used_ids else "", text)
    text = re.sub(r'(?:xlink:)?href="#', f'href="#{prefix}', text).replace("url(#", f"url(#{prefix}")
    text = re.sub(r" font-family: [^;]*;|(?<=font: )([^;']*?)'[^;]*;", r"\1", text)
    for colour, css in _CSS.items():
        text = text.replace(colour, css)
    viewbox = re.search(r'viewBox="[^"]*"', text)
    head = f'<svg {viewbox[0] if viewbox else ""} aria-hidden="true" focusable="false">'
    text = re.sub(r"<svg[^>]*>", head, text, count=1)
    # hundredths of a pixel are enough; only inside tags, because the text between them has values
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}", tag[0]), text)
    return re.sub(r"\s*\n\s*", " ", text).replace("> <", "><").strip()


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(_SETTINGS):  # pyright: ignore[reportArgumentType] - the stubs list keys one by one
        yield


@contextmanager
def _axes(height: float, rows: int = 1) -> Iterator[tuple[Figure, Any]]:
    """Yield a new figure in the page's style with its axes, or with an array of `rows` axes, one above the other."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with _style():
        engine = ConstrainedLayoutEngine(w_pad=2 / 72, h_pad=2 / 72, hspace=0.06)
        figure = Figure((WIDE / 72, height / 72), dpi=72, layout=engine)
        yield figure, figure.subplots(rows, sharex=True)


def _name_rows(axes: Axes, rows: np.ndarray, names: Sequence[str], figures: Sequence[str]) -> None:
    """Name the rows of a plot at the left, with figures at the right: tick labels, for which the layout makes room."""
    axes.set_yticks(rows, names)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(visible=False, axis="y")
    at_right = axes.secondary_yaxis("right")
    at_right.set_yticks(rows, figures)
    at_right.tick_params(labelcolor=INK)
    at_right.spines["right"].set_visible(False)


def _label_at_right(axes: Axes, value_S: np.ndarray, labels: Sequence[str], colours: Sequence[str]) -> None:
    """Label each line beside its value, by tick labels, which the layout aligns and makes room for."""
    names = axes.secondary_yaxis("right")
    names.set_yticks(_without_overlap(value_S, *axes.get_ylim()), labels)
    names.spines["right"].set_visible(False)
    for colour, label in zip(colours, names.get_yticklabels(), strict=True):
        label.set_color(colour)


def _without_overlap(value_S: np.ndarray, low: float, high: float) -> np.ndarray:
    """Positions of labels as near to `value_S` as possible without overlap; a label is about 20 px high."""
    room = 0.95 * (high - low) / max(len(value_S), 8)
    order = np.argsort(value_S, kind="stable")
    # values minus the room below them must not decrease: those that do get their mean (pool adjacent violators)
    pools: list[list[float]] = []  # mean, members
    for place, i in enumerate(order):
        pools.append([float(np.nan_to_num(value_S[i], nan=low)) - place * room, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            mean, count = pools.pop()
            pools[-1] = [(pools[-1][0] * pools[-1][1] + mean * count) / (pools[-1][1] + count), pools[-1][1] + count]
    spread = np.repeat([mean for mean, _ in pools], [int(count) for _, count in pools])
    spread = np.clip(spread, low, high - room * max(len(value_S) - 1, 0))
    place_S = np.empty(len(value_S))
    place_S[order] = spread + room * np.arange(len(value_S))
    return place_S


def _shortened(name: str, max_length: int = 20) -> str:
    return name if len(name) <= max_length else f"{name[: max_length - 1]}…"


def _few_ticks(axes: Axes, *, y: bool = True) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10]))
    if y:
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))


def _running_mean(value_N: np.ndarray, window: int) -> np.ndarray:
    """Running mean over a centred window, which narrows at both ends instead of padding."""
    sums = np.concatenate([[0.0], np.cumsum(value_N)])
    middle = np.arange(len(value_N))
    half = np.minimum(np.minimum(window, middle), len(value_N) - 1 - middle)
    return (sums[middle + half + 1] - sums[middle - half]) / (2 * half + 1)


def _time_ticks(second_N: np.ndarray, step_N: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Choose about four round wall times, as positions on the step axis and as text."""
    total = float(second_N[-1])
    intervals = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 43200, 86400, 604800]
    interval = next((c for c in intervals if total / c <= 5), intervals[-1])
    times = np.arange(interval, total + 1e-9, interval)
    unit, name = _time_unit(interval)
    return np.interp(times, second_N, step_N), [f"{t / unit:g} {name}" for t in times]


def _time_unit(seconds: float) -> tuple[int, str]:
    return (1, "s") if seconds < 60 else (60, "min") if seconds < 3600 else (3600, "h")
