"""A long benchmark in short sessions: rows are written at once, a session stops in time, the next one goes on.

What counts as done is in the rows themselves: a job is done if the file has a row with its key, taken on the same card
with the same torch, Triton and commit. So a change of the code measures everything again, and old rows stay.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlocal.profiling import results

SAME = ("card", "torch", "triton", "commit")


class Campaign:
    """The rows of one benchmark in ``path``, and the time that this session may spend on more.

    Args:
        path: JSON Lines file; need not exist.
        budget: seconds from now; None is no limit.
    """

    def __init__(self, path: Path, budget: float | None = None) -> None:
        self.path = path
        self.budget = budget
        self.left = 0
        origin = results.origin()
        self.rows = [row for row in results.read_rows(path) if all(row.get(name) == origin[name] for name in SAME)]
        self._begun = time.perf_counter()
        self._longest = 0.0

    def todo(self, jobs: Sequence[tuple[Mapping[str, Any], Any]]) -> Iterator[Any]:
        """The second of each pair (key, job) whose key no row has, while there is time for one as long as the longest.

        ``left`` then says how many were left for another session.
        """
        pending = [job for key, job in jobs if self.find(key) is None]
        for position, job in enumerate(pending):
            begun = time.perf_counter()
            if self.budget is not None and begun - self._begun + self._longest > self.budget:
                self.left += len(pending) - position
                return
            yield job
            self._longest = max(self._longest, time.perf_counter() - begun)

    def remaining(self) -> float | None:
        """Seconds left of the budget."""
        return None if self.budget is None else max(self.budget - (time.perf_counter() - self._begun), 0.0)

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The last row with all the values of ``key``, or None."""
        plain = json.loads(json.dumps(key))  # as it reads back from the file: lists for tuples
        found = (row for row in reversed(self.rows) if all(row.get(name) == value for name, value in plain.items()))
        return next(found, None)

    def add(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Write ``row`` with its origin, at once, and count it as done."""
        self.rows.append(results.append_row(self.path, row))
        return self.rows[-1]
