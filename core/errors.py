"""The one exception whose message is for the user."""


class UserError(Exception):
    """A mistake that the user can mend: its message names the value, the bound and the remedy; no trace is shown."""
