"""Recognise image files by their names: the list of suffixes that every command and predict.py share.

why_not_image("a.JPG") == ""        why_not_image("a.heic") == "suffix .heic"        why_not_image("._a.jpg")
"""

import re

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp"),
    *(".bmp", ".dib", ".gif", ".tif", ".tiff", ".avif"),  # Pillow's wheels read AVIF from 11.3 on
)
"""Lower-case suffixes of the files that `decode` reads; the tests decode one file of each."""

_SYSTEM_FILE = re.compile(r"(?:^|.*/)(?:__MACOSX/.*|\._[^/]*|\.DS_Store|Thumbs\.db|desktop\.ini)", re.IGNORECASE)


def suffix_of(path: str) -> str:
    """Last suffix in lower case with its dot; "" for a name without one, such as `README` or `.png`."""
    stem, dot, suffix = path.rpartition("/")[2].rpartition(".")
    return f"{dot}{suffix}".lower() if stem.strip(".") else ""


def why_not_image(path: str) -> str:
    """Return "" for the path of an image, otherwise the reason: "system file", "suffix .txt" or "no suffix"."""
    if _SYSTEM_FILE.fullmatch(path):
        return "system file"
    suffix = suffix_of(path)
    if suffix in IMAGE_SUFFIXES:
        return ""
    return f"suffix {suffix}" if suffix else "no suffix"
