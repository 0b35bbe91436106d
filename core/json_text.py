"""Parser of untrusted JSON with a single error class.

parse_json('{"prompt": "a fox"}')        {"prompt": "a fox"}
parse_json("[" * 100_000)                NotJsonError: lists or objects nested too deeply
"""

import json
from typing import Any


class NotJsonError(ValueError):
    """Error for a text that is not JSON, or that Python cannot represent; its message has the reason."""

    def __init__(self, reason: str, line: int = 1) -> None:
        super().__init__(reason)
        self.line = line
        """Line number of the error, from 1; 1 where it is unknown."""


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON text; bytes are decoded as UTF-8, or by their byte order mark.

    Raises:
        NotJsonError: the text is not JSON, is nested too deeply, or has a number with thousands of digits.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise NotJsonError(error.msg, error.lineno) from error
    except UnicodeDecodeError as error:
        raise NotJsonError("not UTF-8") from error
    except RecursionError as error:
        raise NotJsonError("lists or objects nested too deeply") from error
    except ValueError as error:  # int() refuses numbers that would take long to parse
        raise NotJsonError("a number of thousands of digits") from error
