"""Image filters for the media of `grammar.MEDIA` and the lights of `grammar.LIGHTS`.

Shapes: H, W pixels; C = RGB. All lengths are shares of the side, so that every size shows the same image.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Array = NDArray[Any]
P = ParamSpec("P")
T = TypeVar("T")
LUMA = np.array([0.3, 0.59, 0.11], np.float32)


@dataclass
class Canvas:
    """A composed scene; every array is float32 in 0 … 1."""

    rgb: Array
    """[H, W, C], the scene."""
    back: Array
    """[H, W, C], the scene without its objects."""
    paint: Array
    """[H, W, C], flat colours where there are objects."""
    ink: Array
    """[H, W], the icons' own strokes and fills."""
    cover: Array
    """[H, W], the icons with their holes filled."""
    rng: random.Random
    maps: "Maps"

    @cached_property
    def classes(self) -> NDArray[np.int64]:
        """[H, W]: 0 background, 1 hole of an object, 2 ink: means taken within a class keep the outlines crisp."""
        return (self.cover > 0.5).astype(np.int64) + (self.ink > 0.5)


def _cached(make: "Callable[Concatenate[Maps, P], T]") -> "Callable[Concatenate[Maps, P], T]":
    """Cache the results of a method of `Maps`, or of a function of one, in that object."""

    @wraps(make)
    def cached(maps: "Maps", *args: P.args, **options: P.kwargs) -> T:
        key = (make.__name__, *args, *options.items())
        if key not in maps.cache:
            maps.cache[key] = make(maps, *args, **options)
        return maps.cache[key]

    return cached


class Maps:
    """Textures and pixel partitions of one image size, made on first use."""

    def __init__(self, size: int) -> None:
        self.size = size
        axis = ((np.arange(size) + 0.5) / size).astype(np.float32)
        self.x_W, self.y_H1 = axis, axis[:, None]
        self.cache: dict[tuple[object, ...], Any] = {}

    @_cached
    def noise(self, cells: int, seed: int = 0) -> Array:
        """Smooth noise of mean .5 with about `cells` blobs a side."""
        coarse = _unit((cells + 2) ** 2, 7 + 1000 * seed + cells).reshape(cells + 2, cells + 2)
        image = Image.fromarray((coarse * 255).astype(np.uint8))
        return _float(image.resize((self.size, self.size), Image.Resampling.BICUBIC))

    def grain(self, rng: random.Random, cells: int = 160) -> Array:
        """Fine noise, shifted at random."""
        shift = (int(rng.random() * self.size), int(rng.random() * self.size))
        return np.roll(self.noise(cells, 3), shift, (0, 1))

    @_cached
    def cells(self, n: int, jitter: float = 0.8) -> tuple[NDArray[np.int64], Array]:
        """A Voronoi partition of n × n jittered seeds: labels [H, W], and the distance to the border in cell widths."""
        offsets = (_unit(2 * (n + 2) ** 2, n).reshape(n + 2, n + 2, 2) - 0.5) * jitter + 0.5
        gx, gy = self.x_W[None] * n, self.y_H1 * n
        cx, cy = gx.astype(np.int64), gy.astype(np.int64)
        near = np.full((self.size, self.size), 9.0, np.float32)
        second = near.copy()
        labels = np.zeros((self.size, self.size), np.int64)
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                point = offsets[cy + dy + 1, cx + dx + 1]
                d = np.hypot(cx + dx + point[..., 0] - gx, cy + dy + point[..., 1] - gy)
                closer = d < near
                second = np.where(closer, near, np.minimum(second, d))
                labels = np.where(closer, (cy + dy + 1) * (n + 2) + cx + dx + 1, labels)
                near = np.where(closer, d, near)
        return labels, second - near

    @_cached
    def triangles(self, n: int) -> NDArray[np.int64]:
        """Labels of a jittered triangle mesh."""
        image = Image.new("I", (self.size, self.size))
        draw = ImageDraw.Draw(image)
        jitter = _unit(2 * (n + 3) ** 2, 5).reshape(n + 3, n + 3, 2) * 0.7 - 0.35
        at = lambda i, j: ((j - 1 + jitter[i, j, 0]) / n * self.size, (i - 1 + jitter[i, j, 1]) / n * self.size)  # noqa: E731
        label = 0
        for i in range(n + 2):
            for j in range(n + 2):
                a, b, c, d = at(i, j), at(i, j + 1), at(i + 1, j), at(i + 1, j + 1)
                for corners in ([a, b, c], [b, c, d]) if (i + j) % 2 else ([a, b, d], [a, c, d]):
                    draw.polygon(corners, fill=label)
                    label += 1
        return np.asarray(image).astype(np.int64)

    @_cached
    def strokes(self, n: int, length: float, width: float, spread: float, lean: float = 0.0) -> NDArray[np.int64]:
        """Labels of n overlapping brush strokes along a slow flow; `spread` turns them, `lean` is the mean angle."""
        image = Image.new("I", (self.size, self.size))
        draw = ImageDraw.Draw(image)
        r = _unit(3 * n, n).reshape(n, 3)
        for k in range(n):
            x, y = r[k, 0] * 1.1 - 0.05, r[k, 1] * 1.1 - 0.05
            angle = lean + spread * (math.sin(3.1 * x + 5.3 * y) + 0.7 * math.sin(6.1 * y - 4.2 * x) + r[k, 2] - 0.5)
            ax, ay = math.cos(angle) * length / 2, math.sin(angle) * length / 2
            bx, by = -math.sin(angle) * width / 2, math.cos(angle) * width / 2
            # in halves of the length and of the width
            outline = ((-1, 0), (-0.6, 1), (0.6, 1), (1, 0), (0.6, -1), (-0.6, -1))
            corners = [(x + ax * along + bx * across, y + ay * along + by * across) for along, across in outline]
            draw.polygon([(px * self.size, py * self.size) for px, py in corners], fill=k + 1)
        return np.asarray(image).astype(np.int64)

    @_cached
    def hatch(self, pitch: float, angle: float) -> Array:
        """Lines 1 → 0 → 1 across, `pitch` apart, a little wavy."""
        across = self.x_W[None] * math.sin(angle) + self.y_H1 * math.cos(angle)
        wobble = (self.noise(14) - 0.5) * pitch * 1.2
        return (0.5 + 0.5 * np.cos((across + wobble) / pitch * 2 * math.pi)).astype(np.float32)

    @_cached
    def vignette(self) -> Array:
        """Squared distance from the centre."""
        return (self.x_W[None] - 0.5) ** 2 + (self.y_H1 - 0.5) ** 2

    def window(self, x: float, y: float, reach: float) -> tuple[slice, slice]:
        """Rows and columns within `reach` of a point."""
        edge = [max(0, round((c + d) * self.size)) for c in (y, x) for d in (-reach, reach)]
        return slice(edge[0], edge[1]), slice(edge[2], edge[3])

    @_cached
    def bricks(self) -> tuple[Array, Array]:
        """A brick wall: brightness of each brick, and 1 on the mortar."""
        row = (self.y_H1 * 14).astype(np.int64)
        x = self.x_W[None] * 6 + 0.5 * (row % 2)
        tone = _unit(400, 11)[(row * 17 + x.astype(np.int64)) % 400]
        mortar = ((self.y_H1 * 14 % 1) < 0.14) | ((x % 1) < 0.06)
        return tone, mortar.astype(np.float32)


@lru_cache(64)
def _unit(n: int, seed: int) -> Array:
    return np.random.Generator(np.random.PCG64(seed)).random(n).astype(np.float32)


def _float(image: Image.Image) -> Array:
    return np.asarray(image, dtype=np.float32) * np.float32(1 / 255)


def blur(a: Array, radius: float) -> Array:
    """Gaussian blur; `radius` is a share of the side."""
    image = Image.fromarray((a.clip(0, 1) * 255).astype(np.uint8))
    return _float(image.filter(ImageFilter.GaussianBlur(radius * a.shape[0])))


def rim(mask_HW: Array, width: float) -> Array:
    """A line of about `width` along the mask's edge."""
    return (1.6 - 3.6 * np.abs(blur(mask_HW, width * 0.6) - 0.5)).clip(0, 1)


def edges(rgb_HWC: Array) -> Array:
    """Strength of the edges of brightness."""
    luma = rgb_HWC @ LUMA
    d = max(1, round(luma.shape[0] / 140))
    strength = np.zeros_like(luma)
    down, across = luma[2 * d :, d:-d] - luma[: -2 * d, d:-d], luma[d:-d, 2 * d :] - luma[d:-d, : -2 * d]
    strength[d:-d, d:-d] = np.abs(down) + np.abs(across)
    return strength


def means(p: Canvas, labels_HW: NDArray[np.int64], shade: float = 0.0) -> Array:
    """Each label's mean colour, apart for background, holes and ink; `shade` varies each label's brightness."""
    split = (labels_HW * 3 + p.classes).ravel()
    n = int(split.max()) + 1
    count = np.maximum(np.bincount(split, minlength=n), 1)
    rgb = p.rgb.reshape(-1, 3)
    mean = np.stack([np.bincount(split, weights=rgb[:, c], minlength=n) / count for c in range(3)], 1)
    if shade:
        mean *= 1 + shade * (_unit(4096, 1)[(np.arange(n) // 3 * 7) % 4096, None] - 0.5)
    return mean.astype(np.float32)[split].reshape(p.rgb.shape)


def vivid(rgb_HWC: Array, amount: float) -> Array:
    """Saturation times `amount`."""
    grey = (rgb_HWC @ LUMA)[..., None]
    return grey + (rgb_HWC - grey) * np.float32(amount)


def mix(a: Array, b: Array, t: Array | float) -> Array:
    """From `a` (t = 0) to `b` (t = 1): images [H, W, C] or colours [C], by a weight for each pixel or for all."""
    if not isinstance(t, np.ndarray):
        return a + (b - a) * np.float32(t)
    out = np.empty((*np.broadcast_shapes(t.shape, a.shape[:-1], b.shape[:-1]), 3), np.float32)
    for c in range(3):  # a channel at a time: numpy is slow where the last axis has three entries
        first = a[..., c]
        np.multiply(b[..., c] - first, t, out=out[..., c])
        out[..., c] += first
    return out


def colour(r: int, g: int, b: int) -> Array:
    return np.array([r, g, b], np.float32) / np.float32(255)


def ramp(value_HW: Array, *stops: tuple[int, int, int]) -> Array:
    """Gradient map: 0 … 1 → the stops, evenly spaced; a stop is a colour as in `colour`."""
    levels, positions = np.linspace(0, 1, 256), np.linspace(0, 1, len(stops))
    channels = np.stack([colour(*stop) for stop in stops], 1)
    table = np.stack([np.interp(levels, positions, channel) for channel in channels], 1)
    return table.astype(np.float32)[(value_HW.clip(0, 1) * 255).astype(np.uint8)]


# --- media -----------------------------------------------------------------------------------------------------------


def _oil(p: Canvas) -> Array:
    m = p.maps
    coarse, fine = m.strokes(1500, 0.13, 0.034, 0.9), m.strokes(3600, 0.07, 0.02, 0.9)
    labels = np.where(p.classes > 0, fine + 4000, coarse)
    out = means(p, labels, 0.34)
    bristle = m.hatch(0.016, 0.7) - 0.5
    out = vivid(out, 1.2) * (1 + 0.1 * bristle[..., None])
    relief = out @ LUMA
    d = max(1, m.size // 128)
    return out + (relief - np.roll(relief, (d, d), (0, 1)))[..., None] * 0.35


def _watercolour(p: Canvas) -> Array:
    m = p.maps
    soft = means(p, m.cells(40)[0]) * 0.5 + blur(p.rgb, 0.01) * 0.5
    blotch = m.noise(9)[..., None] * 0.5 + m.noise(24)[..., None] * 0.3
    wash = 1 - (1 - vivid(soft, 1.25)) * (0.5 + blotch * 0.75)
    wash -= rim(p.cover, 0.012)[..., None] * 0.16 + edges(soft)[..., None] * 0.2
    border = np.minimum(np.minimum(m.x_W[None], 1 - m.x_W[None]), np.minimum(m.y_H1, 1 - m.y_H1))
    inside = ((border - 0.035 - (m.noise(16, 2) - 0.5) * 0.09) * 26).clip(0, 1) * (1 - p.cover) + p.cover
    paper = 0.955 + (m.grain(p.rng) - 0.5) * 0.09
    return mix(colour(255, 252, 244), wash, inside) * paper[..., None]


def _pencil(p: Canvas) -> Array:
    m = p.maps
    flat = mix(p.back, p.paint, p.cover)
    tone = (flat @ LUMA) * (0.94 - 0.14 * p.cover) + 0.05
    shade = (m.hatch(0.022, 0.8) < (1.05 - tone) * 0.9).astype(np.float32) * 0.55
    shade += (m.hatch(0.026, 2.3) < (0.62 - tone) * 1.2) * np.float32(0.45)
    line = (edges(p.rgb) * 1.5 + rim(p.ink, 0.009) * 0.75).clip(0, 0.9)
    paper = colour(250, 247, 238)
    chroma = vivid(flat, 1.4)
    dark = chroma * 0.75
    sheet = mix(paper, dark, shade * (0.35 + 0.6 * p.cover) * (0.7 + 0.6 * m.grain(p.rng)))
    sheet = mix(sheet, chroma, p.ink * 0.3)
    return mix(sheet, colour(56, 54, 60), line * (0.6 + 0.7 * m.grain(p.rng)).clip(0, 1))


def _charcoal(p: Canvas) -> Array:
    m = p.maps
    tone = blur(p.rgb, 0.008) @ LUMA
    tone = tone * 0.75 + 0.32 - p.ink * 0.42 + (p.cover - p.ink) * 0.25
    grit = m.grain(p.rng) * 0.6 + m.noise(60, 1) * 0.5 + m.hatch(0.03, 0.6) * 0.3
    dust = (tone * 1.5 - 0.15 + (grit - 0.7) * 0.8).clip(0, 1) ** 0.9
    dust -= rim(p.ink, 0.014) * 0.6 + edges(p.rgb) * 0.4
    return ramp(dust, (26, 25, 27), (128, 126, 124), (238, 234, 226))


def _ink(p: Canvas) -> Array:
    m = p.maps
    paper = mix(colour(240, 224, 188), colour(206, 178, 128), m.noise(6) * 0.8)
    paper *= 1 - m.vignette()[..., None] * 0.35
    tone = p.back @ LUMA
    cross = (m.hatch(0.02, 0.8) < (0.62 - tone) * 1.2) | (m.hatch(0.02, 2.4) < (0.36 - tone) * 1.4)
    out = mix(paper, paper * vivid(p.paint, 1.15), p.cover * 0.85)
    line = np.maximum(cross * (1 - p.cover) * 0.8, rim(p.ink, 0.013))
    line = np.maximum(line, (edges(p.back) * 3.2 * (1 - p.cover)).clip(0, 1))
    return mix(out, colour(30, 24, 34), line.clip(0, 1))


def _pixel(p: Canvas) -> Array:
    n = 42
    image = Image.fromarray((p.rgb.clip(0, 1) * 255).astype(np.uint8)).resize((n, n), Image.Resampling.BOX)
    cells = np.asarray(image).astype(np.float32) / 255
    dither = np.array([[0.0, 0.5], [0.75, 0.25]], np.float32)[np.arange(n)[:, None] % 2, np.arange(n)[None] % 2]
    cells = np.floor(vivid(cells, 1.25).clip(0, 1) * 8 + dither[..., None] * 0.45 + 0.33) / 8
    k = (p.maps.x_W * n).astype(np.int64)
    return cells[k[:, None], k[None]]


def _neon(p: Canvas) -> Array:
    tone, mortar = p.maps.bricks()
    wall = mix(colour(34, 26, 44), colour(58, 36, 54), tone)
    wall = mix(wall, colour(20, 16, 28), mortar)
    light = vivid(p.paint, 1.3)
    light = (light / np.maximum(light.max(-1, keepdims=True), 0.35)).clip(0, 1)
    tube = rim(p.ink, 0.02)
    lit = light * (tube + 0.28 * p.ink)[..., None]
    near, far = blur(lit, 0.018), blur(lit, 0.07)
    core = ((tube - 0.55) * 2).clip(0, 1)
    out = wall * (0.65 + 2.2 * far) + near * 0.75 + far * 0.7 + light * p.ink[..., None] * 0.18
    return mix(out, 0.55 + 0.45 * light, core)


def _blueprint(p: Canvas) -> Array:
    m = p.maps
    paper = mix(colour(22, 66, 140), colour(34, 88, 166), m.noise(5))
    fine = ((m.x_W[None] * 20 % 1) < 0.07) | ((m.y_H1 * 20 % 1) < 0.07)
    bold = ((m.x_W[None] * 4 % 1) < 0.022) | ((m.y_H1 * 4 % 1) < 0.022)
    line = (edges(p.back) * 1.3 * (1 - p.cover)).clip(0, 0.5) + fine * 0.12 + bold * 0.16
    line = np.maximum(line, rim(p.ink, 0.013))
    hatch = (m.hatch(0.03, 0.785) > 0.8) * p.ink * 0.4
    frame = np.minimum(np.minimum(m.x_W[None], 1 - m.x_W[None]), np.minimum(m.y_H1, 1 - m.y_H1))
    line = np.maximum(line + hatch, (np.abs(frame - 0.035) < 0.007) * 0.9)
    return mix(paper, colour(236, 244, 255), line.clip(0, 1))


def _photograph(p: Canvas) -> Array:
    m = p.maps
    out = mix(blur(p.back, 0.022), p.rgb, (blur(p.cover, 0.012) * 2.2).clip(0, 1))
    out = out * out * (3 - 2 * out) * 0.75 + out * 0.25  # film's S curve
    out = out * (1.06 - m.vignette() * 0.95)[..., None]
    out += blur((out - 0.7).clip(0, 1), 0.04) * 0.9
    return out + (m.grain(p.rng) - 0.5)[..., None] * 0.17


def _vintage(p: Canvas) -> Array:
    m = p.maps
    soft = blur(p.rgb, 0.006)
    out = mix(soft, ramp(soft @ LUMA, (52, 34, 26), (176, 132, 88), (250, 232, 196)), 0.62)
    out = out * (1.08 - m.vignette()[..., None] * 1.1) * 0.86 + colour(40, 28, 14)
    specks = m.grain(p.rng, 90) > 0.93
    scratches = np.roll(m.hatch(0.31, 1.57), int(p.rng.random() * m.size), 1) > 0.9995
    out = out + ((specks | scratches) * np.float32(0.25))[..., None] + (m.grain(p.rng) - 0.5)[..., None] * 0.14
    edge = np.minimum(np.minimum(m.x_W[None], 1 - m.x_W[None]), np.minimum(m.y_H1, (1 - m.y_H1) - 0.06))
    return mix(colour(244, 236, 218), out, ((edge - 0.035) * 200).clip(0, 1))


def _stained(p: Canvas) -> Array:
    m = p.maps
    labels, border = m.cells(13, 0.95)
    glass = vivid(means(p, labels, 0.5), 1.55) * 1.12
    glow = 1.18 - m.vignette()[..., None] * 0.9
    glass = glass * glow * (0.86 + 0.28 * m.noise(40))[..., None]
    lead = (1.25 - border * 9).clip(0, 1)
    lead = np.where(p.cover > 0.5, lead * 0.5, lead)
    lead = np.maximum(lead, rim(p.ink, 0.013))
    return mix(glass, colour(16, 14, 18), lead)


def _stitch(p: Canvas) -> Array:
    m, n = p.maps, 40
    image = Image.fromarray((p.rgb.clip(0, 1) * 255).astype(np.uint8)).resize((n, n), Image.Resampling.BOX)
    cells = np.floor(vivid(_float(image), 1.2).clip(0, 1) * 7 + 0.5) / 7
    k = (m.x_W * n).astype(np.int64)
    u, v = (m.x_W * n % 1)[None], (m.y_H1 * n) % 1
    first, second = 1 - np.abs(u - v) * 2.3, 1 - np.abs(u + v - 1) * 2.3
    thread = np.maximum(first, second).clip(0, 1)
    linen = colour(238, 228, 206) * (0.9 + 0.1 * m.hatch(1 / n, 0.0)[..., None])
    stitches = cells[k[:, None], k[None]] * (0.62 + 0.5 * thread)[..., None]
    return mix(linen, stitches, (thread * 2.6).clip(0, 1))


@_cached
def _gouge_lines(m: Maps) -> Array:
    return 0.5 + 0.5 * np.sin((m.y_H1 + 0.03 * np.sin(m.x_W[None] * 9) + 0.03 * m.noise(5)) * 6.283 / 0.034)


def _woodcut(p: Canvas) -> Array:
    m = p.maps
    tone = blur(p.back, 0.008) @ LUMA
    black = ((_gouge_lines(m) * 0.85 + 0.08) > tone * 1.15).astype(np.float32)
    paper = colour(242, 232, 208)
    sheet = mix(paper, colour(28, 24, 26), black)
    shape = (blur(p.cover, 0.02) * 4).clip(0, 1)
    sheet = mix(sheet, paper, shape)  # a cleared halo around the objects
    gouges = (m.hatch(0.03, 0.9) > 0.9 + 0.1 * m.noise(7)) * p.ink
    print_ = mix(colour(28, 24, 26), vivid(p.paint, 1.1), 1 - rim(p.cover, 0.014))
    sheet = mix(sheet, print_, (p.cover * 1.4 + rim(p.cover, 0.014)).clip(0, 1))
    return mix(sheet, paper, gouges * 0.9)


@_cached
def _halftone(m: Maps, pitch: float) -> Array:
    a, b = m.x_W[None] + m.y_H1, m.x_W[None] - m.y_H1
    return 0.5 + 0.25 * (np.cos(a / pitch * 6.283) + np.cos(b / pitch * 6.283))


def _comic(p: Canvas) -> Array:
    m = p.maps
    flat = np.floor(vivid(blur(p.rgb, 0.004), 1.5).clip(0, 1) * 3.99 + 0.3) / 4 + 0.08
    dark = 1 - (p.rgb @ LUMA)
    dots = ((_halftone(m, 0.045) * 0.9 + 0.1) < dark * 0.75) * np.float32(0.28) * (1 - 0.6 * p.cover)
    out = mix(flat, p.rgb, p.cover * 0.75) * (1 - dots[..., None])
    line = np.maximum(rim(p.cover, 0.02) * 1.2, rim(p.ink, 0.009) * 0.8)
    line = np.maximum(line, ((edges(p.back) - 0.12) * 3 * (1 - p.cover)).clip(0, 1))
    out = mix(out, colour(14, 12, 18), line.clip(0, 1))
    frame = np.minimum(np.minimum(m.x_W[None], 1 - m.x_W[None]), np.minimum(m.y_H1, 1 - m.y_H1))
    out = np.where((frame < 0.05)[..., None], colour(14, 12, 18), out)
    return np.where((frame < 0.032)[..., None], colour(255, 253, 244), out)


def _low_poly(p: Canvas) -> Array:
    return vivid(means(p, p.maps.triangles(13), 0.42), 1.15) * 1.04


def _pop(p: Canvas) -> Array:
    m = p.maps
    duos = (
        (255, 220, 0, 255, 60, 140),
        (0, 200, 230, 255, 240, 90),
        (255, 120, 40, 120, 40, 200),
        (140, 230, 60, 20, 110, 230),
    )
    r = duos[int(p.rng.random() * len(duos))]
    tone = np.floor((p.back @ LUMA) * 3.99) / 3
    angle = np.arctan2(m.y_H1 - 0.5, m.x_W[None] - 0.5)
    rays = (np.sin(angle * 14) > 0) * np.float32(0.16)
    sheet = ramp(tone - rays, r[3:], r[:3], (255, 255, 245))
    sheet = np.where(((_halftone(m, 0.06) > 0.62) & (tone < 0.8))[..., None], sheet * 0.78, sheet)
    shift = max(1, round(0.022 * m.size))
    print_ = np.roll(p.ink, (shift, shift), (0, 1)) * (1 - p.cover)
    sheet = mix(sheet, colour(20, 16, 30), (blur(p.cover, 0.014) * 3).clip(0, 1))
    sheet = mix(sheet, colour(20, 16, 30), print_)
    body = mix(colour(255, 255, 250), vivid(p.paint, 1.4), p.ink)
    return mix(sheet, body, p.cover)


def _mosaic(p: Canvas) -> Array:
    labels, border = p.maps.cells(30, 0.45)
    tiles = vivid(means(p, labels, 0.36), 1.15)
    grout = (1.2 - border * 4.2).clip(0, 1)
    grout = np.maximum(grout * 0.8, rim(p.ink, 0.008) * 0.9)
    return mix(tiles, colour(206, 198, 184) * (0.6 if p.rng.random() < 0.5 else 1.0), grout)


def _chalk(p: Canvas) -> Array:
    m = p.maps
    board = mix(colour(30, 52, 44), colour(54, 76, 66), m.noise(4) * m.noise(11))
    rough = (m.grain(p.rng) * 1.5 - 0.25).clip(0.1, 1)
    sketch = (edges(p.back) * 1.2 * (1 - p.cover)).clip(0, 0.55)
    board = mix(board, mix(vivid(p.back, 0.7), np.ones_like(board), 0.4), sketch * rough)
    stick = mix(vivid(p.paint, 1.1), np.ones_like(board), 0.22)
    fill = p.ink * (0.5 + 0.5 * (m.hatch(0.024, 0.75) > 0.35)) * (rough * 0.4 + 0.6)
    board = mix(board, stick, fill * 0.85)
    return mix(board, mix(stick, np.ones_like(board), 0.55), rim(p.ink, 0.013) * rough)


def _paper(p: Canvas) -> Array:
    m = p.maps
    levels = 5
    tone = blur(p.back, 0.014)
    step = np.floor((tone @ LUMA) * levels)
    layer = means(p, (step * 40 + 1).astype(np.int64) + (m.cells(3)[0] % 7))
    under = mix(layer, p.back, 0.35)
    d = max(1, round(0.014 * m.size))
    height = blur(step / levels, 0.006)
    under = under * (1 - ((height - np.roll(height, (-d, -d), (0, 1))) * 1.2).clip(-0.15, 0.5)[..., None])
    shadow = blur(np.roll(p.cover, (2 * d, 2 * d), (0, 1)), 0.012)
    under = mix(under, under * 0.35, shadow * 0.9)
    inner = blur(np.roll(p.ink, (d, d), (0, 1)), 0.008) * (p.cover - p.ink).clip(0, 1)
    top = mix(p.paint, p.paint * 0.55, inner)
    out = mix(under, top, p.cover)
    white = ((blur(p.cover, 0.01) * 5).clip(0, 1) - p.cover).clip(0, 1)
    out = mix(out, colour(255, 252, 246), white * 0.9)
    return out * (0.95 + 0.1 * m.grain(p.rng))[..., None]


def _points(p: Canvas) -> Array:
    m = p.maps
    labels, border = m.cells(44, 0.8)
    dots = vivid(means(p, labels, 0.5), 1.4)
    n = int(labels.max()) + 1
    tint = (_unit(3 * n, 9).reshape(n, 3)[labels] - 0.5) * 0.26
    round_ = (border * 5).clip(0, 1)
    return mix(colour(246, 238, 218), dots + tint, 0.3 + 0.7 * round_)


def _cubist(p: Canvas) -> Array:
    m = p.maps
    labels, border = m.cells(6, 0.95)
    n = int(labels.max()) + 1
    shift = ((_unit(2 * n, 21).reshape(n, 2) - 0.5) * 0.085 * m.size)[labels]
    grow = 1 + (_unit(n, 22)[labels] - 0.5) * 0.16
    centre = m.size / 2
    rows = np.arange(m.size, dtype=np.float32)
    y = ((rows[:, None] - centre) * grow + centre + shift[..., 0]).clip(0, m.size - 1).astype(np.int64)
    x = ((rows[None] - centre) * grow + centre + shift[..., 1]).clip(0, m.size - 1).astype(np.int64)
    out = p.rgb[y, x]
    angle = (_unit(n, 23) * 6.283)[labels]
    slope = (np.cos(angle) * (m.x_W[None] - 0.5) + np.sin(angle) * (m.y_H1 - 0.5)) * 2.6
    across = (slope * 1.5 % 1 - 0.5) * 0.34
    muted = mix(out, ramp(out @ LUMA, (40, 34, 40), (150, 116, 80), (240, 224, 190)), 0.35)
    muted = mix(muted, out, p.cover[y, x] * 0.7) * (1 + across[..., None])
    return mix(muted, colour(26, 22, 24), (1.1 - border * 14).clip(0, 0.9))


def _glitch(p: Canvas) -> Array:
    m = p.maps
    split = max(1, round(0.028 * m.size))
    out = np.stack([np.roll(p.rgb[..., 0], split, 1), p.rgb[..., 1], np.roll(p.rgb[..., 2], -split, 1)], -1)
    for _ in range(4):
        y, h = p.rng.random(), 0.02 + 0.06 * p.rng.random()
        a, b = int(y * m.size), int((y + h) * m.size)
        out[a:b] = np.roll(out[a:b], int((p.rng.random() - 0.5) * 0.36 * m.size), 1)
        if p.rng.random() < 0.4:
            out[a : (a + b) // 2] = vivid(1 - out[a : (a + b) // 2], 1.4)
    lines = 0.86 + 0.2 * ((m.y_H1 * 64 % 1) > 0.4)
    return out * lines[..., None] + (m.grain(p.rng, 70) - 0.5)[..., None] * 0.14


def _vapor(p: Canvas) -> Array:
    m = p.maps
    tone = blur(p.back, 0.004) @ LUMA
    sky = ramp(tone * 0.65 + (1 - m.y_H1) * 0.35, (38, 10, 84), (214, 50, 170), (255, 150, 180), (120, 240, 250))
    sun = np.hypot(m.x_W[None] - 0.5, m.y_H1 - 0.42)
    bars = (m.y_H1 < 0.4) | ((m.y_H1 * 22 % 1) > 0.4)
    disc = ((0.33 - sun) * 90).clip(0, 1) * bars
    sun_rgb = ramp(
        np.broadcast_to((m.y_H1 - 0.1) / 0.65, disc.shape).astype(np.float32), (255, 236, 120), (255, 70, 150)
    )
    sky = mix(sky, sun_rgb, disc * 0.8)
    depth = (m.y_H1 - 0.68).clip(0.004, 1)
    grid = ((1 / depth * 0.32 % 1) < 0.13) | (np.abs(((m.x_W[None] - 0.5) / depth * 0.55 + 0.5) % 1 - 0.5) < 0.045)
    ground = np.where(grid[..., None], colour(90, 250, 255), colour(30, 8, 66))
    sky = np.where(m.y_H1[..., None] > 0.69, mix(ground.astype(np.float32), sky, 0.25), sky)
    d = max(1, round(0.02 * m.size))
    cyan = np.roll(p.cover, -d, 1) * (1 - p.cover)
    pink = np.roll(p.cover, d, 1) * (1 - p.cover)
    sky = mix(mix(sky, colour(40, 240, 250), cyan), colour(255, 40, 160), pink)
    return mix(sky, vivid(p.rgb, 1.2), p.cover) * (0.94 + 0.08 * ((m.y_H1 * 80 % 1) > 0.5))[..., None]


def _clay(p: Canvas) -> Array:
    m = p.maps
    d = max(1, round(0.016 * m.size))
    smooth = mix(blur(p.back, 0.014), mix(blur(p.paint, 0.004), p.rgb, 0.3), p.cover)
    height = blur(p.cover * 0.5 + p.ink * 0.5, 0.022) + (m.noise(26, 4) - 0.5) * 0.07 + (smooth @ LUMA) * 0.12
    slope = np.roll(height, (-d, -d), (0, 1)) - np.roll(height, (d, d), (0, 1))
    shadow = blur(np.roll(p.cover, (3 * d, 2 * d), (0, 1)), 0.03) * (1 - p.cover)
    out = vivid(smooth, 1.12) * (1 + slope * 0.95 - shadow * 0.55)[..., None]
    return out + (slope - 0.42).clip(0, 1)[..., None] * 0.9


def _crayon(p: Canvas) -> Array:
    m = p.maps
    strokes = m.strokes(2400, 0.16, 0.02, 0.16, 0.8)
    flat = means(p, np.where(p.classes > 0, strokes + 5000, strokes), 0.25)
    wax = vivid(flat, 1.45) * 0.95 + 0.05
    tooth = m.grain(p.rng) * 0.8 + m.hatch(0.018, 0.75) * 0.45
    laid = ((tooth - 0.34 + 0.22 * p.cover) * 4).clip(0.05, 1)
    out = mix(colour(252, 249, 240), wax, laid)
    return mix(out, vivid(p.paint, 1.2) * 0.4, rim(p.ink, 0.016) * (tooth * 1.6).clip(0, 1))


@_cached
def _wood_grain(m: Maps) -> Array:
    return np.sin((m.y_H1 + 0.02 * m.noise(4)) * 190) * m.noise(30)


def _ukiyo(p: Canvas) -> Array:
    m = p.maps
    tone = blur(p.back, 0.01)
    flat = np.floor(tone * 4.99) / 4.4
    paper = colour(240, 222, 182)
    sheet = mix(flat * 0.82 + 0.1, paper, 0.42) * (paper / paper.max())
    fade = ((0.26 - m.y_H1) * 4).clip(0, 1) * np.ones_like(m.x_W)[None]
    sheet = mix(sheet, colour(36, 74, 122), fade * 0.75)  # the printer's bokashi
    line = ((edges(tone) - 0.03) * 5).clip(0, 1) * (1 - p.cover)
    body = mix(p.paint, paper, 0.16)
    sheet = mix(sheet, body, p.cover)
    sheet = mix(sheet, colour(30, 38, 66), np.maximum(line * 0.8, rim(p.ink, 0.011)))
    sheet = sheet * (1 + 0.06 * _wood_grain(m)[..., None])
    stamp = (m.x_W[None] > 0.88) & (m.x_W[None] < 0.95) & (m.y_H1 > 0.06) & (m.y_H1 < 0.2)
    return np.where(stamp[..., None], mix(sheet, colour(196, 40, 36), 0.85), sheet)


def _graffiti(p: Canvas) -> Array:
    m = p.maps
    tone, mortar = m.bricks()
    brick = mix(colour(178, 110, 88), colour(132, 74, 62), tone)
    brick = mix(brick, colour(196, 186, 176), mortar)
    mist = (blur(p.cover, 0.09) * 1.9 - 0.1 + (m.noise(12) - 0.5) * 0.5).clip(0, 1)
    out = mix(brick, vivid(p.back, 1.4), 0.35 + 0.5 * mist)
    drips = np.zeros_like(p.cover)
    for _ in range(7):
        x = int(p.rng.random() * m.size)
        w = max(1, round(0.014 * m.size))
        run = np.maximum.accumulate(p.ink[:, x : x + w], 0)
        ends = np.cumsum(p.ink[:, x : x + w] < 0.5, 0) * (run > 0.5)
        drips[:, x : x + w] = np.maximum(drips[:, x : x + w], run * (ends < 0.12 * m.size))
    paint = vivid(p.paint, 1.35)
    out = mix(out, colour(250, 250, 246), ((blur(p.cover, 0.016) * 4).clip(0, 1)))
    out = mix(out, blur(paint, 0.004), p.cover)
    out = mix(out, colour(18, 16, 22), rim(p.ink, 0.018))
    near = np.maximum.accumulate(paint * p.ink[..., None], 0)
    out = mix(out, near, drips * (1 - p.cover) * 0.9)
    return out * (1 - 0.2 * mortar[..., None]) * (0.9 + 0.14 * tone[..., None])


MEDIA: dict[str, Callable[[Canvas], Array]] = {
    "oil painting": _oil,
    "watercolour": _watercolour,
    "pencil sketch": _pencil,
    "charcoal": _charcoal,
    "ink": _ink,
    "pixel art": _pixel,
    "neon sign": _neon,
    "blueprint": _blueprint,
    "photograph": _photograph,
    "vintage photograph": _vintage,
    "stained glass": _stained,
    "cross-stitch": _stitch,
    "woodcut": _woodcut,
    "comic": _comic,
    "low poly": _low_poly,
    "pop art": _pop,
    "mosaic": _mosaic,
    "chalk": _chalk,
    "paper cut-out": _paper,
    "pointillism": _points,
    "cubism": _cubist,
    "glitch": _glitch,
    "vaporwave": _vapor,
    "clay": _clay,
    "crayon": _crayon,
    "ukiyo-e": _ukiyo,
    "graffiti": _graffiti,
}


# --- lights ----------------------------------------------------------------------------------------------------------
# `light_back` changes the place before the objects stand in it; `light_all` then grades the whole image.


def light_back(light: str, back_HWC: Array, m: Maps, rng: random.Random) -> Array:
    """Light the place [H, W, C]: its sky, its sun or moon."""
    x, y = m.x_W[None], m.y_H1
    sky = (1.25 - y * 1.6).clip(0, 1) * np.ones_like(x)
    if light in ("sunset", "dawn"):
        stops = (
            ((88, 44, 110), (244, 96, 62), (255, 204, 96))
            if light == "sunset"
            else ((150, 176, 232), (250, 190, 210), (255, 232, 196))
        )
        out = mix(back_HWC, ramp(np.broadcast_to(y * 1.5, sky.shape).astype(np.float32), *stops), sky * 0.85)
        sx, sy = 0.15 + 0.7 * rng.random(), 0.5 if light == "sunset" else 0.42
        d = np.hypot(x - sx, y - sy)
        out = mix(out, colour(255, 240, 190), ((0.1 - d) * 60).clip(0, 1))
        return out + colour(255, 150, 60) * np.exp(-d * 5)[..., None] * 0.35
    if light == "moonlight":
        sx, sy = (0.14 + 0.1 * rng.random(), 0.86 - 0.1 * rng.random())[int(rng.random() * 2)], 0.15
        d = np.hypot(x - sx, y - sy)
        night = back_HWC * (colour(70, 90, 150) * 0.9)
        stars = (m.noise(90, 6) > 0.97) * sky
        night = mix(night + stars[..., None] * 0.8, colour(250, 248, 226), ((0.085 - d) * 90).clip(0, 1))
        return night + colour(150, 176, 255) * np.exp(-d * 6)[..., None] * 0.45
    if light == "storm":
        dark = mix(vivid(back_HWC, 0.45) * 0.42, colour(60, 64, 88), sky * m.noise(7) * 0.9)
        bolt = _bolt(m, 0.15 + 0.7 * rng.random(), rng)
        return dark + colour(210, 210, 255) * (bolt + blur(bolt, 0.03) * 2.2)[..., None]
    if light == "aurora":
        dark = back_HWC * colour(70, 84, 120) * 1.1
        wave = 0.2 + 0.09 * np.sin(x * 7 + rng.random() * 6) + 0.04 * np.sin(x * 17 + 1)
        for shift, tint in ((0.0, colour(60, 255, 150)), (0.15, colour(170, 90, 255))):
            up = (wave + shift - y) / 0.26
            folds = 0.6 + 0.5 * np.sin(x * 60 + 4 * m.noise(6))
            curtain = np.where(up > 0, np.exp(-up * 2.2), np.exp(up * 14)) * folds
            dark = dark + tint * (curtain * 1.1)[..., None]
        return dark
    if light == "bokeh":
        out = blur(back_HWC, 0.03) * 0.7
        for _ in range(16):
            cx, cy, r = rng.random(), rng.random(), 0.03 + 0.06 * rng.random()
            box = m.window(cx, cy, r + 0.02)
            tint = ((255, 210, 130), (255, 150, 160), (150, 210, 255), (255, 245, 220))[int(rng.random() * 4)]
            d = np.hypot(x[:, box[1]] - cx, y[box[0]] - cy)
            disc = ((r - d) * 90).clip(0, 1) * (0.26 + 0.22 * (d > r * 0.82))
            out[box] += colour(*tint) * disc[..., None]
        return out
    if light == "studio":
        d = np.hypot((x - 0.5) * 1.0, (y - 0.5) * 0.9)
        return vivid(back_HWC, 0.75) * (1.25 * np.exp(-((d / 0.42) ** 2)) + 0.1)[..., None]
    return back_HWC


def light_all(light: str, rgb_HWC: Array, cover_HW: Array, m: Maps, rng: random.Random) -> Array:
    """Light the whole image. Objects keep more of their colour than the place does."""
    x, y = m.x_W[None], m.y_H1
    keep = 0.45 * cover_HW[..., None]
    if light == "sunset":
        return rgb_HWC * (colour(255, 214, 176) * 1.02 + keep * colour(0, 30, 60))
    if light == "dawn":
        return mix(rgb_HWC * colour(255, 232, 240), colour(255, 214, 220), (y * 0.3 * (1 - cover_HW * 0.7)))
    if light == "moonlight":
        return rgb_HWC * colour(170, 184, 236) * (0.86 + keep * 0.3)
    if light == "fog":
        fog = (0.42 + 0.4 * m.noise(5) + 0.12 * m.noise(13, 1) + 0.2 * (y - 0.5)).clip(0, 0.88) * (1 - 0.55 * cover_HW)
        return mix(vivid(rgb_HWC, 0.8), colour(222, 226, 230), fog)
    if light == "studio":
        return rgb_HWC * (1.06 + 0.14 * (0.5 - y))[..., None]
    if light == "neon":
        left = colour(255, 30, 170) * np.exp(-((x / 0.36) ** 2))[..., None]
        right = colour(0, 220, 255) * np.exp(-(((1 - x) / 0.36) ** 2))[..., None]
        edge = rim(cover_HW, 0.03)[..., None]
        return rgb_HWC * (0.42 + keep * 0.95) + (left + right) * (0.42 - keep * 0.45 + edge * 0.6)
    if light == "shadows":
        side = ((x * 0.8 + y * 0.6 - 0.62) * 5).clip(0, 1)
        blinds = ((y * 9 + x * 2.5) % 1 > 0.45) * np.float32(0.35) * (1 - cover_HW * 0.75)
        lit = (rgb_HWC - 0.5) * 1.25 + 0.5
        return vivid(lit, 0.85) * (1.12 - 0.62 * side * (1 - 0.35 * cover_HW) - blinds)[..., None]
    if light in ("rain", "storm"):
        grey = vivid(rgb_HWC, 0.75) * 0.8 * colour(216, 228, 255) if light == "rain" else rgb_HWC * (0.72 + keep * 0.4)
        fall = np.roll(_streaks(m), int(rng.random() * m.size), 1)
        return grey + (fall * (0.5 if light == "rain" else 0.3))[..., None]
    if light == "snowfall":
        pale = mix(rgb_HWC, colour(214, 226, 242), 0.26 * (1 - cover_HW * 0.6))
        return mix(pale, np.ones_like(pale), np.roll(_flakes(m), int(rng.random() * m.size), 1))
    if light == "sunbeams":
        angle = np.arctan2(y + 0.15, x + 0.15)
        beams = (np.sin(angle * 23 + rng.random() * 6) * 0.5 + np.sin(angle * 9) * 0.5).clip(0, 1)
        fade = np.exp(-np.hypot(x, y) * 1.1)
        shine = beams * fade * (0.9 - 0.45 * cover_HW) + fade * 0.16
        return rgb_HWC * 0.86 + colour(255, 236, 170) * shine[..., None]
    if light == "candlelight":
        d = np.hypot(x - 0.5, y - 0.62)
        pool = np.exp(-((d / 0.46) ** 2))
        return rgb_HWC * (colour(255, 176, 96) * (0.12 + 1.05 * pool)[..., None] + keep * colour(90, 140, 200) * 0.9)
    if light == "fireflies":
        out = rgb_HWC * (colour(120, 140, 150) * 0.95 + keep * 0.7)
        for _ in range(22):
            cx, cy, r = rng.random(), rng.random(), 0.006 + 0.01 * rng.random()
            box = m.window(cx, cy, 9 * r)
            d2 = (x[:, box[1]] - cx) ** 2 + (y[box[0]] - cy) ** 2
            spark = np.exp(-d2 / (2 * r * r)) + 0.35 * np.exp(-d2 / (18 * r * r))
            out[box] += colour(255, 244, 120) * spark[..., None]
        return out
    if light == "confetti":
        out = rgb_HWC.copy()
        tints = ((255, 70, 90), (255, 210, 60), (70, 190, 255), (110, 220, 110), (220, 110, 255))
        for k in range(56):
            cx, cy = rng.random(), rng.random()
            w, h = (0.012 + 0.016 * rng.random()), (0.008 + 0.014 * rng.random())
            a, b = max(0, int((cy - h) * m.size)), int((cy + h) * m.size) + 1
            c, d = max(0, int((cx - w) * m.size)), int((cx + w) * m.size) + 1
            out[a:b, c:d] = colour(*tints[k % 5])
        return out
    if light == "aurora":
        return rgb_HWC * (colour(200, 255, 226) * 0.85 + keep * 0.35)
    return rgb_HWC


def _bolt(m: Maps, x: float, rng: random.Random) -> Array:
    image = Image.new("L", (m.size, m.size))
    draw = ImageDraw.Draw(image)
    points = [(x * m.size, 0.0)]
    for k in range(1, 9):
        x += (rng.random() - 0.5) * 0.14
        points.append((x * m.size, k / 9 * 0.72 * m.size))
        if rng.random() < 0.4:
            branch = (x + (rng.random() - 0.5) * 0.3) * m.size
            draw.line([points[-1], (branch, points[-1][1] + 0.14 * m.size)], 170, max(1, round(0.007 * m.size)))
    draw.line(points, 255, max(1, round(0.016 * m.size)))
    return _float(image)


@_cached
def _streaks(m: Maps) -> Array:
    image = Image.new("L", (2 * m.size, 2 * m.size))
    draw = ImageDraw.Draw(image)
    for x, y, z in _unit(3 * 150, 31).reshape(150, 3):
        length = 0.08 + 0.1 * float(z)
        start = (float(x) * 2 * m.size, (float(y) * 1.1 - 0.1) * 2 * m.size)
        end = (start[0] - length * 0.3 * 2 * m.size, start[1] + length * 2 * m.size)
        draw.line([start, end], int(120 + 135 * z), max(1, round(0.011 * m.size)))
    return _float(image.resize((m.size, m.size), Image.Resampling.BOX))


@_cached
def _flakes(m: Maps) -> Array:
    image = Image.new("L", (2 * m.size, 2 * m.size))
    draw = ImageDraw.Draw(image)
    for x, y, z in _unit(3 * 110, 37).reshape(110, 3):
        r = (0.004 + 0.013 * float(z) ** 2) * 2 * m.size
        cx, cy = float(x) * 2 * m.size, float(y) * 2 * m.size
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), int(180 + 75 * z))
    return _float(image.resize((m.size, m.size), Image.Resampling.BOX))
