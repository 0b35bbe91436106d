"""Prompts and scenes: what is written is read back exactly. `python -m pytest tests/datagen/prompts/test_grammar.py`"""

import itertools
import os
import subprocess
import sys
import time
import zlib

import pytest

from core.errors import UserError
from datagen.prompts import grammar
from datagen.prompts.grammar import Scene, Thing, lines, parse
from datagen.prompts.icon_names import objects, plural


def take(n: int, seed: int = 0, **kwargs) -> list[grammar.Line]:
    return list(itertools.islice(lines(seed, **kwargs), n))


def is_held_out(pair: str) -> bool:
    return zlib.crc32(pair.encode()) % 10 < 2


def test_vocabulary_is_large_and_every_icon_is_used_once():
    names = objects()
    assert len(names) >= 500
    assert len({item.icon for item in names.values()}) == len(names)
    assert len(grammar.COLOURS) >= 18
    assert len(grammar.PLACES) >= 16
    assert len(grammar.MEDIA) >= 12


def test_plurals():
    assert plural("fox") == "foxes"
    assert plural("cherry") == "cherries"
    assert plural("monkey") == "monkeys"
    names = objects()
    assert names["mouse"].plural == "mice"
    assert names["pair of scissors"].plural == "pairs of scissors"
    assert names["torch"].plural == "torches"


def test_parse_inverts_every_line():
    """Of freely said scenes a few are ambiguous ("a broken heart"); `lines` says those in other words."""
    rng = grammar._Rng(7)
    drawn, wrong = 4000, []
    for k in range(drawn):
        scene = grammar._draw(rng, list(objects()), (0.5, 0.3, 0.2), None)
        said = grammar._say(scene, rng, flourish=k % 2 == 0)
        if parse(said) != scene:
            wrong.append(said)
    assert len(wrong) <= drawn * 0.002, wrong[:5]


def test_parse_reads_every_object_in_singular_and_plural():
    for name, item in objects().items():
        assert parse(name) == Scene((Thing(name),)), name
        many = parse(f"three {item.plural}")
        assert many == Scene((Thing(name, count=3),)), name
        for other in (*item.others, *item.read):
            read = parse(f"a {other}")
            assert read is not None, other
            assert read.things[0].name == name


def test_prompt_and_group_match_scene():
    for line in take(2500, flourish=0.5):
        scene = parse(line.prompt)
        assert scene is not None
        assert line.group == grammar.group(scene)
        assert 5 <= len(line.prompt.split()) <= 40
        assert 1 <= len(scene.things) <= 3


@pytest.mark.slow
def test_lines_are_mostly_distinct_and_varied():
    found = take(20_000, flourish=0.0)
    assert len({line.prompt for line in found}) >= 0.98 * len(found)
    scenes = [scene for line in found[:4000] if (scene := parse(line.prompt))]
    for kind, table in (("place", grammar.PLACES), ("light", grammar.LIGHTS), ("medium", grammar.MEDIA)):
        assert {getattr(scene, kind) for scene in scenes} == {None, *table}
    things = [thing for scene in scenes for thing in scene.things]
    assert {thing.colour for thing in things} == {None, *grammar.COLOURS}
    assert {thing.look for thing in things} == {None, *grammar.LOOKS}
    assert {thing.count for thing in things} == {1, 2, 3, 4}
    assert sum(len(scene.things) == 1 for scene in scenes) == pytest.approx(0.6 * len(scenes), rel=0.1)


def test_flourish_is_a_probability():
    plain = " ".join(line.prompt for line in take(500, flourish=0.0))
    assert "artstation" not in plain
    assert "in the style of" not in plain
    assert "in the style of" in " ".join(line.prompt for line in take(100, flourish=1.0))


def test_the_same_seed_gives_the_same_lines_in_any_process():
    code = "import itertools, datagen.prompts.grammar as g\nprint([*itertools.islice(g.lines(3), 50)])"
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert said == {str(take(50, 3))}
    assert take(50, 3) != take(50, 4)


def test_holdout_sides_never_mix_and_keep_fraction():
    found = take(4000, side=is_held_out, objects=(0.3, 0.4, 0.3))
    held = 0
    for line in found:
        sides = {is_held_out(pair) for pair in line.group.split(";")}
        assert len(sides) == 1, line
        held += sides == {True}
    assert held / len(found) == pytest.approx(0.2, abs=0.03)
    assert any(";" in line.group for line in found if is_held_out(line.group.split(";")[0]))


def test_almost_empty_side_still_terminates():
    found = take(300, side=lambda pair: pair == "red cat", objects=(0.0, 0.0, 1.0))
    assert all("red cat" not in line.group or line.group == "red cat" for line in found)


@pytest.mark.parametrize(
    ("prompt", "scene"),
    [
        (
            "A red bicycle leaning on a wall, oil painting",
            Scene((Thing("bicycle", "red"),), medium="oil painting"),
        ),
        ("cats and dogs in the rain", Scene((Thing("cat", count=2), Thing("dog", count=2)), light="rain")),
        (
            "hyper-realistic photo of 2 huge Grey Elephants, next to a glass of wine at the beach",
            Scene((Thing("elephant", "grey", 2, "huge"), Thing("wine glass")), "beside", "beach", None, "photograph"),
        ),
        (
            "a small, azure sailing boat under a full moon",
            Scene((Thing("sailboat", "sky blue", 1, "small"),), light="moonlight"),
        ),
        ("A yellow wall, a knight's sword carved out of ebony", Scene((Thing("sword", look="wooden"),))),
        ("concatenate", None),
        ("friendly and dystopian crater", None),
        ("", None),
    ],
)
def test_parse_of_free_text(prompt: str, scene: Scene | None):
    assert parse(prompt) == scene


def test_articles():
    assert grammar._with_article("owl") == "an owl"
    assert grammar._with_article("unicorn") == "a unicorn"
    assert grammar._with_article("hourglass") == "an hourglass"
    assert grammar._with_article("orange fox") == "an orange fox"
    assert grammar._with_article("ukiyo-e print") == "a ukiyo-e print"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"objects": (0.5, 0.2, 0.2, 0.1)}, "1 to 3 weights"),
        ({"objects": (0.0, 0.0)}, "not all 0"),
        ({"flourish": 1.5}, r"flourish 1.5 is not within 0 … 1"),
    ],
)
def test_invalid_settings_are_refused(wrong: dict, said: str):
    with pytest.raises(UserError, match=said):
        take(1, **wrong)


def test_parse_is_fast():
    prompts = [line.prompt for line in take(2000)]
    start = time.perf_counter()
    for prompt in prompts:
        parse(prompt)
    assert time.perf_counter() - start < 1
