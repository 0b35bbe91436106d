"""JSON that others wrote, with one error for whatever is wrong with it.

parse_json('{"prompt": "a fox"}')        {"prompt": "a fox"}
parse_json("[" * 100_000)                NotJsonError: lists or objects nested too deeply
"""

import json
from typing import Any


class NotJsonError(ValueError):
    """The text is not JSON, or not JSON that Python can hold; its message says why."""

    def __init__(self, reason: str, line: int = 1) -> None:
        super().__init__(reason)
        self.line = line
        """Number of the line of the fault, from 1; 1 where it is not known."""


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; bytes are UTF-8, or by their byte order mark.

    Raises:
        NotJsonError: it is not JSON, nested too deeply, or has a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise NotJsonError(error.msg, error.lineno) from error
    except UnicodeDecodeError as error:
        raise NotJsonError("not UTF-8") from error
    except RecursionError as error:
        raise NotJsonError("lists or objects nested too deeply") from error
    except ValueError as error:  # of int(): it refuses what would take long to read
        raise NotJsonError("a number of thousands of digits") from error
