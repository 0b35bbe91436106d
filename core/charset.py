"""Encoding of text files: from the byte order mark, else the one that the user names, else UTF-8; never guessed.

    with open_text(raw, "p.csv", None) as lines: …
    raise refusal(raw, "p.csv", None, "prompts.text_encoding")        p.csv is not UTF-8 … Likely cp1252, which reads …

A guess can be wrong without an error: cp1252, cp1250 and Shift_JIS decode each other's bytes. A file in another
encoding is therefore refused, with its likely encodings and how each reads the text, so that the user can tell.
"""

import codecs
import io
import logging
import re
from typing import BinaryIO, NamedTuple

from core.errors import UserError

log = logging.getLogger(__name__)

_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # before UTF-16's, with which it begins
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
    b"\x84\x31\x95\x33": "gb18030",
}
_SAMPLE = 1 << 16  # bytes that decide about the encoding
_NOT_TEXT = re.compile(rb"\0|\x1b\$[@B]|\x1b\([IJ]")  # UTF-16 and UTF-32 without a mark, ISO-2022-JP: valid as UTF-8
_COMMON = {  # charset-normalizer's names, the commonest first: it decides between equal guesses
    "cp1252": "Western Europe",
    "cp932": "Shift_JIS, Japanese",
    "gb18030": "GBK, Chinese",
    "cp1251": "Cyrillic",
    "cp949": "EUC-KR, Korean",
    "cp1250": "Central Europe",
    "big5": "Chinese",
    "euc_jp": "Japanese",
    "koi8_r": "Cyrillic",
    "cp1254": "Turkish",
    "cp1253": "Greek",
    "mac_roman": "Mac",
    "cp437": "DOS",
}
_RARE = ("mac_roman", "cp437")  # read much of cp1252 without an error
_ICONV = {"utf-16-le": "UTF-16LE", "utf-16-be": "UTF-16BE", "euc_jp": "EUC-JP", "koi8_r": "KOI8-R", "mac_roman": "MAC"}
_READINGS, _READING_LENGTH = 4, 40  # number and length of decoded samples in a message
_KANA = re.compile("[\u3040-\u30ff]")


def open_text(raw: BinaryIO, name: str, encoding: str | None, newline: str | None = None) -> io.TextIOWrapper:
    """Open a binary file that can seek as text, after its byte order mark.

    Args:
        name: name of the file, for the log.
        encoding: encoding that the user named; None for UTF-8. A byte order mark overrides both.
        newline: as for `open`.

    Raises:
        UnicodeDecodeError: here or while reading: the text is in another encoding.
    """
    head = raw.read(_SAMPLE)
    mark = _mark_of(head)
    if mark:
        encoding = _MARKS[mark]
        if encoding != "utf-8":
            log.info("%s: reading it as %s, by its byte order mark", name, encoding)
    elif encoding is None:
        _refuse_disguised(head)
    raw.seek(len(mark))
    return io.TextIOWrapper(raw, encoding=encoding or "utf-8", newline=newline)


def decode_text(data: bytes, encoding: str | None = None) -> str:
    """Decode the whole content of a text file as `open_text` does.

    Raises:
        UnicodeDecodeError: the text is in another encoding.
    """
    mark = _mark_of(data)
    if not mark and encoding is None:
        _refuse_disguised(data)
    return data[len(mark) :].decode(_MARKS[mark] if mark else encoding or "utf-8")


def encoding_problem(encoding: str | None, setting: str) -> list[str]:
    """Message for a name that is not a text encoding; empty for a valid one.

    Args:
        setting: name of the setting, for the message.
    """
    try:
        "".encode(encoding or "utf-8")
    except LookupError:
        examples = ", ".join(list(_COMMON)[:4])
        return [f"{setting}: {encoding} is not a text encoding; known are utf-16, {examples} and others"]
    return []


def refusal(raw: BinaryIO, name: str, encoding: str | None, setting: str | None) -> UserError:
    """Build the error for a file that cannot be decoded: its first undecodable line, and the likely encodings.

    Args:
        encoding: encoding that the file was read in; None for UTF-8.
        setting: setting that names an encoding, such as prompts.text_encoding; None where the command has none.
    """
    raw.seek(0)
    undecodable = _undecodable(raw, encoding)
    where = f"{name} is not {encoding or 'UTF-8'}: line {undecodable.number:,}"
    if encoding is None and undecodable.other_lines >= undecodable.lines:
        return UserError(
            f"{where} cannot be decoded, while {undecodable.other_lines:,} lines with non-ASCII letters can: the file "
            "is damaged there, or mixes encodings; correct the line, which begins "
            f"{undecodable.line[:_READING_LENGTH]!r}"
        )
    readings = likely_encodings(undecodable.sample)
    if not readings:
        return UserError(f"{where} cannot be decoded, and no encoding is likely: the file is damaged, or not text")
    labels = [f"{guess} ({_COMMON[guess]})" if guess in _COMMON else guess for guess, _ in readings]
    guesses = [f"{label}, which reads {text!r}" for label, (_, text) in zip(labels, readings, strict=True)]
    likely, path = readings[0][0], name.partition(" ")[0]
    hint = (
        f"{setting}={likely}"
        if setting is not None
        else f"iconv -f {_ICONV.get(likely, likely.upper())} -t UTF-8 {path} > utf8-{path.rpartition('/')[2]}"
    )
    return UserError(f"{where} cannot be decoded. Likely {'; or '.join(guesses)}. If that is right: {hint}")


def likely_encodings(sample: bytes) -> list[tuple[str, str]]:
    """List likely encodings of a text, likeliest first, each with the first non-ASCII words as decoded by it."""
    from charset_normalizer import from_bytes

    if b"\0" in sample:
        zeros = [sample[start::2].count(0) for start in (0, 1)]
        order = "be" if zeros[0] > zeros[1] else "le"
        candidates = [f"utf-16-{order}"]
        if sum(zeros) > 0.6 * len(sample):  # UTF-32 has two zeros or more in four bytes, and three for ASCII
            candidates = [f"utf-32-{'be' if sample[:1] == bytes(1) else 'le'}"]
    elif b"\x1b$" in sample:
        candidates = ["iso2022_jp"]
    else:
        scores = {}
        for match in from_bytes(sample, cp_isolation=list(_COMMON), threshold=0.4, enable_fallback=False):
            rank, encoding = min((list(_COMMON).index(n), n) for n in match.could_be_from_charset if n in _COMMON)
            kana = len(_KANA.findall(str(match))) > 0.2 * sum(not c.isascii() for c in str(match))
            scores[encoding] = (not kana and round(match.chaos, 1), encoding in _RARE, -round(match.coherence, 1), rank)
        candidates = sorted(scores, key=lambda encoding: scores[encoding])
    if b"\0" in sample:  # a damaged file decodes in no encoding
        texts = {encoding: sample.decode(encoding, "ignore") for encoding in candidates}
        candidates = [encoding for encoding, text in texts.items() if text and "\0" not in text]
    readings = []
    for encoding in candidates[:_READINGS]:
        text = sample.decode(encoding, "replace").strip("\ufeff\r\n")
        start = next((i for i, c in enumerate(text) if not c.isascii()), 0)
        line = text[text.rfind("\n", 0, start) + 1 :]
        start = max(0, next((i for i, c in enumerate(line) if not c.isascii()), 0) - _READING_LENGTH // 2)
        readings.append((encoding, line[start : start + _READING_LENGTH].partition("\n")[0].strip()))
    return readings


def _mark_of(head: bytes) -> bytes:
    return next((mark for mark in _MARKS if head.startswith(mark)), b"")


def _refuse_disguised(head: bytes) -> None:
    disguised = _NOT_TEXT.search(head)
    if disguised:
        raise UnicodeDecodeError("utf-8", head, disguised.start(), disguised.end(), "a byte that no text has")


class _Undecodable(NamedTuple):
    """Lines of a text file that cannot be decoded."""

    number: int  # of the first undecodable line, from 1
    line: bytes  # the first undecodable one
    lines: int  # number of undecodable lines among those read
    other_lines: int  # number of decodable lines with non-ASCII letters among those read
    sample: bytes  # undecodable lines, at least `_SAMPLE` bytes where the file has as many


def _undecodable(raw: BinaryIO, encoding: str | None) -> _Undecodable:
    """Read a file from its current position until 64 KiB of undecodable lines are collected."""
    sample, first, first_line, lines, other_lines = bytearray(), 0, b"", 0, 0
    number = 0
    while len(sample) < _SAMPLE and (line := raw.readline(_SAMPLE)):
        number += 1
        disguised = encoding is None and _NOT_TEXT.search(line)
        if line.isascii() and not disguised:
            continue
        try:
            if disguised:
                raise UnicodeError
            line.decode(encoding or "utf-8")
            other_lines += 1
        except UnicodeError:
            lines += 1
            sample += line
            first, first_line = first or number, first_line or line
    return _Undecodable(first or number, first_line, lines, other_lines, bytes(sample))
