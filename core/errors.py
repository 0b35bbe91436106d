"""Exception whose message is shown to the user, and the quotation of other errors in messages."""


class UserError(Exception):
    """Error that the user can fix; its message has the value, the bound and a hint, and no traceback is shown."""


def first_line(error: BaseException) -> str:
    """First line of an error's message, without its errno; the name of its class where it has no message."""
    text = f"{error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)
    return next((line for line in text.splitlines() if line.strip()), type(error).__name__)
