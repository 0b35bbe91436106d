"""The glyph renderer: what a prompt says is in the image."""

import colorsys
import hashlib
import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from core.errors import UserError
from datagen.prompts import grammar
from datagen.prompts.icon_names import objects
from datagen.renderers.base import Renderer
from datagen.renderers.glyphs import media, places
from datagen.renderers.glyphs import renderer as module
from datagen.renderers.glyphs.renderer import RGB, Glyphs

PROMPTS = [
    "a red fox shaped candle",
    "two blue owls in a forest at sunset, oil painting",
    "a tiny cat next to a star, comic",
]


@pytest.fixture(scope="module")
def small() -> Glyphs:
    return Glyphs(64)


def one(renderer: Glyphs, prompt: str, seed: int = 0) -> NDArray[np.uint8]:
    return renderer.render([prompt], [seed])[0]


def differ(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


def clause(table: dict[str, tuple[str, ...]], key: str) -> str:
    return table[key][0].replace("[", "").replace("]", "").removesuffix(" *")


def test_every_icon_is_in_the_font():
    from fonticon_mdi7 import MDI7

    missing = [item.icon for item in objects().values() if not hasattr(MDI7, item.icon)]
    assert not missing


def test_every_word_of_the_grammar_has_a_drawing():
    assert set(RGB) == set(grammar.COLOURS)
    assert set(places.PAINTERS) == set(grammar.PLACES)
    assert set(media.MEDIA) == set(grammar.MEDIA)
    assert set(module._SIDES) == {None, *grammar.SIZES}


def test_implements_renderer(small: Glyphs):
    renderer: Renderer = small
    settings = renderer.settings()
    assert settings["name"] == "glyphs"
    assert settings["size"] == 64
    assert settings["font"].startswith("7.")
    assert renderer.one_core
    assert not renderer.on_gpu()
    assert renderer.seconds(1000) > renderer.seconds(1) > 0
    assert renderer.can_draw("a cat")
    assert not renderer.can_draw("a feeling of dread")
    images = renderer.render(PROMPTS, [1, 2, 3])
    assert images.shape == (3, 64, 64, 3)
    assert images.dtype == np.uint8
    assert renderer.render([], []).shape == (0, 64, 64, 3)


def test_pixels_depend_on_prompt_and_seed_alone(small: Glyphs):
    together = small.render(PROMPTS, [5, 6, 7])
    fresh = Glyphs(64)
    for k in (2, 0, 1):
        assert np.array_equal(one(fresh, PROMPTS[k], 5 + k), together[k])
    assert differ(one(small, PROMPTS[1], 6), one(small, PROMPTS[1], 60)) > 2
    assert differ(one(small, "a red cat", 1), one(small, "a blue cat", 1)) > 2


def test_pixels_are_the_same_in_any_process():
    prompts = [f"two red cats in a forest in the rain, {clause(grammar.MEDIA, m)}" for m in grammar.MEDIA]
    code = (
        "import hashlib, sys; from datagen.renderers.glyphs.renderer import Glyphs\n"
        "p = sys.stdin.read().splitlines()\n"
        "print(hashlib.sha256(Glyphs(48).render(p, list(range(len(p)))).tobytes()).hexdigest())"
    )
    digests = {hashlib.sha256(Glyphs(48).render(prompts, list(range(len(prompts)))).tobytes()).hexdigest()}
    for seed in ("1", "2"):
        made = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            input="\n".join(prompts),
            capture_output=True,
            check=True,
            text=True,
        )
        digests.add(made.stdout.strip())
    assert len(digests) == 1


@pytest.mark.parametrize("medium", [None, *grammar.MEDIA])
def test_the_scene_is_the_same_at_every_size(medium: str | None):
    prompt = "a red cat above a blue barrel in a meadow" + (f", {clause(grammar.MEDIA, medium)}" if medium else "")
    small, large = one(Glyphs(96), prompt, 3), one(Glyphs(192), prompt, 3)
    reduced = np.asarray(Image.fromarray(large).resize((96, 96), Image.Resampling.BOX))
    soft = [
        np.asarray(Image.fromarray(a).resize((32, 32), Image.Resampling.BOX), float).ravel() for a in (small, reduced)
    ]
    assert np.corrcoef(soft[0], soft[1])[0, 1] > (0.8 if medium in ("glitch", "charcoal", "woodcut") else 0.9)


@pytest.mark.parametrize("table", ["MEDIA", "PLACES", "LIGHTS"])
def test_every_word_changes_the_image_in_its_own_way(table: str):
    """The same scene, seed and layout: `_draw` is given the scene itself, so that the wording does not matter."""
    import random

    renderer = Glyphs(64)
    words = getattr(grammar, table)
    kind = {"MEDIA": "medium", "PLACES": "place", "LIGHTS": "light"}[table]
    thing = grammar.Thing("cat", "red")
    fixed = {"place": "meadow", kind: None}
    scenes = [grammar.Scene((thing,), **{**fixed, kind: word}) for word in (None, *words)]
    images = [renderer._draw(scene, random.Random(4)) for scene in scenes]
    for i, a in enumerate(images):
        for j, b in enumerate(images[:i]):
            assert differ(a, b) > 3, (scenes[i], scenes[j])


@pytest.mark.parametrize("name", [name for name in RGB if name not in ("white", "grey", "black", "beige", "brown")])
def test_named_colour_is_in_the_image(small: Glyphs, name: str):
    """In flat media most saturated pixels of a large object have its hue."""
    wanted = colorsys.rgb_to_hsv(*(c / 255 for c in RGB[name]))[0]
    for ending in ("", ", pixel art", ", a low poly render", ", oil painting"):
        image = one(small, f"a huge {grammar.COLOURS[name][0]} heart{ending}", 2)
        centre = image[24:40, 24:40].reshape(-1, 3) / 255
        hue = colorsys.rgb_to_hsv(*np.median(centre, axis=0))[0]
        off = abs(hue - wanted)
        assert min(off, 1 - off) < 0.06, ending


def test_light_and_dark_colours_contrast_with_background(small: Glyphs):
    for name in ("white", "black"):
        image = one(small, f"a huge {name} heart", 1).astype(float)
        assert abs(image[28:36, 28:36].mean() - image[:6, :6].mean()) > 40


def test_size_words_order_the_object():
    """A medium-less red object on a plain ground: the red area grows with the said size."""
    renderer = Glyphs(96)
    areas = []
    for word in ("tiny ", "small ", "", "large ", "huge "):
        images = renderer.render([f"a {word}blue heart"] * 4, [0, 1, 2, 3]).astype(int)
        areas.append((images[..., 2] - images[..., 0] > 90).mean())
    assert areas == sorted(areas)
    assert areas[2] > 0.15


@pytest.mark.slow
def test_every_object_can_be_drawn(small: Glyphs):
    images = small.render([f"a huge red {name}" for name in objects()], [0] * len(objects()))
    assert min(image.std() for image in images) > 10


@pytest.mark.slow
def test_icons_of_different_objects_differ():
    """No two names for nearly the same image: a pig and a piggy bank would be 8.4 apart."""
    renderer = Glyphs(48)
    fitted = []
    for item in objects().values():
        ink = renderer._master(item.icon).getchannel(0)
        side = max(ink.size)
        square = Image.new("L", (side, side))
        square.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
        fitted.append(np.asarray(square.resize((24, 24), Image.Resampling.BOX), np.float32).ravel() / 255)
    flat = np.stack(fitted)
    distance = (flat**2).sum(1)[:, None] + (flat**2).sum(1)[None] - 2 * flat @ flat.T
    np.fill_diagonal(distance, np.inf)
    i, j = divmod(int(distance.argmin()), len(flat))
    names = list(objects())
    assert distance[i, j] > 9.5, (names[i], names[j], float(distance[i, j]))


def test_holes_are_filled():
    ring = np.zeros((60, 60), np.uint8)
    ring[10:50, 10:50] = 255
    ring[20:40, 20:40] = 0
    solid = module._fill_holes(Image.fromarray(ring))
    assert solid[30, 30] == 255
    assert solid[5, 5] == 0
    ring[20:40, 40:] = 0  # a bay is no hole
    assert module._fill_holes(Image.fromarray(ring))[30, 30] == 0


@pytest.mark.parametrize("size", [8, 4096])
def test_a_size_out_of_bounds_is_refused(size: int):
    with pytest.raises(UserError, match=rf"size {size} is not within 32 … 768: choose"):
        Glyphs(size)


def test_prompts_without_object_are_refused(small: Glyphs):
    with pytest.raises(UserError, match=r"1 of 2 prompts name no object it can draw: 'mere dread'\. Drop"):
        small.render(["a cat", "mere dread"], [0, 1])


def test_a_missing_font_is_explained(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install fonticon-materialdesignicons7"):
        one(Glyphs(64), "a cat")


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch):
    renderer = Glyphs(64)
    monkeypatch.setattr(module, "_CACHE_BYTES", 60_000)
    prompts = ["a cat", "an owl", "a star", "a cat"]
    bounded = renderer.render(prompts, [1] * 4)
    assert renderer._held <= 60_000
    assert np.array_equal(bounded, Glyphs(64).render(prompts, [1] * 4))


def test_importing_is_cheap():
    heavy = ("torch", "scipy", "fonticon_mdi7")
    code = f"import sys, datagen.renderers.glyphs.renderer; print([m for m in {heavy} if m in sys.modules])"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert made.stdout.strip() == "[]"
