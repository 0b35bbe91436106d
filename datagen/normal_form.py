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


def normal_form(prompt: str) -> str:
    """The prompt in NFKC and folded case, without punctuation, white space and invisible characters.

    A prompt of nothing else, such as "!!!", keeps these characters, so that it differs from other such prompts.
    """
    if prompt.isascii():
        folded = prompt.lower()
        return folded.translate(_ASCII_IGNORED) or folded
    # folding may leave characters that NFKC composes, and NFKC letters that fold again
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", prompt).casefold())
    return folded.translate(_ignored()) or folded


def form_hash(prompt: str) -> int:
    """64 bits of the prompt's normal form, signed: equal for prompts that are near-identical."""
    digest = hashlib.blake2b(normal_form(prompt).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


@cache
def _ignored() -> dict[int, None]:
    """Punctuation (P), separators (Z), control and invisible characters (C), accents that stand alone (Sk); and all
    of ASCII's punctuation, some of which Unicode counts as symbols."""
    every = {c for c in range(sys.maxunicode + 1) if _is_ignored(chr(c))}
    return dict.fromkeys(every | set(map(ord, string.punctuation)))


def _is_ignored(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] in "PZ" or category in ("Cc", "Cf", "Cs", "Sk")
