"""Problems that `python -m datagen.verify` reports, counted by kind.

problems.add("vectors are missing", f"{path} is missing; write it: …")
problems.count, problems.lines()
"""

import re
from collections import Counter

_LISTED = 20  # problems of a kind that are listed; the others are counted
HIDDEN_PART = re.compile(r"\..*\.part-.*")
"""Name of a file that another process is writing, or that a killed process left."""


class Problems:
    """The first lines of each kind of problem, and the number of problems."""

    def __init__(self) -> None:
        self._lines: dict[str, list[str]] = {}
        self._counts: Counter[str] = Counter()

    def add(self, kind: str, line: str) -> None:
        """Add a problem.

        Args:
            kind: its description without names and numbers.
            line: its description for the user, with file, value and fix.
        """
        self._counts[kind] += 1
        if self._counts[kind] <= _LISTED:
            self._lines.setdefault(kind, []).append(line)

    @property
    def count(self) -> int:
        """Number of problems, listed or not."""
        return self._counts.total()

    def lines(self) -> list[str]:
        """A line for each of the first twenty problems of a kind, then the number of the others of that kind."""
        lines = []
        for kind, listed in self._lines.items():
            more = self._counts[kind] - len(listed)
            lines += [*listed, *([f"… and {more:,} more: {kind}"] if more else [])]
        return lines
