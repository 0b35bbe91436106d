"""What the reports of datagen and train both read: logs of JSON lines, and images of which some may be broken."""

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
    """Raises a `UserError` unless the packages of a page are installed, and `more` of them."""
    missing = [name for name in ("jinja2", "matplotlib", *more) if not find_spec(name)]
    if missing:
        raise UserError(f"a report needs {', '.join(missing)}: pip install -e '.[report,clip]'")


def read_log(path: Path, remedy: str) -> list[dict[str, Any]]:
    """The records of a log of JSON lines; a last line that a kill cut short is left out.

    Raises:
        UserError: there is none, it is empty, or another line is no JSON. It ends with `remedy`.
    """
    if not path.exists():
        raise UserError(f"{path} is missing; {remedy}")
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f"{path}, line {number} is no JSON: {error}; {remedy}") from error
    if not records:
        raise UserError(f"{path} is empty; {remedy}")
    return records


def decodable(
    numbers: Iterable[int],
    count: int,
    read: Callable[[int], bytes],
    unreadable: list[str],
    errors: tuple[type[Exception], ...],
) -> dict[int, bytes]:
    """The first `count` of the numbered images that decode, as encoded.

    Args:
        read: number → encoded image.
        unreadable: what is wrong with each that does not decode is appended here.
        errors: what `read` raises for such an image, beside OSError.
    """
    found: dict[int, bytes] = {}
    for i in numbers:
        if len(found) == count:
            break
        try:
            data = read(i)
            with Image.open(io.BytesIO(data)) as image:
                image.load()
            found[i] = data
        except (*errors, OSError, SyntaxError) as error:  # Pillow raises SyntaxError for some broken PNGs
            unreadable.append(re.sub(r" <_io\.BytesIO[^>]*>", "", str(error)))  # whose address is never the same
    return found


def duration(seconds: float) -> str:
    """A time as people say it: `48 s`, `4 min 55 s`, `7 h 05 min`."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours:,} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"
