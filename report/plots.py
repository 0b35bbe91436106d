"""Plots with one look: plain arrays → matplotlib `Figure` → SVG that lives inside the page.

    page.figure(plots.histogram(values, "cosine"), caption="…")

A figure is drawn in stand-in colours; `svg` swaps them for the page's CSS variables, so that one drawing reads in light
and in dark. One unit of a figure is one CSS pixel. Text stays text, in the page's font. Nothing here touches pyplot or
leaves a trace in matplotlib's settings, and the same input gives the same bytes. matplotlib is imported when needed.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, NARROW = 936, 358  # px: the text column of the page on a desk and on a phone

# Stand-ins: colours that nobody would choose, each with what the page puts in its place.
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
    """Means with their intervals: a dot and a whisker a name, the highest on top, its value at the right.

    `means`, `lows` and `highs` are [n], in the order of `names`; `label` names their unit; the rows
    called `highlight` are drawn in the accent colour, None meaning all. `zero` is for differences: a line at zero, and
    values with their signs.
    """
    lit = {highlight} if isinstance(highlight, str) else names if highlight is None else highlight
    mean_N, low_N, high_N = (np.asarray(values, dtype=float) for values in (means, lows, highs))
    order: list[int] = np.argsort(mean_N, kind="stable").tolist()
    rows = np.arange(len(order))
    labels = ["\n".join(textwrap.wrap(names[i], 22)) for i in order]  # narrow enough to leave a phone some plot
    with _look():
        figure = _figure((34 if any("\n" in label for label in labels) else 28) * len(order) + 52)
        axes = figure.subplots()
        if zero:
            axes.axvline(0, color=INK, linewidth=1.5, linestyle=(0, (3, 2)))
        for row, i in zip(rows, order, strict=True):
            colour = ACCENT if names[i] in lit else MUTED
            axes.plot([low_N[i], high_N[i]], [row, row], color=colour, linewidth=3, alpha=0.45)
            axes.plot(mean_N[i], row, "o", color=colour, markersize=8, markeredgewidth=0)
        axes.set_yticks(rows, labels)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(-0.6, len(order) - 0.4)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(label)
        axes.margins(x=0.06)
        # The values are the tick labels of a right-hand axis: they line up, and the layout makes room for them.
        values = axes.secondary_yaxis("right")
        form = "+.3f" if zero else ".3f"
        values.set_yticks(rows, [format(mean_N[i], form).replace("-", "−") for i in order])
        values.tick_params(labelcolor=INK)
        values.spines["right"].set_visible(False)
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
    """Validation cosine above training loss, both by step.

    `train_loss` is [n] at `steps` [n]; the `val_*` are [m] at `val_steps` [m], and `val_low` with `val_high` shade the
    interval. `seconds` [n] is the wall time at `steps`: it puts a second scale along the top.
    """
    step_N, loss_N = np.asarray(steps, dtype=float), np.asarray(train_loss, dtype=float)
    val_step_M, cosine_M = np.asarray(val_steps, dtype=float), np.asarray(val_cosine, dtype=float)
    with _look():
        figure = _figure(440)
        above, below = figure.subplots(2, 1, sharex=True)
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
            axes.spines["left"].set_visible(False)
            _few_ticks(axes)
        if seconds is not None and len(step_N) > 1:
            ticks, labels = _time_ticks(np.asarray(seconds, dtype=float), step_N)
            clock = above.secondary_xaxis("top")
            clock.set_xticks(ticks, labels)
            clock.spines["top"].set_visible(False)
    return figure


def curves(series: Mapping[str, Sequence[tuple[float, float]]], title: str, *, zero: bool = False) -> Figure:
    """Lines by step, each with its name and its last value at the right.

    Args:
        series: name → (step, value) pairs, in order.
        title: what the values are.
        zero: for rates: the scale begins at 0, and the value at the right is the mean.
    """
    shown = {name: np.asarray(pairs, dtype=float).T for name, pairs in series.items() if pairs}
    dashes = (("—", "-"), ("--", (0, (4, 2))), ("··", (0, (1, 1.5))))
    looks = [(colour, *dash) for dash in dashes for colour in (ACCENT, SECOND, INK, MUTED)]
    looks = [looks[i % len(looks)] for i in range(len(shown))]
    with _look():
        figure = _figure(max(220, 20 * len(shown) + 90))
        axes = figure.subplots()
        axes.set_title(title)
        for (colour, _, dash), (step_N, value_N) in zip(looks, shown.values(), strict=True):
            if len(value_N) > 50:  # a long log is noise around a trend: show both
                axes.plot(step_N, value_N, color=colour, linewidth=1, alpha=0.35)
                axes.plot(step_N, _running_mean(value_N, len(value_N) // 25), color=colour, linestyle=dash)
            else:
                axes.plot(step_N, value_N, "o", color=colour, linestyle=dash, markersize=4, markeredgewidth=0)
        axes.margins(y=0.12)
        if zero:
            axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.set_xlabel("Step")
        axes.spines["left"].set_visible(False)
        _few_ticks(axes)
        value_S = np.array([np.nanmean(v) if zero else v[-1] for _, v in shown.values()])
        labels = [
            f"{mark} {_shortened(name)} " if name else "" for (_, mark, _), name in zip(looks, shown, strict=True)
        ]
        labels = [f"{label}{value:.3g}" for label, value in zip(labels, value_S, strict=True)]
        _labelled_at_right(axes, value_S, labels, [colour for colour, *_ in looks])
    return figure


def histogram(values: ArrayLike, label: str, *, what: str = "Images", limit: tuple[float, str] | None = None) -> Figure:
    """The distribution of `values` [n], with their mean marked.

    `label` names the values, `what` the things counted; `limit` marks a value and says what it is. Bars of whole
    numbers begin at whole numbers.
    """
    value_N = np.asarray(values, dtype=float).ravel()
    value_N = value_N[np.isfinite(value_N)]
    with _look():
        figure = _figure(260)
        axes = figure.subplots()
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
                axes.axvline(x, color=colour, linewidth=1.5, linestyle=(0, (3, 2)))
                axes.annotate(
                    text,
                    (x, 1),
                    xycoords=("data", "axes fraction"),
                    xytext=(6 if right_of_it else -6, -2 - 17 * line),  # one below the other: they may be close
                    textcoords="offset points",
                    ha="left" if right_of_it else "right",
                    va="top",
                    weight="bold",
                    color=colour,
                )
            axes.set_ylim(0, (1.35 if limit else 1.2) * count_B.max())
        axes.grid(visible=False, axis="x")
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(label)
        axes.set_ylabel(what)
        _few_ticks(axes)
    return figure


def trend(
    series: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike]],
    points: tuple[ArrayLike, ArrayLike],
    label: str,
    what: str,
) -> Figure:
    """Means of groups along a scale, with their intervals, before the single values; names at the right.

    Args:
        series: name → places, means, lows and highs of its groups, [g] each, places ascending; the first name is in
            the accent colour.
        points: places and values of what is drawn behind, [n] each.
        label: names the places.
        what: names the values.
    """
    looks = ((ACCENT, "—", "-"), (SECOND, "--", (0, (4, 2))), (INK, "··", (0, (1, 1.5))))
    looks = [looks[i % len(looks)] for i in range(len(series))]
    shown = {name: tuple(np.asarray(part, dtype=float) for part in parts) for name, parts in series.items()}
    with _look():
        figure = _figure(320)
        axes = figure.subplots()
        axes.plot(*points, "o", color=MUTED, markersize=4.5, markeredgewidth=0, alpha=0.3)
        # the first in front of the others
        for (colour, _, dash), (x_G, mean_G, low_G, high_G) in reversed(list(zip(looks, shown.values(), strict=True))):
            axes.vlines(x_G, low_G, high_G, color=colour, linewidth=3, alpha=0.45)
            axes.plot(x_G, mean_G, "o", color=colour, linestyle=dash, markersize=7, markeredgewidth=0)
        axes.margins(x=0.03, y=0.06)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(label)
        axes.set_ylabel(what)
        _few_ticks(axes)
        last_S = np.array([mean_G[-1] if len(mean_G) else np.nan for _, mean_G, _, _ in shown.values()])
        labels = [f"{mark} {_shortened(name)}" for (_, mark, _), name in zip(looks, shown, strict=True)]
        _labelled_at_right(axes, last_S, labels, [colour for colour, *_ in looks])
    return figure


def heatmap(values: ArrayLike, cell: int = 20) -> str:
    """A matrix [R, C] as an `<svg>` element: a square of `cell` px each, the stronger in colour the higher its value.

    Lowest and highest lie at the ends of the scale; the diagonal is framed; NaN is empty. The element `.at`, a frame
    that is not shown, is for the page to mark a cell with.
    """
    value_RC = np.asarray(values, dtype=float)
    rows, columns = value_RC.shape
    known = value_RC[np.isfinite(value_RC)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
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
    """Counts or shares as bars, the first name on top, their figures at the right.

    `parts` are [n]; `wholes` [n], of which they are parts, are drawn behind them; `label` names the unit; figures are
    written in `form`.
    """
    part_N = np.asarray(parts, dtype=float)
    whole_N = part_N if wholes is None else np.asarray(wholes, dtype=float)
    rows = np.arange(len(names))[::-1]
    labels = ["\n".join(textwrap.wrap(name, 24)) for name in names]
    with _look():
        figure = _figure(sum(34 if "\n" in label else 28 for label in labels) + 52)
        axes = figure.subplots()
        if wholes is not None:
            axes.barh(rows, whole_N, 0.62, color=MUTED, alpha=0.3, linewidth=0)
        axes.barh(rows, part_N, 0.62, color=ACCENT, alpha=0.85, linewidth=0)
        axes.set_yticks(rows, labels)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlim(0, (whole_N.max(initial=0) or 1) * 1.02)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(label)
        _few_ticks(axes, y=False)
        axes.xaxis.set_major_formatter("{x:" + (form if form == ",.0f" else "g") + "}")
        figures = axes.secondary_yaxis("right")
        shown = [
            format(p, form) if wholes is None else f"{p:{form}} of {w:{form}}"
            for p, w in zip(part_N, whole_N, strict=True)
        ]
        figures.set_yticks(rows, shown)
        figures.tick_params(labelcolor=INK)
        figures.spines["right"].set_visible(False)
    return figure


def rate(starts: ArrayLike, ends: ArrayLike, counts: ArrayLike, *, label: str, resumed: Sequence[float] = ()) -> Figure:
    """Things a second over time, of work that is counted piece by piece.

    Piece i took from `starts[i]` to `ends[i]`, seconds since the beginning, and made `counts[i]` things, evenly.
    `resumed` marks the seconds at which a run went on after a pause.
    """
    start_N, end_N, count_N = (np.asarray(values, dtype=float) for values in (starts, ends, counts))
    with _look():
        figure = _figure(240)
        axes = figure.subplots()
        if len(start_N):
            edge_B = np.linspace(0, end_N.max(), int(np.clip(4 * len(start_N), 2, 120)) + 1)
            # What is done by each edge: a piece's share of it, summed.
            share_BN = np.clip((edge_B[:, None] - start_N) / np.maximum(end_N - start_N, 1e-9), 0, 1)
            rate_B = np.diff(share_BN @ count_N) / np.diff(edge_B)
            unit, name = _time_unit(float(edge_B[-1]))
            axes.stairs(rate_B, edge_B / unit, color=ACCENT, linewidth=2)
            axes.stairs(rate_B, edge_B / unit, color=ACCENT, alpha=0.14, fill=True, linewidth=0)
            mean = float(count_N.sum() / edge_B[-1])
            axes.axhline(mean, color=INK, linewidth=1.5, linestyle=(0, (3, 2)))
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
            for moment in resumed:
                axes.axvline(moment / unit, color=SECOND, linewidth=1.5, linestyle=(0, (1, 2)))
            axes.set_xlim(0, edge_B[-1] / unit)
            axes.set_ylim(0, 1.25 * rate_B.max() or 1)
            axes.set_xlabel(f"Time of work, {name}")
        axes.set_ylabel(label)
        axes.spines["left"].set_visible(False)
        _few_ticks(axes)
    return figure


def svg(figure: Figure, *, width: int = WIDE, prefix: str = "") -> str:
    """`figure` laid out anew at `width` px (its height stays), as an `<svg>` element in the page's colours and font.

    Every id starts with `prefix`: two drawings in one page need two. The figure keeps its own size.
    """
    width_now, height = map(float, figure.get_size_inches())
    out = io.StringIO()
    with _look(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the browser has it
        try:
            figure.set_size_inches(width / 72, height)
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure.savefig(out, format="svg", transparent=True, metadata=nothing)
        finally:
            figure.set_size_inches(width_now, height)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<style.*?</style>|<defs>\s*</defs>", "", text, flags=re.S)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(?:xlink:)?href="#', f'href="#{prefix}', text).replace("url(#", f"url(#{prefix}")
    text = re.sub(r" font-family: [^;]*;|(?<=font: )([^;']*?)'[^;]*;", r"\1", text)
    for colour, css in _CSS.items():
        text = text.replace(colour, css)
    viewbox = re.search(r'viewBox="[^"]*"', text)
    head = f'<svg {viewbox[0] if viewbox else ""} aria-hidden="true" focusable="false">'
    text = re.sub(r"<svg[^>]*>", head, text, count=1)
    # Hundredths of a pixel are enough; only inside the tags, for the text between them holds values.
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}", tag[0]), text)
    return re.sub(r"\s*\n\s*", " ", text).replace("> <", "><").strip()


@contextmanager
def _look() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(_SETTINGS):  # pyright: ignore[reportArgumentType] - the stubs list keys one by one
        yield


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure((WIDE / 72, height / 72), dpi=72, layout="constrained")
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.set(w_pad=2 / 72, h_pad=2 / 72, hspace=0.06)  # pyright: ignore[reportCallIssue]
    return figure


def _labelled_at_right(axes: Axes, value_S: np.ndarray, labels: Sequence[str], colours: Sequence[str]) -> None:
    """Each line's label beside its value; as tick labels they line up, and the layout makes room for them."""
    names = axes.secondary_yaxis("right")
    names.set_yticks(_apart(value_S, *axes.get_ylim()), labels)
    names.spines["right"].set_visible(False)
    for colour, label in zip(colours, names.get_yticklabels(), strict=True):
        label.set_color(colour)


def _apart(value_S: np.ndarray, low: float, high: float) -> np.ndarray:
    """Places for labels as near to `value_S` as they go without touching; a label takes some 20 px of the height."""
    room = 0.95 * (high - low) / max(len(value_S), 8)
    order = np.argsort(value_S, kind="stable")
    # values less the room below them must not fall: those that do share their mean (pool adjacent violators)
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


def _shortened(name: str, most: int = 20) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _few_ticks(axes: Axes, *, y: bool = True) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10]))
    if y:
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))


def _running_mean(value_N: np.ndarray, window: int) -> np.ndarray:
    """The mean over a centred window, which narrows at both ends instead of inventing values."""
    sums = np.concatenate([[0.0], np.cumsum(value_N)])
    middle = np.arange(len(value_N))
    half = np.minimum(np.minimum(window, middle), len(value_N) - 1 - middle)
    return (sums[middle + half + 1] - sums[middle - half]) / (2 * half + 1)


def _time_ticks(second_N: np.ndarray, step_N: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """About four round wall times, as positions on the step axis and as text."""
    longest = float(second_N[-1])
    choices = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 43200, 86400, 604800]
    every = next((c for c in choices if longest / c <= 5), choices[-1])
    times = np.arange(every, longest + 1e-9, every)
    unit, name = _time_unit(every)
    return np.interp(times, second_N, step_N), [f"{t / unit:g} {name}" for t in times]


def _time_unit(seconds: float) -> tuple[int, str]:
    return (1, "s") if seconds < 60 else (60, "min") if seconds < 3600 else (3600, "h")
