"""Grammar of scenes: an endless prompt source. The glyph renderer can draw all of its prompts.

`lines(seed)` writes prompts, `parse(prompt)` reads them back: the renderer draws the result of `parse`, so `lines` only
yields a line that parses to the scene that it was written from. An attribute that the prompt does not mention is None;
the renderer then draws nothing for it (a place, a light, a medium) or chooses from the seed (a size).
"""

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from core.errors import UserError
from datagen.prompts import icon_names
from datagen.prompts.icon_names import Object, plural

T = TypeVar("T")


@dataclass(frozen=True)
class Thing:
    """One kind of object in a scene."""

    name: str
    """Name of the object, a key of `icon_names.objects()`."""
    colour: str | None = None
    """Colour, a key of `COLOURS`; None is drawn in the object's neutral tone."""
    count: int = 1
    """Number of copies, 1 … 4."""
    size: str | None = None
    """Size, a key of `SIZES`."""
    look: str | None = None
    """Look, a key of `LOOKS`: a pattern, a material or a state."""


@dataclass(frozen=True)
class Scene:
    """Content of a prompt that an image can show."""

    things: tuple[Thing, ...]
    relation: str | None = None
    """Position of the first thing relative to the others, a key of `RELATIONS`; None: in a row."""
    place: str | None = None
    light: str | None = None
    medium: str | None = None


@dataclass(frozen=True)
class Line:
    """Prompt with its group for hold-out splits: its "colour object" pairs joined by ";"."""

    prompt: str
    group: str


def _tuples(table: Mapping[str, list[str]]) -> dict[str, tuple[str, ...]]:
    return {value: tuple(phrases) for value, phrases in table.items()}


# grammar.json: canonical value → phrases for it, the most common one first.
_PHRASES: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
COLOURS = _tuples(_PHRASES["colours"])
SIZES = _tuples(_PHRASES["sizes"])
LOOKS = {value: (tuple(forms["before"]), tuple(forms["after"])) for value, forms in _PHRASES["looks"].items()}
"""Look → phrases before the noun, and phrases after it."""
RELATIONS = _tuples(_PHRASES["relations"])
PLACES = _tuples(_PHRASES["places"])
"""Place → whole clauses; `parse` recognises the words in brackets."""
LIGHTS = _tuples(_PHRASES["lights"])
MEDIA = _tuples(_PHRASES["media"])
"""Medium → phrases: "a …" takes an article, "… *" follows a comma only, the others take no article."""
COLOURLESS = frozenset({"charcoal", "blueprint"})
"""Media that cannot show a colour: their prompts name none."""
PLACELESS = frozenset({"neon sign"})
"""Media that cannot show a place or a light: their prompts name none."""

# Clauses that the images cannot show: noise that real prompts have too.
_ARTISTS: list[str] = _PHRASES["artists"]
_MOVEMENTS: list[str] = _PHRASES["movements"]
_FLOURISHES: list[str] = _PHRASES["flourishes"]


def lines(
    seed: int,
    *,
    flourish: float = 0.3,
    objects: tuple[float, ...] = (0.6, 0.3, 0.1),
    detail: float = 1.0,
    names: int | None = None,
    side: Callable[[str], bool] | None = None,
) -> Iterator[Line]:
    """Generate endless lines; the same arguments give the same lines on any machine.

    Args:
        flourish: probability of artist, mood or quality clauses, which the image cannot show.
        objects: weights of scenes with 1, 2 and 3 kinds of objects.
        detail: factor of the probabilities of a medium, place, light, look, size and count; 0 gives objects and colours
            alone.
        names: number of different objects in the vocabulary; None takes all.
        side: split of a pair such as "red fox", True if held out; the pairs of a line are all in the split of the
            first, so that held-out lines are as common as held-out pairs.

    Raises:
        UserError: at the first line, if a weight or probability is out of bounds.
    """
    if not 1 <= len(objects) <= 3 or min(objects) < 0 or sum(objects) <= 0:
        raise UserError(
            f"grammar: objects {objects} must be 1 to 3 weights, none below 0, not all 0, such as (0.6, 0.3)"
        )
    for name, chance in (("flourish", flourish), ("detail", detail)):
        if not 0 <= chance <= 1:
            raise UserError(f"grammar: {name} {chance} is not within 0 … 1: give a share such as 0.3")
    vocabulary = list(icon_names.objects())
    most = len(vocabulary)
    if names is not None:
        if not 1 <= names <= most:
            raise UserError(f"grammar: names {names} is not within 1 … {most}: null takes all")
        vocabulary = [vocabulary[i * most // names] for i in range(names)]
    rng = _Rng(seed)
    while True:
        scene = _draw(rng, vocabulary, objects, side, detail)
        for _ in range(8):  # a word may change the meaning of a name, as in "a broken heart": try other words
            prompt = _say(scene, rng, rng.chance(flourish))
            if 5 <= len(prompt.split()) <= 40 and parse(prompt) == scene:
                yield Line(prompt, group(scene))
                break


def group(scene: Scene) -> str:
    """Return the scene's "colour object" pairs, "plain object" without a colour, joined by ";"."""
    return ";".join(_pair(thing.colour, thing.name) for thing in scene.things)


def parse(prompt: str) -> Scene | None:
    """Parse a prompt into the scene that can be drawn; None if it names no known object.

    At each word, the parser takes the longest known phrase. Words before an object describe it, up to an article.
    """
    lexicon, reach = _lexicon()
    words = _words(prompt)
    things: list[Thing] = []
    clauses: dict[str, str] = {}
    pending: dict[str, str] = {}
    count = 1
    i = 0
    while i < len(words):
        entry = None
        step = 1
        for length in range(min(reach.get(words[i], 0), len(words) - i), 0, -1):
            entry = lexicon.get(" ".join(words[i : i + length]))
            if entry:
                step = length
                break
        i += step
        if entry is None:
            continue
        kind, value = entry
        if kind == "count":
            count, pending = int(value), {}
        elif kind in ("colour", "size", "look"):
            pending[kind] = value
        elif kind in ("object", "objects"):
            if len(things) < 3:
                many = 2 if kind == "objects" and count == 1 else count
                things.append(Thing(value, pending.get("colour"), many, pending.get("size"), pending.get("look")))
            count, pending = 1, {}
        elif kind == "after":  # "carved out of wood" describes the object before it
            if things and things[-1].look is None:
                things[-1] = replace(things[-1], look=value)
        elif kind == "relation":
            if len(things) == 1:
                clauses.setdefault(kind, value)
            count, pending = 1, {}
        else:
            clauses.setdefault(kind, value)
            count, pending = 1, {}
    if not things:
        return None
    relation = clauses.get("relation") if len(things) > 1 else None
    return Scene(tuple(things), relation, clauses.get("place"), clauses.get("light"), clauses.get("medium"))


class _Rng:
    """Random choices by `random.random` alone, whose stream Python guarantees not to change."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def chance(self, p: float) -> bool:
        return self._random() < p

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self._random() * len(options))]

    def weighted(self, weights: Iterable[float]) -> int:
        weights = list(weights)
        point = self._random() * sum(weights)
        for i, weight in enumerate(weights):
            point -= weight
            if point < 0:
                return i
        return len(weights) - 1


def _medium_form(phrase: str) -> tuple[str, str]:
    if phrase.endswith(" *"):
        return phrase[:-2], "*"
    first, _, rest = phrase.partition(" ")
    return (rest, "a") if first in ("a", "an") else (phrase, "")


def _without_brackets(table: Mapping[str, tuple[str, ...]]) -> dict[str, list[str]]:
    return {key: [re.sub(r"[\[\]]", "", clause) for clause in clauses] for key, clauses in table.items()}


_PLACE_CLAUSES, _LIGHT_CLAUSES = _without_brackets(PLACES), _without_brackets(LIGHTS)
_MEDIUM_FORMS = {key: [_medium_form(phrase) for phrase in phrases] for key, phrases in MEDIA.items()}
"""Medium → phrases with their form: "a", "" or "*"."""


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower().replace("'", "").replace("’", ""))


@cache
def _lexicon() -> tuple[dict[str, tuple[str, str]], dict[str, int]]:
    """Build the maps phrase → (kind, canonical value) and first word → number of words of its longest phrase."""
    entries: dict[str, tuple[str, str]] = {}

    def add(kind: str, value: str, phrases: Iterable[str]) -> None:
        for phrase in phrases:
            key = " ".join(_words(phrase))
            if entries.setdefault(key, (kind, value)) != (kind, value):
                raise ValueError(f"{phrase!r} means both {entries[key]} and {(kind, value)}: take it from one of them")

    for value, phrases in COLOURS.items():
        add("colour", value, phrases)
    for value, phrases in SIZES.items():
        add("size", value, phrases)
    for value, (before, after) in LOOKS.items():
        add("look", value, before)
        add("after", value, after)
    for value, phrases in RELATIONS.items():
        add("relation", value, phrases)
    for kind, table in (("place", PLACES), ("light", LIGHTS)):
        for value, clauses in table.items():
            add(kind, value, (phrase for clause in clauses for phrase in re.findall(r"\[(.+?)\]", clause)))
    for value, forms in _MEDIUM_FORMS.items():
        add("medium", value, (phrase for phrase, _ in forms))
    add("flourish", "", _FLOURISHES)
    add("flourish", "", (f"in the style of {artist}" for artist in (*_ARTISTS, *_MOVEMENTS)))
    add("flourish", "", (f"by {artist}" for artist in _ARTISTS))
    for value, phrases in {
        "1": ("a", "an", "the", "one", "single"),
        "2": ("two", "2", "a couple of", "twin"),
        "3": ("three", "3", "a trio of"),
        "4": ("four", "4", "several", "a group of"),
    }.items():
        add("count", value, phrases)
    for item in icon_names.objects().values():
        add("object", item.name, (item.name, *item.others, *item.read))
    for item in icon_names.objects().values():  # after all singulars, which take precedence: "glasses" are spectacles
        for many in (item.plural, *map(plural, item.others)):
            key = " ".join(_words(many))
            entries.setdefault(key, ("objects", item.name))
    reach: dict[str, int] = {}
    for key in entries:
        first, _, rest = key.partition(" ")
        reach[first] = max(reach.get(first, 0), 1 + len(rest.split()))
    return entries, reach


def _pair(colour: str | None, name: str) -> str:
    return f"{colour or 'plain'} {name}"


def _draw(
    rng: _Rng, names: list[str], weights: tuple[float, ...], side: Callable[[str], bool] | None, detail: float = 1.0
) -> Scene:
    number = 1 + rng.weighted(weights)
    medium = rng.pick(list(MEDIA)) if rng.chance(detail * (0.45, 0.36, 0.3)[number - 1]) else None
    place = rng.pick(list(PLACES)) if rng.chance(detail * (0.62, 0.5, 0.34)[number - 1]) else None
    light = rng.pick(list(LIGHTS)) if rng.chance(detail * (0.34, 0.25, 0.2)[number - 1]) else None
    if medium in PLACELESS:
        place = light = None
    things: list[Thing] = []
    held: bool | None = None
    while len(things) < number:
        thing = _draw_thing(rng, names, medium, detail)
        if side:
            if held is None:
                held = side(_pair(thing.colour, thing.name))
            else:
                same = _same_side(rng, names, thing, side, held)
                if same is None:  # too few pairs on this side, so make the scene smaller
                    break
                thing = same
        if all(thing.name != other.name for other in things):
            things.append(thing)
    relation = rng.pick(list(RELATIONS)) if len(things) > 1 and rng.chance(0.75) else None
    if relation == "around":  # one thing cannot surround another
        things[1:] = [replace(things[1], count=max(things[1].count, 3), size=None)]
    return Scene(tuple(things), relation, place, light, medium)


def _draw_thing(rng: _Rng, names: list[str], medium: str | None, detail: float) -> Thing:
    name = rng.pick(names)
    look = rng.pick(list(LOOKS)) if rng.chance(detail * 0.13) else None
    colour = None if rng.chance(0.2) or look in ("golden", "rusty") else rng.pick(list(COLOURS))
    if medium in COLOURLESS:
        colour = None
    count = 1 + rng.weighted((1 - detail * 0.2, detail * 0.09, detail * 0.07, detail * 0.04))
    size = rng.pick(list(SIZES)) if rng.chance(detail * 0.22) else None
    return Thing(name, colour, count, size, look)


def _same_side(rng: _Rng, names: list[str], thing: Thing, side: Callable[[str], bool], held: bool) -> Thing | None:
    """Redraw the colour of `thing`, then its name, until its pair is on the `held` side; None after 400 attempts."""
    for attempt in range(400):
        if side(_pair(thing.colour, thing.name)) == held:
            return thing
        name = thing.name if attempt < 20 and thing.colour else rng.pick(names)
        colour = rng.pick(list(COLOURS)) if thing.colour else None
        thing = replace(thing, name=name, colour=colour)
    return None


def _say(scene: Scene, rng: _Rng, flourish: bool) -> str:
    """Write one of the many prompts for a scene."""
    phrases = [_say_thing(thing, rng) for thing in scene.things]
    core = phrases[0]
    if len(phrases) > 1:
        others = " and ".join(phrases[1:])
        if scene.relation:
            comma = "," if rng.chance(0.15) else ""
            core += f"{comma} {rng.pick(RELATIONS[scene.relation])} {others}"
        elif len(phrases) == 2:
            core += rng.pick((" and ", " with ", " and ", " together with ")) + others
        else:
            core += ", " + others if rng.chance(0.6) else " with " + others
    place = rng.pick(_PLACE_CLAUSES[scene.place]) if scene.place else ""
    light = rng.pick(_LIGHT_CLAUSES[scene.light]) if scene.light else ""
    phrase, form = rng.pick(_MEDIUM_FORMS[scene.medium]) if scene.medium else ("", "*")
    clauses = [clause for clause in (place, light) if clause]
    if len(clauses) == 2 and rng.chance(0.3):
        clauses.reverse()
    opened = False
    if form != "*" and rng.chance(0.6):
        core = f"{_with_article(phrase) if form == 'a' else phrase} {rng.pick(('of', 'of', 'of', 'showing'))} {core}"
        opened = True
    elif clauses and rng.chance(0.18):
        core = f"{clauses.pop(0)}, {core}"
    text = core
    for clause in clauses:
        text += (", " if rng.chance(0.25) else " ") + clause
    tail = []
    if phrase and not opened:
        named = _with_article(phrase) if form == "a" and rng.chance(0.3) else phrase
        styles = (f"drawn as {_with_article(phrase)}", named, named) if form == "a" else (named,)
        tail.append(rng.pick(styles))
    if flourish:
        if rng.chance(0.5):
            by = rng.chance(0.4)
            tail.append(f"by {rng.pick(_ARTISTS)}" if by else f"in the style of {rng.pick(_ARTISTS + _MOVEMENTS)}")
        first = rng.pick(_FLOURISHES)
        if rng.chance(0.7) or not tail:
            tail.insert(int(rng.chance(0.5)) and len(tail), first)
        second = rng.pick(_FLOURISHES)
        if rng.chance(0.35) and second != first:
            tail.append(second)
    text = ", ".join([text, *tail])
    if rng.chance(0.35):
        text = text[0].upper() + text[1:]
    return text + ("." if rng.chance(0.08) else "")


def _say_thing(thing: Thing, rng: _Rng) -> str:
    item: Object = icon_names.objects()[thing.name]
    many = thing.count > 1
    name = item.plural if many else item.name
    if item.others and rng.chance(0.18):
        other = rng.pick(item.others)
        name = plural(other) if many else other
    words = []
    after = ""
    if thing.size:
        words.append(rng.pick(SIZES[thing.size]))
    if thing.look:
        before, behind = LOOKS[thing.look]
        if rng.chance(0.5) and not many:
            after = " " + rng.pick(behind)
        else:
            words.append(rng.pick(before))
    if thing.colour:
        ways = COLOURS[thing.colour]
        words.append(ways[0] if rng.chance(0.55) else rng.pick(ways))
    text = " ".join([*words, name])
    if many:
        number = {2: ("two", "a couple of"), 3: ("three", "a trio of"), 4: ("four", "several", "a group of")}[
            thing.count
        ]
        return f"{number[0] if rng.chance(0.6) else rng.pick(number)} {text}{after}"
    return f"{_with_article(text) if rng.chance(0.93) else 'the ' + text}{after}"


def _with_article(text: str) -> str:
    """Prepend "a" or "an" by sound: "owl" → "an owl"; a unicorn, a ukiyo-e print, an hourglass, an 8 bit image."""
    vowel = text[0] in "aeiou8" and not text.startswith(("uni", "uk", "ufo", "eu", "one", "use"))
    return f"{'an' if vowel or text.startswith('hour') else 'a'} {text}"
