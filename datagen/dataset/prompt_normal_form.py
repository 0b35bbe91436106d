"""Normal form of a prompt: prompts that differ only in case, punctuation, white space or Unicode form share it.

    normal_form("A red  fox.") == normal_form("a red fox") == "aredfox"

Splits keep prompts of one normal form on one side, and leakage between training and evaluation is counted by it.
"""

import hashlib
import string
import sys
import unicodedata
from functools import cache

_ASCII_IGNORED = str.maketrans("", "", string.punctuation + string.whitespace)
_APOSTROPHES = {*range(0x2B9, 0x2C0), 0x2C8, 0x2EE}  # modifier letters
_INVISIBLE = {0x34F, *range(0x180B, 0x180E), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)}  # variation selectors
_INVISIBLE |= {0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164, 0xFFA0}  # fillers


def normal_form(prompt: str) -> str:
    """Normalise a prompt: NFKC, case folding, no punctuation, white space or invisible characters.

    A prompt of such characters alone, such as "!!!", keeps them, so that it differs from other such prompts.
    """
    if prompt.isascii():
        folded = prompt.lower()
        return folded.translate(_ASCII_IGNORED) or folded
    # ignored characters go before NFKC, too, which would put the accent of don´t on the n
    return _folded(prompt.translate(_ignored())).translate(_ignored()) or _folded(prompt)


def form_hash(prompt: str) -> int:
    """Hash the prompt's normal form to a signed 64-bit number: equal for near-identical prompts."""
    return text_hash(normal_form(prompt))


def text_hash(text: str) -> int:
    """Hash a text to a signed 64-bit number."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _folded(prompt: str) -> str:
    # folding may leave characters that NFKC composes, and NFKC letters that fold again
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", prompt).casefold())


@cache
def _ignored() -> dict[int, None]:
    """Build the table of removed characters for `str.translate`.

    Punctuation (P), separators (Z), control and invisible characters (C), accents that stand alone (Sk); all of ASCII's
    punctuation, some of which Unicode counts as symbols; and the apostrophes and invisible characters that Unicode
    counts as letters or marks.
    """
    every = {c for c in range(sys.maxunicode + 1) if _is_ignored(chr(c))}
    return dict.fromkeys(every | set(map(ord, string.punctuation)) | _APOSTROPHES | _INVISIBLE)


def _is_ignored(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] in "PZ" or category in ("Cc", "Cf", "Cs", "Sk")
