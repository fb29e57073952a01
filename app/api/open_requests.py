"""How many requests one caller has open at once: streams and waits stay open for as long as their
run, and each takes a place of this web process.

Counted by the process itself: what it protects is its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

from app.domain.errors import TooMany


class OpenRequests:
    def __init__(self, most: int) -> None:
        """At most so many for each caller; 0: as many as they like."""
        self._most = most
        self._open: Counter[str] = Counter()

    def enter(self, caller: str) -> Callable[[], None] | None:
        """One more; what is returned is to be called when it has ended. Raises TooMany."""
        if not self._most:
            return None
        if self._open[caller] >= self._most:
            raise TooMany(f"You have {self._most} requests open already")
        self._open[caller] += 1
        return partial(self._leave, caller)

    def _leave(self, caller: str) -> None:
        self._open[caller] -= 1
        if self._open[caller] <= 0:
            del self._open[caller]
