"""The exception whose message is shown to the user, and how messages quote other errors."""


class UserError(Exception):
    """An error that the user can fix: its message names the value, the bound and the remedy; no trace is shown."""


def first_line(error: BaseException) -> str:
    """First line of an error's message, without its number; the name of its class where it has no message."""
    text = f"{error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)
    return next((line for line in text.splitlines() if line.strip()), type(error).__name__)
