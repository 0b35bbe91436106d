"""Renderer `glyphs`: scenes of icons, drawn on the CPU without a download, for the quickstart, tests and trials.

`python -m datagen renderer=glyphs prompts=grammar`. `datagen.prompts.grammar` parses the prompt; the seed
chooses what it leaves open. Scene → place → light on the place → objects → light on all → medium.
"""

import importlib.metadata
import importlib.util
import json
import math
import random
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from core.errors import UserError
from datagen.prompts import grammar
from datagen.prompts.grammar import Scene, Thing
from datagen.prompts.icon_names import objects
from datagen.renderers.base import Renderer
from datagen.renderers.glyphs import media
from datagen.renderers.glyphs.media import Array, Canvas, Maps, colour, mix
from datagen.renderers.glyphs.places import FLOATING, panorama

PACKAGE = "fonticon-materialdesignicons7"
MIN_SIZE, MAX_SIZE = 32, 768
_CACHE_BYTES = 96 * 2**20

_PALETTE = json.loads(Path(__file__).with_name("palette.json").read_text(encoding="utf-8"))
RGB: dict[str, tuple[int, int, int]] = {name: tuple(levels) for name, levels in _PALETTE["colours"].items()}
"""Colour of the grammar → RGB levels, well apart to the eye and under most lights."""
_SIDES = {"tiny": 0.27, "small": 0.46, None: 0.66, "large": 0.82, "huge": 1.0}


V = TypeVar("V", Image.Image, NDArray[np.uint8])


class _Stamp(NamedTuple):
    """One icon at its size and angle; [h, w] in 0 … 1."""

    ink: Array
    cover: Array
    relief: Array
    halo: Array


class _Spot(NamedTuple):
    """Position of one copy of a thing, as a fraction of the image side."""

    thing: Thing
    x: float
    y: float
    side: float


class Glyphs(Renderer):
    """Renderer of the scenes that `grammar.parse` reads from prompts."""

    one_core: ClassVar[bool] = True
    batch_size: int | None = 50  # images between two ticks; they are drawn one by one

    def __init__(self, size: int = 128) -> None:
        """
        Args:
            size: the images' side in pixels.

        Raises:
            UserError: when the size is out of bounds.
        """
        if not MIN_SIZE <= size <= MAX_SIZE:
            raise UserError(
                f"glyphs: size {size} is not within {MIN_SIZE} … {MAX_SIZE}: choose a size there, such as 128"
            )
        self._size = size
        self._maps = Maps(size)
        self._cache: OrderedDict[tuple[object, ...], tuple[Any, int]] = OrderedDict()
        self._held = 0
        self.notes: list[dict[str, Any]] = []

    def load(self) -> None:
        """Locate the icon font; glyphs are read when they are drawn."""
        _font_folder()

    def find_batch_size(self) -> int:
        return 50

    def settings(self) -> Mapping[str, Any]:
        """Return name, drawing version, size and version of the font package."""
        _font_folder()
        return {"name": "glyphs", "version": 1, "size": self._size, "font": importlib.metadata.version(PACKAGE)}

    def seconds(self, num: int) -> float:
        """Estimated seconds for `num` images: about 4 ms each at 128 px, mostly proportional to the pixels."""
        return num * (0.001 + 0.003 * (self._size / 128) ** 2)

    def can_draw(self, prompt: str) -> bool:
        """Return whether the prompt names an object of the vocabulary."""
        return grammar.parse(prompt) is not None

    def render(self, prompts: list[str], seeds: list[int]) -> NDArray[np.uint8]:
        """Render N prompts with N seeds to uint8 RGB [N, size, size, 3].

        Raises:
            UserError: prompts name no object of the vocabulary (the message counts them), or the icon font is missing.
            ValueError: the numbers of seeds and prompts differ.
        """
        scenes = [grammar.parse(prompt) for prompt in prompts]
        unknown = [prompt for prompt, scene in zip(prompts, scenes, strict=True) if scene is None]
        if unknown:
            shown = "; ".join(repr(prompt) for prompt in unknown[:5])
            raise UserError(
                f"glyphs: {len(unknown)} of {len(prompts)} prompts name no object it can draw: {shown}. "
                "Drop what can_draw refuses, or use another renderer."
            )
        self.notes = [{} for _ in prompts]
        out = np.empty((len(prompts), self._size, self._size, 3), np.uint8)
        for i, (prompt, seed, scene) in enumerate(zip(prompts, seeds, scenes, strict=True)):
            if scene:
                out[i] = self._draw(scene, random.Random(f"{seed} {prompt}"))  # text seeds go through SHA-512
        return out

    def _draw(self, scene: Scene, rng: random.Random) -> NDArray[np.uint8]:
        spots = _layout(scene, rng)
        back = self._place(scene, rng)
        if scene.light:
            back = media.light_back(scene.light, back, self._maps, rng)
        nothing = np.zeros(back.shape[:2], np.float32)
        image = Canvas(back.copy(), back, np.zeros_like(back), nothing.copy(), nothing.copy(), rng, self._maps)
        for spot in spots:
            self._put(spot, scene, image)
        if scene.light:
            once = int(rng.random() * 2**53)  # the same rain falls on the scene and on its empty place
            image.rgb = media.light_all(scene.light, image.rgb, image.cover, self._maps, random.Random(once))
            if scene.medium:
                image.back = media.light_all(scene.light, back, nothing, self._maps, random.Random(once))
        rgb = image.rgb
        if scene.medium:
            for layer in (image.rgb, image.back):
                np.clip(layer, 0, 1, out=layer)
            rgb = media.MEDIA[scene.medium](image)
        return (rgb * 255 + 0.5).clip(0, 255).astype(np.uint8)

    def _place(self, scene: Scene, rng: random.Random) -> Array:
        """Draw the empty place [H, W, C], a window of its panorama; a plain backdrop if the prompt names no place."""
        m = self._maps
        if scene.place is None:
            near = colour(*_tone(scene.things[0]))
            shades = [colour(*rgb) for rgb in _PALETTE["backdrops"]]
            apart = [shade for shade in shades if abs(float((shade - near) @ media.LUMA)) > 0.22] or shades
            base = apart[int(rng.random() * len(apart))]
            turn = rng.random()
            glow = 1.1 - 0.75 * ((m.x_W[None] - 0.3 - 0.4 * turn) ** 2 + (m.y_H1 - 0.4) ** 2)
            floor = 1 - 0.13 * ((m.y_H1 - 0.74) * 30).clip(0, 1)
            return base * (glow * floor)[..., None].astype(np.float32)
        place, view = scene.place, int(rng.random() * 4)
        wide = self._keep(("place", place, view), lambda: panorama(place, view, self._size))
        left = int(rng.random() * (wide.shape[1] - self._size + 1))
        window = wide[:, left : left + self._size]
        if rng.random() < 0.5:
            window = window[:, ::-1]
        return window.astype(np.float32) * np.float32(1 / 255)

    def _put(self, spot: _Spot, scene: Scene, image: Canvas) -> None:
        """Draw one copy of a thing into the layers of the image."""
        thing, size, rgb = spot.thing, self._size, image.rgb
        stamp = self._stamp(thing, spot.side, image.rng)
        h, w = stamp.ink.shape
        top, left = round(spot.y * size - h / 2), round(spot.x * size - w / 2)
        y0, y1, x0, x1 = max(top, 0), min(top + h, size), max(left, 0), min(left + w, size)
        if y0 >= y1 or x0 >= x1:
            return
        here, cut = np.s_[y0:y1, x0:x1], np.s_[y0 - top : y1 - top, x0 - left : x1 - left]
        tone = colour(*_tone(thing))
        luma = float(tone @ media.LUMA)
        hole = mix(tone, colour(255, 252, 244), 0.8) if luma < 0.72 else tone * 0.42
        line = colour(18, 14, 22) if luma > 0.24 else colour(246, 244, 238)
        u, v = (np.arange(w, dtype=np.float32) + 0.5) / w, ((np.arange(h, dtype=np.float32) + 0.5) / h)[:, None]
        u, v = u[None, x0 - left : x1 - left] * (w / max(w, h)), v[y0 - top : y1 - top] * (h / max(w, h))
        body, alpha = self._texture(thing.look, tone, u, v, image.rng)
        a_ink, a_cover, a_halo = stamp.ink[cut], stamp.cover[cut], stamp.halo[cut]
        relief = stamp.relief[cut] - 0.5
        if scene.place not in FLOATING and top + h > 0.7 * size:
            self._shadow(rgb, spot, top + h * 0.93, w, scene.light)
        if thing.look == "glowing":
            self._glow(rgb, spot, tone)
        flat = mix(hole, body, a_ink)
        solid = flat * (1 + 0.55 * relief * (a_cover > 0.3))[..., None] + (relief.clip(0.16, 1) - 0.16)[..., None] * 0.4
        if thing.look == "glowing":
            solid = mix(solid, np.ones_like(solid), 0.1 + 0.22 * a_ink)
        region = mix(rgb[here], line, a_halo * (0.92 if alpha is None else 0.6))
        a = a_cover if alpha is None else a_cover * alpha
        rgb[here] = mix(region, solid, a)
        image.paint[here] = mix(image.paint[here], flat, a_cover)
        strength = 1 if alpha is None else (alpha * 1.3).clip(0, 1)
        image.ink[here] = image.ink[here] * (1 - a_cover) + a_ink * strength
        image.cover[here] = np.maximum(image.cover[here], a if thing.look == "cracked" else a_cover)

    def _shadow(self, rgb: Array, spot: _Spot, foot: float, width: int, light: str | None) -> None:
        m, size = self._maps, self._size
        long = 2.0 if light in ("shadows", "sunset") else 1.0
        rx, ry = 0.52 * width / size * long, 0.035 * long**0.5 + 0.02 * spot.side
        centre = spot.x + (long - 1) * 0.3 * width / size
        here = m.window(0.5, foot / size, 1.6 * ry)[0]
        across, down = (m.x_W[None] - centre) / rx, (m.y_H1[here] - foot / size) / ry
        rgb[here] *= 1 - (0.42 + 0.2 * (long > 1)) * (np.exp(-2 * across**2) * np.exp(-2 * down**2))[..., None]

    def _glow(self, rgb: Array, spot: _Spot, tone: Array) -> None:
        m = self._maps
        d2 = ((m.x_W[None] - spot.x) ** 2 + (m.y_H1 - spot.y) ** 2) / (spot.side * 0.5) ** 2
        aura = np.exp(-d2 * 1.1)
        lit = tone / max(float(tone.max()), 0.4)
        rgb *= (0.62 + 0.38 * aura)[..., None]
        rgb += (lit * 0.75 + 0.25) * (aura * 0.95)[..., None]

    def _texture(
        self, look: str | None, tone: Array, u: Array, v: Array, rng: random.Random
    ) -> tuple[Array, Array | None]:
        """Compute the colours of a thing's body over its box (u across, v down), and its opacity if it is below 1."""
        shape = (v.shape[0], u.shape[1], 3)
        other = mix(tone, colour(255, 255, 250), 0.78) if float(tone @ media.LUMA) < 0.62 else tone * 0.34
        shift = rng.random()
        if look in ("striped", "spotted", "chequered"):
            if look == "striped":
                part = ((u * 0.7 + v * 0.7) * 8 + shift) % 1 < 0.42
            elif look == "spotted":
                row = np.floor(v * 7 + shift)
                part = (((u * 7 + 0.5 * (row % 2)) % 1 - 0.5) ** 2 + ((v * 7 + shift) % 1 - 0.5) ** 2) < 0.085
            else:
                part = (np.floor(u * 7.5 + shift) + np.floor(v * 7.5)) % 2 > 0.5
            return np.where(part[..., None], other, np.broadcast_to(tone, shape)), None
        if look in ("wooden", "marble", "rusty", "icy", "cracked"):
            cloud = self._noise_at(u, v, shift, 9)
            fine = self._noise_at(u, v, shift, 40)
            if look == "wooden":
                grain = np.sin((v * 9 + cloud * 2.2 + 0.4 * np.sin(u * 5)) * 6.283)
                return tone * (0.86 + 0.2 * grain + 0.12 * fine)[..., None], None
            if look == "marble":
                vein = np.exp(-np.abs(np.sin((u + v + cloud * 1.3) * 7)) * 7)
                base = np.broadcast_to(mix(tone, colour(255, 255, 255), 0.25), shape)
                return mix(base, np.broadcast_to(tone * 0.38, shape), vein * 0.9) * (0.95 + 0.1 * fine)[..., None], None
            if look == "rusty":
                patch = ((cloud + fine * 0.5 - 0.68) * 9).clip(0, 1)
                rust = mix(np.broadcast_to(tone * 1.1, shape), np.broadcast_to(colour(84, 40, 26), shape), patch)
                return rust * (0.8 + 0.4 * fine)[..., None], None
            if look == "icy":
                facet = np.floor((u * 3 + v * 4 + cloud * 4) * 1.6) % 3 / 2
                base = np.broadcast_to(mix(tone, colour(200, 240, 255), 0.4), shape)
                return mix(base, np.ones(shape, np.float32), facet * 0.6), None
            crack = np.minimum(np.abs(cloud - 0.5), np.abs(self._noise_at(u, v, shift + 0.4, 9) - 0.55))
            return np.broadcast_to(tone, shape), ((crack - 0.012) * 60).clip(0.12, 1)
        if look in ("golden", "chrome"):
            band = 0.5 + 0.5 * np.sin((v * 1.5 + u * 0.5 + shift) * 6.283)
            shine = np.exp(-(((u * 0.6 + v - 0.2 - 0.8 * shift) % 0.8 - 0.4) ** 2) * 90)
            light = 0.5 + 0.62 * band if look == "golden" else 0.34 + 0.8 * (band > 0.45) + 0.2 * band
            return tone * light[..., None] + 0.55 * shine[..., None], None
        if look == "knitted":
            wave = np.abs((u * 13) % 1 - 0.5)
            rows = (v * 15 - wave * 1.5) % 1
            light = 0.62 + 0.55 * np.minimum(rows, 1 - rows) * 2 * (0.6 + 0.8 * np.abs(wave * 2 - 0.4))
            return tone * light[..., None], None
        if look == "transparent":
            gleam = np.exp(-(((u + v * 0.5 - 0.5) % 0.75 - 0.3) ** 2) * 120)
            return np.broadcast_to(tone, shape) + 0.5 * gleam[..., None], (0.42 + 0.4 * gleam).clip(0, 1)
        return tone * (1.05 - 0.14 * v * np.ones_like(u))[..., None], None

    def _noise_at(self, u: Array, v: Array, shift: float, cells: int) -> Array:
        last = self._size - 1
        rows, columns = (v * 0.6 + shift) % 1 * last, (u * 0.6 + shift * 0.7) % 1 * last
        return self._maps.noise(cells)[rows.astype(np.int64), columns.astype(np.int64)]

    def _stamp(self, thing: Thing, side: float, rng: random.Random) -> _Stamp:
        """Return the thing's icon; `side` is its longer side as a fraction of the image's."""
        master = self._keep(("icon", thing.name), lambda: self._master(objects()[thing.name].icon))
        scale = side * self._size / max(master.size) * (1 + 2 * _PAD)
        width, height = (max(3, round(length * scale)) for length in master.size)
        image = master.resize((width, height), Image.Resampling.BILINEAR)
        turn = (rng.random() - 0.5) * 16
        if thing.look == "upside-down":
            turn += 180
        if abs(turn) > 2:
            image = image.rotate(turn, Image.Resampling.BILINEAR, expand=True)
        layers = np.asarray(image, dtype=np.float32) * np.float32(1 / 255)
        if rng.random() < 0.3 and thing.name not in _HANDED:
            layers = layers[:, ::-1]
        return _Stamp(*(layers[..., band] for band in range(4)))

    def _master(self, icon: str) -> Image.Image:
        """Draw an icon's ink, cover, relief and halo as bands of a CMYK image, which Pillow resizes together."""
        font = self._font
        glyph = _codepoint(icon)
        box = font.getbbox(glyph)
        w, h = round(box[2] - box[0]), round(box[3] - box[1])
        pad = math.ceil(_PAD * max(w, h)) + 1
        image = Image.new("L", (w + 2 * pad, h + 2 * pad))
        ImageDraw.Draw(image).text((pad - box[0], pad - box[1]), glyph, font=font, fill=255)
        ink = np.asarray(image)
        cover = _fill_holes(image)
        reach = max(w, h)
        halo = Image.fromarray(cover).filter(ImageFilter.GaussianBlur(reach * 0.016))
        halo = halo.point([min(255, i * 5) for i in range(256)])
        body = Image.fromarray((cover * 0.62 + ink * 0.38).astype(np.uint8))
        height = np.asarray(body.filter(ImageFilter.GaussianBlur(reach * 0.028))).astype(np.float32)
        d = max(1, round(reach * 0.022))
        slope = np.zeros_like(height)
        slope[d:-d, d:-d] = height[2 * d :, 2 * d :] - height[: -2 * d, : -2 * d]
        relief = (128 + slope * 0.62).clip(0, 255).astype(np.uint8)
        return Image.merge("CMYK", (image, Image.fromarray(cover), Image.fromarray(relief), halo))

    @cached_property
    def _font(self) -> ImageFont.FreeTypeFont:
        path = _font_folder() / "fonts" / "materialdesignicons-webfont.ttf"
        return ImageFont.truetype(str(path), max(48, round(self._size * 0.95)), layout_engine=ImageFont.Layout.BASIC)

    def _keep(self, key: tuple[object, ...], make: Callable[[], V]) -> V:
        """Add to the cache, evicting old entries above a limit in bytes."""
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key][0]
        value = make()
        size = value.nbytes if isinstance(value, np.ndarray) else value.width * value.height * 4
        self._cache[key] = (value, size)
        self._held += size
        while self._held > _CACHE_BYTES and len(self._cache) > 1:
            self._held -= self._cache.popitem(last=False)[1][1]
        return value


_PAD = 0.06
# Mirrored, these would be wrong.
_HANDED = frozenset({"twenty sided die", "slot machine", "treble clef", "scoreboard", "om symbol", "billiard ball"})


def _tone(thing: Thing) -> tuple[int, int, int]:
    return RGB[thing.colour] if thing.colour else _PALETTE["looks"].get(thing.look, _PALETTE["neutral"])


def _font_folder() -> Path:
    """Folder of the icon font package.

    Raises:
        UserError: when it is not installed.
    """
    spec = importlib.util.find_spec("fonticon_mdi7")
    if spec is None or spec.origin is None:
        raise UserError(f"glyphs: the icon font is not installed: pip install {PACKAGE}")
    return Path(spec.origin).parent


def _codepoint(icon: str) -> str:
    from fonticon_mdi7 import MDI7

    return getattr(MDI7, icon)


def _fill_holes(image: Image.Image) -> NDArray[np.uint8]:
    """Fill the enclosed holes of an icon's coverage, those that cannot be reached from the border."""
    factor = max(1, round(max(image.size) / 96))
    small = np.asarray(image.reduce(factor)) > 70
    small = np.pad(small, 1)
    free, out = ~small, np.zeros_like(small)
    out[0], out[-1], out[:, 0], out[:, -1] = True, True, True, True
    before = 0
    while (reached := int(out.sum())) != before:
        before = reached
        for view, open_ in ((out, free), (out.T, free.T)):  # sweeps down, up, right, left
            for i in range(1, len(view)):
                view[i] |= view[i - 1] & open_[i]
            for i in range(len(view) - 2, -1, -1):
                view[i] |= view[i + 1] & open_[i]
    holes = Image.fromarray((~out & free)[1:-1, 1:-1].astype(np.uint8) * 255)
    holes = holes.filter(ImageFilter.MaxFilter(3))  # reaches under the ink, which hides the coarse border
    wide = np.asarray(holes.resize((holes.width * factor, holes.height * factor), Image.Resampling.BILINEAR))
    return np.maximum(np.asarray(image), wide[: image.height, : image.width])


def _layout(scene: Scene, rng: random.Random) -> list[_Spot]:
    """Positions of all copies of all things, background first."""
    first, others = scene.things[0], scene.things[1:]
    floating = scene.place in FLOATING
    if not others:
        side = _SIDES[first.size] * (0.96 + 0.08 * rng.random())
        room = max(0.0, 1 - side) * 0.55
        x = 0.5 + (rng.random() - 0.5) * room
        low = 0.88 - side / 2 if side < 0.7 else 0.5
        y = 0.5 + (rng.random() - 0.5) * room if floating or scene.place is None else low + (rng.random() - 0.5) * 0.06
        if first.count > 1:
            x, y = 0.5, (0.5 if scene.place is None or floating else 0.55)
        return _copies(first, x, y, side, rng)
    flip = -1 if rng.random() < 0.5 else 1
    drift = (rng.random() - 0.5) * 0.06
    a = 0.5 if len(others) == 1 else 0.47
    row = 0.56 if not floating else 0.5
    relation = scene.relation
    if relation is None and len(others) == 2:
        spots = _group((first,), 0.5 - 0.29 * flip, row - 0.13 + drift, 0.45, rng)
        spots += _group((others[0],), 0.5 + 0.27 * flip, row - 0.12 - drift, 0.45, rng)
        return spots + _group((others[1],), 0.5 + drift, row + 0.22, 0.45, rng)
    if relation in (None, "beside"):
        here = _group((first,), 0.5 - 0.25 * flip, row + drift, a, rng)
        return here + _group(others, 0.5 + 0.25 * flip, row - drift, 0.5, rng)
    if relation in ("above", "below"):
        up, down = (0.26, 0.76) if relation == "above" else (0.76, 0.26)
        return _group((first,), 0.5 + drift, up, 0.48, rng) + _group(others, 0.5 - drift, down, 0.48, rng)
    if relation == "on":
        under = _group(others, 0.5, 0.72, 0.52, rng)
        return under + _group((first,), 0.5 + drift, 0.31, 0.46, rng)
    if relation == "before":
        return _group(others, 0.5 + 0.15 * flip, 0.4, 0.66, rng) + _group((first,), 0.5 - 0.16 * flip, 0.7, 0.5, rng)
    if relation == "behind":
        return _group((first,), 0.5 - 0.15 * flip, 0.38, 0.64, rng) + _group(others, 0.5 + 0.16 * flip, 0.72, 0.48, rng)
    if relation == "inside":
        return _group(others, 0.5, 0.5, 0.95, rng) + _group((first,), 0.5 + drift, 0.52 + drift, 0.42, rng)
    ring = others[0]
    turn = rng.random() * 6.283
    angles = [turn + 6.283 * k / ring.count for k in range(ring.count)]
    spots = [_Spot(ring, 0.5 + 0.36 * math.cos(t), 0.5 + 0.36 * math.sin(t), 0.26) for t in angles]
    return spots + _group((first,), 0.5, 0.5, 0.44, rng)


def _group(things: tuple[Thing, ...], x: float, y: float, room: float, rng: random.Random) -> list[_Spot]:
    """Place things side by side within a box of `room`, keeping their relative sizes."""
    spots = []
    for i, thing in enumerate(things):
        factor = {"tiny": 0.5, "small": 0.75, None: 1.0, "large": 1.15, "huge": 1.3}[thing.size]
        share = room * factor * (1 if len(things) == 1 else 0.72)
        offset = 0.0 if len(things) == 1 else (i - 0.5) * 0.62 * room
        spots += _copies(thing, x + offset, y, min(share, 0.95), rng)
    return spots


def _copies(thing: Thing, x: float, y: float, side: float, rng: random.Random) -> list[_Spot]:
    """Place a thing's 1 … 4 copies around a point, in a box a little larger than that of one thing."""
    if thing.count == 1:
        return [_Spot(thing, x, y, side)]
    span = min(1.0, side * 1.45)
    patterns = {
        2: ((-0.25, 0.02), (0.25, -0.02)),
        3: ((-0.26, -0.2), (0.26, -0.2), (0.0, 0.22)),
        4: ((-0.25, -0.25), (0.25, -0.25), (-0.25, 0.25), (0.25, 0.25)),
    }
    each = span * (0.47 if thing.count > 2 else 0.5)
    jitter = 0.03 * span
    low = min(0.46 * each, 0.5)  # copies stay within the image

    def near(centre: float) -> float:
        return min(max(centre + (rng.random() - 0.5) * jitter, low), 1 - low)

    return [_Spot(thing, near(x + dx * span), near(y + dy * span), each) for dx, dy in patterns[thing.count]]
