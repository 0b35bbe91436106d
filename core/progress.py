"""Progress bars of commands."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm


def progress(total: int, unit: str, what: str, initial: int = 0, *, show: bool = True) -> "tqdm":
    """Return a progress bar on standard error with rate and time left; without a terminal, a line every ten seconds."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    options = {"dynamic_ncols": terminal, "mininterval": 0.2 if terminal else 10, "disable": not show}
    return tqdm(total=total, initial=initial, unit=unit, desc=what, **options)
