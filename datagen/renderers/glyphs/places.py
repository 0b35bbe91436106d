"""The places of `grammar.PLACES`, drawn as wide panoramas in unit coordinates: x 0 … `WIDTH`, y 0 … 1 downwards."""

import math
import random
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

WIDTH = 1.5
"""Panorama width over its height: an image shows a window of it, so that one place has many views."""
FLOATING = frozenset({"space", "underwater", "sky"})
"""Places without ground: objects float and cast no shadow."""

Colour = tuple[int, int, int]
Point = tuple[float, float]


class Brush:
    """Pillow's drawing calls in unit coordinates, at twice the wanted size for smooth edges where that is cheap."""

    def __init__(self, size: int, seed: str) -> None:
        self.rng = random.Random(seed)
        self._size = size
        self._scale = size * (2 if size <= 256 else 1)
        self._image = Image.new("RGB", (round(self._scale * WIDTH), self._scale))
        self._draw = ImageDraw.Draw(self._image)

    def image(self) -> NDArray[np.uint8]:
        """The panorama, uint8 [size, WIDTH · size, 3]."""
        return np.asarray(self._image.resize((round(self._size * WIDTH), self._size), Image.Resampling.BOX))

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.rng.random()

    def fade(self, top: Colour, bottom: Colour, y0: float = 0.0, y1: float = 1.0) -> None:
        """A vertical gradient over the band y0 … y1, and its last colour below."""
        a, b = round(y0 * self._scale), round(y1 * self._scale)
        ramp = np.linspace(0, 1, max(b - a, 1))[:, None, None]
        band = np.asarray(top) * (1 - ramp) + np.asarray(bottom) * ramp
        band = np.broadcast_to(band, (len(ramp), self._image.width, 3)).astype(np.uint8)
        self._draw.rectangle((0, b, self._image.width, self._scale), fill=bottom)
        self._image.paste(Image.fromarray(band), (0, a))

    def polygon(self, points: list[Point], colour: Colour) -> None:
        self._draw.polygon([(x * self._scale, y * self._scale) for x, y in points], fill=colour)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        s = self._scale
        self._draw.rectangle((x0 * s, y0 * s, max(x1 * s - 1, x0 * s), max(y1 * s - 1, y0 * s)), fill=colour)

    def oval(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        s = self._scale
        self._draw.ellipse(((x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s), fill=colour)

    def line(self, points: list[Point], width: float, colour: Colour) -> None:
        s = self._scale
        self._draw.line([(x * s, y * s) for x, y in points], fill=colour, width=max(1, round(width * s)))

    def ridge(self, y: float, height: float, step: float, colour: Colour, snow: Colour | None = None) -> None:
        """Mountains: peaks `height` above `y`, about `step` apart, with snow caps if so coloured."""
        x = -step * self.rng.random()
        points: list[Point] = [(-0.1, 1.0), (-0.1, y)]
        peaks: list[Point] = []
        while x < WIDTH + step:
            peaks.append((x, y - height * self.between(0.55, 1.0)))
            points += [(x - step / 2, y - height * self.between(0.0, 0.3)), peaks[-1]]
            x += step * self.between(0.8, 1.2)
        self.polygon([*points, (WIDTH + 0.1, y), (WIDTH + 0.1, 1.0)], colour)
        for px, py in peaks if snow else ():
            d = (y - py) * 0.3
            cap = ((0, 0), (-0.75, 1), (-0.3, 0.7), (0, 1.1), (0.35, 0.7), (0.75, 1))
            self.polygon([(px + d * across, py + d * down) for across, down in cap], snow or colour)

    def hills(self, y: float, height: float, length: float, colour: Colour) -> None:
        phase, second = self.between(0, 6.3), self.between(0, 6.3)
        xs = [i * WIDTH / 60 for i in range(61)]
        crest = [
            (x, y - height * (0.6 * math.sin(x / length * 6.3 + phase) + 0.4 * math.sin(x / length * 13.7 + second)))
            for x in xs
        ]
        self.polygon([*crest, (WIDTH, 1.0), (0.0, 1.0)], colour)

    def pine(self, x: float, base: float, height: float, colour: Colour) -> None:
        self.box(x - height * 0.03, base - height * 0.2, x + height * 0.03, base, (74, 52, 38))
        for k in range(3):
            top, half = base - height * (1 - k * 0.24), height * (0.16 + 0.06 * k)
            self.polygon([(x, top), (x - half, top + height * 0.38), (x + half, top + height * 0.38)], colour)

    def puff(self, x: float, y: float, size: float, colour: Colour) -> None:
        """A cloud."""
        for dx, dy, r in ((-0.9, 0.15, 0.5), (-0.3, -0.2, 0.65), (0.4, -0.1, 0.6), (0.95, 0.2, 0.42), (0.0, 0.25, 0.6)):
            self.oval(x + dx * size, y + dy * size, r * size, r * size * 0.75, colour)

    def dots(self, number: int, y0: float, y1: float, radius: tuple[float, float], colours: list[Colour]) -> None:
        for _ in range(number):
            r = self.between(*radius)
            self.oval(self.between(0, WIDTH), self.between(y0, y1), r, r, self.rng.choice(colours))

    def tiles(self, y0: float, y1: float, side: float, first: Colour, second: Colour) -> None:
        for row in range(math.ceil((y1 - y0) / side)):
            for column in range(math.ceil(WIDTH / side)):
                x, y = column * side, y0 + row * side
                self.box(x, y, x + side, min(y + side, y1), first if (row + column) % 2 else second)

    def floor(self, y0: float, first: Colour, second: Colour) -> None:
        """A chequered floor in perspective below y0."""
        rows = [y0 + (1.0 - y0) * (k / 6) ** 1.6 for k in range(7)]
        mid = WIDTH / 2
        for k in range(6):
            near, far = 0.25 + (rows[k + 1] - y0) * 1.6, 0.25 + (rows[k] - y0) * 1.6
            for j in range(-12, 12):
                quad = [(mid + j * 0.32 * far, rows[k]), (mid + (j + 1) * 0.32 * far, rows[k])]
                quad += [(mid + (j + 1) * 0.32 * near, rows[k + 1]), (mid + j * 0.32 * near, rows[k + 1])]
                self.polygon(quad, first if (j + k) % 2 else second)


def _forest(b: Brush) -> None:
    b.fade((196, 222, 205), (150, 190, 160), 0, 0.7)
    b.fade((78, 110, 58), (48, 74, 40), 0.68, 1)
    for low, high, base, colour in ((0.4, 0.5, 0.7, (112, 156, 128)), (0.55, 0.7, 0.76, (62, 112, 80))):
        for k in range(16):
            b.pine((k + b.between(-0.3, 0.3)) * 0.1, base, b.between(low, high), colour)
    for k in range(6):
        b.pine((k + b.between(-0.3, 0.3)) * 0.3, 0.86, b.between(0.75, 0.95), (28, 70, 46))


def _beach(b: Brush) -> None:
    b.fade((96, 182, 235), (202, 236, 250), 0, 0.48)
    b.fade((20, 120, 170), (80, 200, 205), 0.46, 0.7)
    b.puff(b.between(0.2, 1.3), 0.14, 0.1, (250, 252, 255))
    b.hills(0.7, 0.012, 0.6, (240, 250, 245))
    b.hills(0.72, 0.012, 0.6, (236, 212, 158))
    b.dots(120, 0.75, 1, (0.003, 0.006), [(218, 190, 132), (250, 232, 186)])
    x = b.between(0.1, 1.4)
    b.line([(x, 0.78), (x + 0.03, 0.5), (x + 0.09, 0.3)], 0.028, (122, 88, 56))
    for angle in (-2.9, -2.3, -1.4, -0.7, -0.1, 0.5):
        middle = (x + 0.09 + 0.12 * math.cos(angle), 0.27 + 0.13 * math.sin(angle))
        tip = (x + 0.09 + 0.24 * math.cos(angle), 0.3 + 0.14 * math.sin(angle) + 0.06)
        b.polygon([(x + 0.09, 0.29), middle, tip], (44, 128, 70))


def _city(b: Brush) -> None:
    b.fade((142, 176, 214), (236, 214, 196), 0, 0.8)
    for low, high, colour, pane in (
        (0.35, 0.6, (132, 146, 172), (170, 182, 200)),
        (0.2, 0.5, (74, 84, 112), (250, 214, 120)),
    ):
        x = -0.05
        while x < WIDTH:
            w, h = b.between(0.1, 0.17), b.between(low, high)
            b.box(x, 0.84 - h, x + w, 0.84, colour)
            for row in range(int(h / 0.055)):
                for column in range(3):
                    if b.rng.random() < 0.6:
                        px, py = x + w * (0.14 + 0.29 * column), 0.86 - h + row * 0.055
                        b.box(px, py, px + w * 0.16, py + 0.026, pane)
            x += w + b.between(0.0, 0.03)
    b.fade((92, 92, 98), (60, 60, 66), 0.84, 1)
    for k in range(7):
        b.box(0.05 + k * 0.24, 0.92, 0.17 + k * 0.24, 0.935, (240, 226, 160))


def _desert(b: Brush) -> None:
    b.fade((92, 160, 220), (250, 224, 170), 0, 0.6)
    b.oval(b.between(0.2, 1.3), 0.16, 0.07, 0.07, (255, 246, 200))
    for y, height, colour in ((0.58, 0.06, (232, 180, 104)), (0.7, 0.06, (216, 154, 78)), (0.84, 0.05, (190, 124, 58))):
        b.hills(y, height, b.between(0.9, 1.4), colour)


def _space(b: Brush) -> None:
    b.fade((10, 8, 30), (34, 14, 58))
    for colour in ((44, 24, 84), (70, 26, 92), (26, 44, 100)):
        for _ in range(5):
            b.oval(b.between(0, WIDTH), b.between(0.1, 0.9), b.between(0.08, 0.3), b.between(0.04, 0.1), colour)
    b.dots(220, 0, 1, (0.002, 0.005), [(255, 255, 255), (200, 214, 255), (255, 236, 200)])
    for reach, y in ((0.14, 0.16), (0.07, 0.8)):
        x = b.between(0.2, 1.3)
        body = b.rng.choice([(214, 120, 80), (110, 170, 200), (190, 160, 120)])
        b.oval(x, y, reach, reach, body)
        b.oval(x - reach * 0.2, y - reach * 0.2, reach * 0.7, reach * 0.7, tuple(min(255, c + 26) for c in body))  # type: ignore[arg-type]
        b.line([(x - reach * 1.7, y + reach * 0.35), (x + reach * 1.7, y - reach * 0.35)], 0.014, (230, 210, 170))


def _underwater(b: Brush) -> None:
    b.fade((64, 186, 214), (8, 44, 96))
    for k in range(6):
        x = k * 0.28 + b.between(-0.05, 0.05)
        b.polygon([(x, 0), (x + 0.07, 0), (x - 0.1, 0.62), (x - 0.26, 0.62)], (76, 186, 212))
    b.hills(0.88, 0.03, 0.8, (196, 176, 120))
    for colour in ((228, 96, 110), (240, 150, 70), (170, 90, 190)):
        for _ in range(3):
            x = b.between(0, WIDTH)
            for dx in (-0.035, 0.0, 0.035):
                b.line([(x, 0.97), (x + dx, b.between(0.78, 0.88))], 0.018, colour)
    for _ in range(9):
        x = b.between(0, WIDTH)
        weed = [(x + 0.02 * math.sin(k * 1.4), 0.97 - k * 0.045) for k in range(7)]
        b.line(weed, 0.016, (24, 120, 84))
    b.dots(30, 0.05, 0.8, (0.006, 0.016), [(190, 236, 246), (150, 220, 240)])


def _snowy_mountains(b: Brush) -> None:
    b.fade((104, 158, 216), (222, 236, 248), 0, 0.7)
    b.ridge(0.66, 0.34, 0.36, (136, 156, 186), (250, 252, 255))
    b.ridge(0.78, 0.36, 0.44, (92, 112, 146), (255, 255, 255))
    b.fade((244, 248, 255), (206, 220, 238), 0.78, 1)
    for _ in range(12):
        b.pine(b.between(0, WIDTH), b.between(0.78, 0.84), b.between(0.1, 0.16), (52, 84, 84))


def _kitchen(b: Brush) -> None:
    b.fade((240, 232, 216), (226, 214, 194))
    for row in range(5):
        for column in range(16):
            b.box(column * 0.1 + 0.006, 0.26 + row * 0.09, column * 0.1 + 0.094, 0.342 + row * 0.09, (206, 228, 226))
    for k in range(4):
        x = k * 0.4 + 0.02
        b.box(x, 0, x + 0.36, 0.22, (158, 108, 68))
        b.box(x + 0.02, 0.02, x + 0.17, 0.2, (184, 132, 86))
        b.box(x + 0.19, 0.02, x + 0.34, 0.2, (184, 132, 86))
    for _ in range(5):
        x = b.between(0, WIDTH)
        b.line([(x, 0.22), (x, 0.34)], 0.01, (90, 90, 96))
        b.oval(x, 0.38, 0.035, 0.045, (120, 122, 130))
    b.box(0, 0.72, WIDTH, 0.8, (238, 238, 236))
    b.fade((150, 104, 66), (112, 76, 48), 0.8, 1)
    for k in range(5):
        b.box(k * 0.32 + 0.02, 0.83, k * 0.32 + 0.3, 1.0, (172, 122, 78))


def _library(b: Brush) -> None:
    b.fade((74, 46, 30), (54, 32, 22))
    spines = [(150, 44, 40), (38, 84, 70), (44, 62, 110), (176, 134, 60), (108, 60, 92), (196, 180, 150), (84, 84, 88)]
    for shelf in range(4):
        y = 0.03 + shelf * 0.21
        x = 0.0
        while x < WIDTH:
            w = b.between(0.022, 0.048)
            b.box(x, y + 0.17 - b.between(0.12, 0.165), x + w * 0.92, y + 0.17, b.rng.choice(spines))
            x += w
        b.box(0, y + 0.17, WIDTH, y + 0.2, (126, 82, 50))
    b.fade((132, 74, 50), (90, 46, 32), 0.86, 1)


def _meadow(b: Brush) -> None:
    b.fade((112, 188, 240), (216, 240, 250), 0, 0.6)
    for _ in range(3):
        b.puff(b.between(0, WIDTH), b.between(0.08, 0.26), b.between(0.06, 0.1), (255, 255, 255))
    b.hills(0.56, 0.05, 0.9, (142, 198, 96))
    b.hills(0.68, 0.04, 1.2, (106, 178, 70))
    for _ in range(170):
        y = 0.68 + 0.32 * b.rng.random() ** 0.8
        r = 0.004 + (y - 0.66) * 0.035
        colour = b.rng.choice([(255, 255, 255), (250, 216, 70), (240, 110, 140), (190, 120, 220), (236, 80, 60)])
        b.oval(b.between(0, WIDTH), y, r, r, colour)


def _volcano_land(b: Brush) -> None:
    b.fade((46, 16, 24), (190, 64, 30), 0, 0.75)
    x = b.between(0.4, 1.1)
    b.polygon([(x - 0.5, 0.76), (x - 0.09, 0.24), (x + 0.09, 0.24), (x + 0.5, 0.76)], (48, 34, 38))
    b.polygon([(x - 0.07, 0.25), (x + 0.07, 0.25), (x + 0.03, 0.42), (x + 0.06, 0.6), (x - 0.04, 0.5)], (255, 132, 30))
    for k in range(4):
        b.puff(x + k * 0.07, 0.18 - k * 0.05, 0.08, (80, 60, 64))
    b.fade((56, 38, 38), (28, 20, 22), 0.75, 1)
    for _ in range(6):
        y, left = b.between(0.78, 0.97), b.between(-0.1, 1.2)
        b.line([(left + k * 0.07, y + b.between(-0.016, 0.016)) for k in range(6)], 0.02, (255, 110, 24))
    b.dots(50, 0.1, 0.8, (0.002, 0.006), [(255, 170, 60), (255, 110, 40)])


def _graveyard(b: Brush) -> None:
    b.fade((40, 44, 72), (126, 124, 142), 0, 0.72)
    x = b.between(0.1, 1.4)
    b.line([(x, 0.8), (x + 0.02, 0.3)], 0.04, (24, 22, 28))
    for dx, y, tip in ((-0.22, 0.5, 0.2), (0.2, 0.45, 0.16), (-0.12, 0.36, 0.06), (0.16, 0.34, 0.04)):
        b.line([(x + 0.01, y), (x + dx * 0.6, tip + 0.1), (x + dx, tip)], 0.016, (24, 22, 28))
    b.fade((64, 80, 66), (34, 46, 40), 0.7, 1)
    for k in range(8):
        gx, top, w = k * 0.2 + b.between(-0.04, 0.04), b.between(0.58, 0.66), 0.055
        stone = b.rng.choice([(140, 142, 150), (116, 120, 130)])
        if b.rng.random() < 0.35:
            b.box(gx - 0.012, top - 0.06, gx + 0.012, 0.78, stone)
            b.box(gx - 0.045, top - 0.02, gx + 0.045, top + 0.004, stone)
        else:
            b.oval(gx, top, w, w, stone)
            b.box(gx - w, top, gx + w, 0.78, stone)


def _theatre(b: Brush) -> None:
    b.fade((60, 10, 18), (90, 14, 24))
    for k in range(22):
        x = k * WIDTH / 22
        b.box(x, 0, x + 0.04, 0.82, (168, 24, 36))
        b.box(x + 0.012, 0, x + 0.024, 0.82, (204, 46, 54))
    for k in range(8):
        b.oval(k * 0.215, 0.0, 0.115, 0.15, (142, 16, 30))
        b.oval(k * 0.215, -0.03, 0.1, 0.13, (190, 36, 46))
    b.fade((150, 98, 56), (96, 58, 32), 0.8, 1)
    for k in range(18):
        b.line([(0.75 + (k - 9) * 0.09, 0.8), (0.75 + (k - 9) * 0.2, 1.0)], 0.005, (84, 50, 28))


def _farm(b: Brush) -> None:
    b.fade((126, 192, 236), (244, 236, 206), 0, 0.6)
    b.hills(0.58, 0.03, 1.0, (132, 168, 82))
    x = b.between(0.2, 1.2)
    barn = ((0, 0.62), (0, 0.42), (0.05, 0.33), (0.13, 0.28), (0.21, 0.33), (0.26, 0.42), (0.26, 0.62))
    b.polygon([(x + dx, y) for dx, y in barn], (178, 48, 40))
    b.box(x + 0.09, 0.46, x + 0.17, 0.62, (246, 236, 222))
    b.box(x + 0.105, 0.48, x + 0.155, 0.62, (120, 30, 28))
    b.box(x + 0.29, 0.34, x + 0.36, 0.62, (190, 194, 200))
    b.oval(x + 0.325, 0.34, 0.035, 0.035, (160, 166, 176))
    b.fade((236, 194, 84), (196, 146, 46), 0.62, 1)
    for _ in range(420):
        wx, y = b.between(0, WIDTH), b.between(0.66, 1.05)
        h = 0.03 + (y - 0.6) * 0.1
        ear = (wx + b.between(-0.012, 0.012), y - h)
        b.line([(wx, y), ear], 0.006, b.rng.choice([(250, 216, 120), (176, 128, 40), (222, 172, 66)]))


def _sea(b: Brush) -> None:
    b.fade((150, 206, 240), (232, 244, 250), 0, 0.45)
    b.puff(b.between(0.1, 1.4), 0.15, 0.09, (255, 255, 255))
    for k in range(9):
        y = 0.45 + 0.06 * k
        shade = (34 - k * 2, 124 - k * 9, 176 - k * 9)
        b.hills(y, 0.012 + 0.003 * k, 0.16 + 0.03 * k, shade)
        for _ in range(4):
            x = b.between(0, WIDTH)
            b.line([(x, y + 0.02), (x + 0.06 + 0.01 * k, y + 0.02)], 0.006, (214, 238, 246))


def _sky(b: Brush) -> None:
    b.fade((58, 140, 226), (190, 226, 250))
    for y, size, colour in ((0.25, 0.08, (226, 240, 252)), (0.5, 0.11, (240, 247, 254)), (0.9, 0.17, (255, 255, 255))):
        for _ in range(5):
            b.puff(b.between(0, WIDTH), y + b.between(-0.1, 0.06), size * b.between(0.7, 1.2), colour)


def _cave(b: Brush) -> None:
    b.fade((38, 30, 48), (66, 50, 70))
    b.oval(WIDTH / 2 + b.between(-0.2, 0.2), 0.5, 0.5, 0.42, (92, 78, 112))
    for k in range(20):
        x, h = k * 0.08, b.between(0.08, 0.4)
        b.polygon([(x - 0.06, -0.01), (x + 0.06, -0.01), (x + b.between(-0.02, 0.02), h)], (44, 34, 46))
        h = b.between(0.03, 0.16)
        b.polygon([(x - 0.06, 1), (x + 0.06, 1), (x + 0.01, 0.88 - h)], (54, 42, 52))
    for _ in range(9):
        x, y, h = b.between(0, WIDTH), b.between(0.75, 0.95), b.between(0.06, 0.14)
        tone = b.rng.choice([(110, 220, 240), (210, 130, 240), (130, 240, 190)])
        b.polygon([(x - h * 0.25, y), (x, y - h), (x + h * 0.25, y)], tone)
        b.polygon([(x, y), (x, y - h), (x + h * 0.25, y)], (236, 250, 255))
    b.box(0, 0.93, WIDTH, 1, (54, 42, 52))


def _disco(b: Brush) -> None:
    b.fade((32, 12, 56), (76, 22, 104), 0, 0.7)
    for k, tone in enumerate([(150, 50, 170), (50, 90, 180), (170, 50, 110), (50, 150, 150)] * 2):
        x = k * 0.21
        b.polygon([(x, 0), (x + 0.02, 0), (x + 0.26, 0.7), (x + 0.02, 0.7)], tone)
    colours = [(250, 60, 140), (60, 200, 250), (250, 210, 60), (140, 80, 250), (70, 230, 130)]
    for row in range(4):
        y0, y1 = 0.68 + 0.32 * (row / 4) ** 1.4, 0.68 + 0.32 * ((row + 1) / 4) ** 1.4
        for j in range(-10, 10):
            f, n = 0.12 + row * 0.05, 0.17 + row * 0.05
            quad = [(0.75 + j * f, y0), (0.75 + (j + 0.93) * f, y0), (0.75 + (j + 0.93) * n, y1), (0.75 + j * n, y1)]
            b.polygon(quad, b.rng.choice(colours))
    x = b.between(0.4, 1.1)
    b.line([(x, 0), (x, 0.08)], 0.008, (200, 200, 210))
    b.oval(x, 0.15, 0.085, 0.085, (150, 156, 180))
    for row in range(-3, 4):
        for column in range(-3, 4):
            if row * row + column * column < 11 and (row + column) % 2:
                cx, cy = x + column * 0.023, 0.15 + row * 0.023
                b.box(cx - 0.009, cy - 0.009, cx + 0.009, 0.159 + row * 0.023, (240, 244, 255))


def _art_gallery(b: Brush) -> None:
    b.fade((238, 236, 230), (222, 218, 210), 0, 0.78)
    x = b.between(0.0, 0.1)
    while x < WIDTH:
        w, h = b.between(0.22, 0.36), b.between(0.24, 0.36)
        y = 0.36 - h / 2
        b.box(x, y, x + w, y + h, (172, 128, 52))
        canvas = b.rng.choice([(70, 110, 140), (170, 90, 70), (90, 120, 80)])
        b.box(x + 0.022, y + 0.022, x + w - 0.022, y + h - 0.022, canvas)
        for _ in range(5):
            cx, cy = b.between(x + 0.07, x + w - 0.07), b.between(y + 0.07, y + h - 0.07)
            tone = b.rng.choice([(230, 190, 90), (220, 110, 90), (240, 230, 210), (50, 60, 90)])
            b.oval(cx, cy, b.between(0.015, 0.045), b.between(0.015, 0.045), tone)
        x += w + b.between(0.1, 0.16)
    b.box(0, 0.76, WIDTH, 0.785, (250, 248, 244))
    b.fade((176, 128, 84), (142, 98, 62), 0.785, 1)
    for k in range(4):
        b.line([(0, 0.82 + k * 0.05), (WIDTH, 0.82 + k * 0.05)], 0.004, (124, 84, 52))


def _canyon(b: Brush) -> None:
    b.fade((86, 166, 226), (230, 226, 206), 0, 0.6)
    for base, height, tone in ((0.62, 0.34, (216, 140, 92)), (0.78, 0.5, (186, 90, 52))):
        x = b.between(-0.2, 0)
        while x < WIDTH:
            w, top = b.between(0.18, 0.36), base - height * b.between(0.5, 1)
            b.polygon([(x, base + 0.1), (x + 0.03, top), (x + w - 0.03, top), (x + w, base + 0.1)], tone)
            for k in range(1, 7):
                y = top + k * (base - top) / 6
                stripe = (max(0, tone[0] - 34), max(0, tone[1] - 30), max(0, tone[2] - 24))
                b.box(x + 0.022, y, x + w - 0.022, y + 0.014, stripe)
            x += w + b.between(0.02, 0.22)
    b.fade((206, 126, 76), (150, 74, 42), 0.78, 1)


def _living_room(b: Brush) -> None:
    b.fade((150, 178, 160), (136, 164, 148), 0, 0.76)
    for row in range(7):
        for column in range(14):
            x, y = column * 0.12 + (row % 2) * 0.06, 0.05 + row * 0.115
            for dx, dy in ((-0.016, 0), (0.016, 0), (0, -0.016), (0, 0.016)):
                b.oval(x + dx, y + dy, 0.013, 0.013, (196, 214, 190))
            b.oval(x, y, 0.009, 0.009, (226, 176, 110))
    x = b.between(0.1, 1.0)
    b.box(x, 0.1, x + 0.34, 0.5, (246, 242, 234))
    b.box(x + 0.025, 0.125, x + 0.16, 0.475, (170, 214, 240))
    b.box(x + 0.18, 0.125, x + 0.315, 0.475, (170, 214, 240))
    b.box(0, 0.74, WIDTH, 0.785, (242, 236, 226))
    b.fade((164, 106, 66), (126, 78, 46), 0.785, 1)
    b.oval(0.75, 0.92, 0.62, 0.07, (176, 62, 62))
    b.oval(0.75, 0.92, 0.52, 0.053, (206, 150, 110))


def _moon(b: Brush) -> None:
    b.fade((6, 8, 18), (18, 20, 34), 0, 0.7)
    b.dots(130, 0, 0.6, (0.002, 0.004), [(255, 255, 255), (210, 220, 255)])
    x = b.between(0.25, 1.25)
    b.oval(x, 0.2, 0.11, 0.11, (60, 120, 200))
    b.oval(x - 0.03, 0.17, 0.055, 0.04, (90, 170, 100))
    b.oval(x + 0.04, 0.23, 0.035, 0.045, (240, 246, 250))
    b.hills(0.64, 0.025, 1.1, (150, 150, 156))
    b.hills(0.74, 0.02, 1.3, (184, 184, 188))
    for _ in range(16):
        y = b.between(0.72, 0.98)
        r = 0.02 + (y - 0.7) * 0.18
        cx = b.between(0, WIDTH)
        b.oval(cx, y, r, r * 0.34, (140, 140, 148))
        b.oval(cx, y + r * 0.08, r * 0.84, r * 0.25, (120, 120, 128))


def _circus(b: Brush) -> None:
    b.fade((250, 240, 222), (206, 40, 48), 0, 0.3)
    x = WIDTH / 2 + b.between(-0.2, 0.2)
    for k in range(24):
        left, right = k * 0.125 - 0.75, (k + 1) * 0.125 - 0.75
        tone = (206, 40, 48) if k % 2 else (250, 240, 222)
        b.polygon([(x, -0.02), (left, 0.62), (right, 0.62)], tone)
        b.box(left, 0.5, right, 0.8, tone)
    for k in range(14):
        pennant = [(k * 0.12, 0.2), (k * 0.12 + 0.1, 0.2), (k * 0.12 + 0.05, 0.3)]
        b.polygon(pennant, b.rng.choice([(250, 200, 50), (60, 150, 220), (90, 190, 90)]))
    b.line([(0, 0.2), (WIDTH, 0.2)], 0.008, (90, 60, 50))
    b.fade((226, 186, 120), (190, 142, 84), 0.78, 1)
    for k in range(7):
        b.oval(k * 0.25, 0.8, 0.12, 0.05, (208, 50, 56) if k % 2 else (246, 214, 80))
    b.fade((226, 186, 120), (190, 142, 84), 0.82, 1)


def _blossom_garden(b: Brush) -> None:
    b.fade((186, 222, 244), (250, 232, 238), 0, 0.72)
    b.fade((150, 190, 110), (108, 156, 84), 0.72, 1)
    x = b.between(0.3, 1.2)
    b.line([(x - 0.28, 0.74), (x - 0.24, 0.36)], 0.03, (196, 52, 44))
    b.line([(x + 0.28, 0.74), (x + 0.24, 0.36)], 0.03, (196, 52, 44))
    b.box(x - 0.34, 0.32, x + 0.34, 0.365, (206, 60, 48))
    b.box(x - 0.27, 0.42, x + 0.27, 0.45, (206, 60, 48))
    for k in range(4):
        tx = k * 0.45 + b.between(-0.1, 0.1)
        b.line([(tx, 0.78), (tx + 0.02, 0.5), (tx - 0.05, 0.2)], 0.035, (96, 66, 60))
        for _ in range(26):
            tone = b.rng.choice([(250, 190, 212), (244, 160, 194), (255, 222, 232)])
            b.oval(
                tx + b.between(-0.26, 0.24), b.between(0.0, 0.36), b.between(0.03, 0.065), b.between(0.03, 0.05), tone
            )
    b.dots(70, 0.4, 1, (0.006, 0.011), [(252, 200, 220), (255, 226, 236)])


def _pyramids(b: Brush) -> None:
    b.fade((120, 186, 230), (252, 232, 188), 0, 0.7)
    b.oval(b.between(0.1, 1.4), 0.13, 0.06, 0.06, (255, 240, 180))
    for x, h in ((b.between(0.05, 0.3), 0.38), (b.between(0.6, 0.85), 0.52), (b.between(1.15, 1.35), 0.34)):
        b.polygon([(x - h * 0.75, 0.74), (x, 0.74 - h), (x + h * 0.75, 0.74)], (232, 190, 112))
        b.polygon([(x + h * 0.18, 0.74), (x, 0.74 - h), (x + h * 0.75, 0.74)], (178, 128, 66))
        for k in range(1, 6):
            y = 0.74 - h + k * h / 6
            half = h * 0.75 * k / 6
            b.line([(x - half, y), (x + half, y)], 0.004, (196, 150, 82))
    b.fade((236, 200, 126), (208, 160, 84), 0.72, 1)
    b.hills(0.86, 0.02, 0.9, (220, 174, 96))


def _lake(b: Brush) -> None:
    b.fade((136, 190, 232), (240, 238, 226), 0, 0.56)
    b.ridge(0.56, 0.26, 0.4, (126, 146, 170), (240, 246, 250))
    b.hills(0.55, 0.03, 0.5, (62, 108, 82))
    b.fade((96, 160, 176), (42, 104, 140), 0.56, 1)
    for _ in range(34):
        x, y = b.between(0, WIDTH), b.between(0.58, 0.84)
        b.line([(x, y), (x + 0.05 + (y - 0.5) * 0.3, y)], 0.006, (160, 206, 214))
    b.hills(0.92, 0.02, 0.9, (104, 132, 74))
    for _ in range(30):
        x = b.between(0, WIDTH)
        b.line([(x, 0.98), (x + b.between(-0.02, 0.02), b.between(0.76, 0.88))], 0.008, (70, 106, 54))


def _arctic(b: Brush) -> None:
    b.fade((156, 200, 228), (230, 240, 246), 0, 0.6)
    b.fade((60, 130, 166), (36, 96, 136), 0.58, 0.82)
    for _ in range(6):
        x, w, h = b.between(0, WIDTH), b.between(0.1, 0.22), b.between(0.12, 0.36)
        lee = [(x - w * 0.1, 0.64 - h), (x + w * 0.5, 0.64 - h * 0.5), (x + w, 0.64)]
        b.polygon([(x - w, 0.64), (x - w * 0.5, 0.64 - h * 0.7), *lee], (240, 248, 252))
        b.polygon([*lee, (x + w * 0.1, 0.64)], (176, 212, 232))
    b.hills(0.82, 0.015, 0.5, (248, 252, 255))
    b.hills(0.92, 0.012, 0.7, (222, 236, 246))


def _jungle(b: Brush) -> None:
    b.fade((120, 180, 110), (30, 80, 46))
    greens = [(28, 96, 52), (44, 128, 62), (70, 150, 60), (20, 74, 48), (96, 170, 70)]
    for k in range(6):
        x = k * 0.28 + b.between(-0.06, 0.06)
        b.line([(x, 1), (x + b.between(-0.05, 0.05), 0)], 0.035, (70, 54, 36))
    for _ in range(46):
        above, below = ((b.between(0, WIDTH), b.between(*band)) for band in ((-0.05, 0.3), (0.82, 1.05)))
        x, y = b.rng.choice([above, below])
        angle, length = b.between(0, 6.3), b.between(0.14, 0.28)
        ax, ay = math.cos(angle), math.sin(angle)
        mid = (x + ax * length * 0.5 - ay * 0.05, y + ay * length * 0.5 + ax * 0.05)
        other = (x + ax * length * 0.5 + ay * 0.05, y + ay * length * 0.5 - ax * 0.05)
        b.polygon([(x, y), mid, (x + ax * length, y + ay * length), other], b.rng.choice(greens))
    for _ in range(6):
        x, low = b.between(0, WIDTH), b.between(0.35, 0.7)
        b.line([(x + 0.02 * math.sin(k * 1.1), low * k / 9) for k in range(10)], 0.008, (52, 110, 48))
    b.dots(14, 0.05, 0.95, (0.014, 0.024), [(230, 70, 80), (250, 180, 60), (220, 90, 190)])


def _chessboard(b: Brush) -> None:
    b.fade((112, 100, 120), (206, 196, 200), 0, 0.56)
    b.floor(0.55, (242, 236, 222), (52, 46, 52))


def _swamp(b: Brush) -> None:
    b.fade((150, 160, 122), (96, 112, 84), 0, 0.66)
    b.fade((82, 96, 58), (40, 54, 36), 0.64, 1)
    for _ in range(9):
        x = b.between(0, WIDTH)
        b.line([(x, 0), (x + b.between(-0.03, 0.03), 0.66)], b.between(0.02, 0.05), (58, 60, 46))
        for dx in (-0.07, -0.03, 0.04, 0.08):
            b.line([(x, 0.56), (x + dx, 0.72)], 0.014, (58, 60, 46))
        for k in range(3):
            b.line([(x + k * 0.03, 0), (x + k * 0.03 + 0.01, b.between(0.1, 0.34))], 0.012, (104, 122, 78))
    for _ in range(12):
        x, y = b.between(0, WIDTH), b.between(0.74, 0.98)
        b.oval(x, y, 0.06, 0.018, (104, 140, 62))
        if b.rng.random() < 0.4:
            b.oval(x, y - 0.015, 0.018, 0.014, (240, 180, 200))
    for _ in range(14):
        x = b.between(0, WIDTH)
        b.line([(x, 0.9), (x, b.between(0.6, 0.72))], 0.006, (90, 110, 60))
        b.oval(x, b.between(0.62, 0.68), 0.01, 0.03, (96, 66, 40))


PAINTERS: dict[str, Callable[[Brush], None]] = {
    "forest": _forest,
    "beach": _beach,
    "city": _city,
    "desert": _desert,
    "space": _space,
    "underwater": _underwater,
    "snowy mountains": _snowy_mountains,
    "kitchen": _kitchen,
    "library": _library,
    "meadow": _meadow,
    "volcano land": _volcano_land,
    "graveyard": _graveyard,
    "theatre": _theatre,
    "farm": _farm,
    "sea": _sea,
    "sky": _sky,
    "cave": _cave,
    "disco": _disco,
    "art gallery": _art_gallery,
    "canyon": _canyon,
    "living room": _living_room,
    "moon": _moon,
    "circus": _circus,
    "blossom garden": _blossom_garden,
    "pyramids": _pyramids,
    "lake": _lake,
    "arctic": _arctic,
    "jungle": _jungle,
    "chessboard": _chessboard,
    "swamp": _swamp,
}


def panorama(place: str, view: int, size: int) -> NDArray[np.uint8]:
    """The place as uint8 [size, WIDTH · size, 3]; `view` varies its details."""
    brush = Brush(size, f"{place} {view}")
    PAINTERS[place](brush)
    return brush.image()
