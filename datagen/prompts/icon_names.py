"""Vocabulary of the grammar's scenes: icons of the Material Design Icons font with their English names.

A line of icon_names.txt reads `icon: name`. `/ plural` follows if the rule of `plural` fails. `= other, names` follows
with synonyms that some prompts use; `grammar.parse` reads those that begin with `~`, but no prompt uses them. The icons
were selected by eye: concrete things that look different, one of similar icons.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple


class Object(NamedTuple):
    name: str  # "chess queen"
    plural: str  # "chess queens"
    others: tuple[str, ...]  # synonyms that take an article and a plural
    read: tuple[str, ...]  # words that are understood, but not written: mass nouns, loose synonyms
    icon: str  # "chess_queen"


def plural(name: str) -> str:
    """Form the plural of a regular English noun; the last word is the noun."""
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + ("es" if name.endswith(("s", "x", "z", "ch", "sh")) else "s")


@cache
def objects() -> dict[str, Object]:
    """Read the objects by name, in the order of icon_names.txt."""
    text = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
    named = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        icon, rest = line.split(": ")
        rest, _, others = rest.partition(" = ")
        name, _, many = rest.partition(" / ")
        synonyms = [word for word in others.split(", ") if word]
        written = tuple(word for word in synonyms if not word.startswith("~"))
        read = tuple(word[1:] for word in synonyms if word.startswith("~"))
        named[name] = Object(name, many or plural(name), written, read, icon)
    return named
