"""Inputs shared by the reports of datagen and train: JSON-lines logs, and images that may be damaged."""

import io
import json
import re
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from core.errors import UserError


def require_packages(*more: str) -> None:
    """Raise a `UserError` unless the packages that a page needs, and `more`, are installed."""
    missing = [name for name in ("jinja2", "matplotlib", *more) if not find_spec(name)]
    if missing:
        raise UserError(f"a report needs {', '.join(missing)}: pip install -e '.[report,clip]'")


def read_log(path: Path, hint: str) -> list[dict[str, Any]]:
    """Read the records of a JSON-lines log; a truncated last line is left out.

    Raises:
        UserError: The log is missing or empty, or another line is not JSON. The message ends with `hint`.
    """
    if not path.exists():
        raise UserError(f"{path} is missing; {hint}")
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f"{path}, line {number} is not JSON: {error}; {hint}") from error
    if not records:
        raise UserError(f"{path} is empty; {hint}")
    return records


def decodable(
    numbers: Iterable[int],
    count: int,
    read: Callable[[int], bytes],
    unreadable: list[str],
    errors: tuple[type[Exception], ...],
) -> dict[int, bytes]:
    """Return the encoded bytes of the first `count` images that can be decoded.

    Args:
        read: Returns the encoded image of a number.
        unreadable: Gets a message for each image that cannot be decoded.
        errors: Exceptions other than OSError that `read` raises for a damaged image.
    """
    images: dict[int, bytes] = {}
    for i in numbers:
        if len(images) == count:
            break
        try:
            data = read(i)
            with Image.open(io.BytesIO(data)) as image:
                image.load()
            images[i] = data
        except (*errors, OSError, SyntaxError) as error:  # Pillow raises SyntaxError for some broken PNGs
            unreadable.append(re.sub(r" <_io\.BytesIO[^>]*>", "", str(error)))  # the address differs between runs
    return images


def duration(seconds: float) -> str:
    """Format a duration: `48 s`, `4 min 55 s`, `7 h 05 min`."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours:,} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"
