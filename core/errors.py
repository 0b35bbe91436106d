"""Exception whose message is shown to the user, and the quotation of other errors in messages."""


class UserError(Exception):
    """Error that the user can fix; its message has the value, the bound and a hint, and no traceback is shown."""


def first_line(error: BaseException) -> str:
    """First line of an error's message, without its errno; the name of its class where it has no message."""
    text = f"{error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)


def describe(error: BaseException) -> str:
    """Class name and first line of an error, such as "ValueError: bad magic number"."""
    line = first_line(error)
    return f"{type(error).__name__}: {line if line != type(error).__name__ else 'no message'}"
