"""Read the captions in a value of a file; every reader of prompts uses these functions to decide what is text.

    read_captions("a fox", "prompt", "p.jsonl, row 1").texts          ("a fox",)
    read_captions(["a fox", None], "prompt", …)                       one text, and the reason "null" for the other
    read_captions(3.5, "prompt", …)                                   UserError: it holds a number (3.5), not text

Text is a string, or bytes of UTF-8; a list holds several captions. Null, NaN and empty values are left out, each with
its reason. Other values are an error, so that no prompt is the Python representation of a value.
"""

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

NULL, NAN, EMPTY = "null", "NaN", "empty"
"""Reasons to leave a value out. EMPTY: a list without items, or text of white space and invisible characters alone."""

_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn"}
_LONE_SURROGATES = re.compile("[\ud800-\udfff]")  # what "\\ud83d" alone in a JSON gives; no encoder takes it
_SHOWN_LENGTH = 60


@dataclass(frozen=True)
class Captions:
    """Captions of one value as the file spells them, and the reasons why other items of the value are left out."""

    texts: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    """`NULL`, `NAN` or `EMPTY` for each value left out."""


def read_captions(value: Any, column: str, where: str, hint: str = "") -> Captions:
    """Read the captions of a value; of a list, those of its items in order.

    Args:
        column: column or field of the value, for messages.
        where: file, and row or sample, of the value, for messages.
        hint: what the user can change, for messages.

    Raises:
        UserError: the value is neither text, nor a list of texts, nor missing.
    """
    items = value if isinstance(value, list | tuple) else [value]
    if not items:
        return Captions((), (EMPTY,))
    texts, left_out = [], []
    for item in items:
        reason = reason_to_leave_out(item)
        if reason:
            left_out.append(reason)
            continue
        text = as_text(item)
        if text is None:
            holds = "a list within a list" if isinstance(item, list | tuple) else type_of(item)
            raise UserError(
                f"{where}: {column!r} holds {holds}, not text or a list of texts{f'; {hint}' if hint else ''}"
            )
        if clean(text):
            texts.append(_LONE_SURROGATES.sub("", text))
        else:
            left_out.append(EMPTY)
    return Captions(tuple(texts), tuple(left_out))


def read_label(value: Any, column: str, where: str) -> str:
    """Read a source, group or split, which is text or a whole number, as clean text; "" for null, NaN and empty values.

    Args:
        column, where: as in `read_captions`.

    Raises:
        UserError: the value is neither text nor a whole number.
    """
    if reason_to_leave_out(value):
        return ""
    if isinstance(value, float) and value.is_integer():  # pandas writes whole numbers as floats if some are missing
        value = int(value)
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else as_text(value)
    if text is None:
        raise UserError(f"{where}: {column!r} holds {type_of(value)}, but a name is text or a whole number")
    return clean(text)


def reason_to_leave_out(value: Any) -> str:
    """Return `NULL` or `NAN` for a missing value; "" for any other."""
    if value is None:
        return NULL
    return NAN if isinstance(value, float) and math.isnan(value) else ""


def as_text(value: Any) -> str | None:
    """Return a string, or bytes of UTF-8, as a string; None for any other value."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8-sig")
        except UnicodeDecodeError:
            return None
    return value if isinstance(value, str) else None


def type_of(value: Any) -> str:
    """Describe the type of a value, for a message."""
    if isinstance(value, bytes):
        return f"bytes that are not UTF-8 ({shown(value)})"
    if isinstance(value, bool):
        return f"a truth value ({str(value).lower()})"
    if isinstance(value, int | float):
        return f"a number ({shown(value)})"
    if isinstance(value, dict):
        return f"an object with the keys {shown(', '.join(map(str, value)))}"
    if isinstance(value, list | tuple):
        return "a list"
    return f"a value of type {type(value).__name__} ({shown(value)})"


def shown(value: object) -> str:
    """Format a value as text of at most 60 characters, for a message."""
    text = str(value)
    return text if len(text) <= _SHOWN_LENGTH else f"{text[:_SHOWN_LENGTH]}…"


def is_caption_type(kind: "pa.DataType") -> bool:
    """Return whether a column of this Arrow type can hold captions.

    Such are text, bytes or nulls, dictionary-encoded or not, and lists of these.
    """
    import pyarrow as pa

    list_kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if any(is_kind(kind) for is_kind in (*list_kinds, pa.types.is_list_view, pa.types.is_large_list_view)):
        kind = kind.value_type
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    text_kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    byte_kinds = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(is_kind(kind) for is_kind in (*text_kinds, *byte_kinds))


def clean(text: str) -> str:
    """Normalise a text: NFC, no control or invisible characters, single spaces."""
    if text.isascii() and text.isprintable():
        return " ".join(text.split())
    text = unicodedata.normalize("NFC", text)
    visible = (" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c) not in _INVISIBLE)
    return " ".join("".join(visible).split())


def distinct(texts: Sequence[str]) -> tuple[str, ...]:
    """Clean the texts and return the distinct ones, in their order."""
    return tuple(dict.fromkeys(map(clean, texts)))
