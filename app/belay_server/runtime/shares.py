"""Limit how much of a resource, such as memory, requests hold. One caller may hold half of that."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Shares:
    """Counts the units, such as bytes, that callers hold.

    `most` is the limit of all callers together. `largest` is what one request may always hold.
    """

    most: int
    largest: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _held: Counter[str | None] = field(default_factory=Counter)

    @property
    def share(self) -> int:
        """Return the limit of one caller."""
        return max(self.most // 2, self.largest)

    def hold(self, caller: str | None, size: int, *, seconds: float = 0.0) -> bool:
        """Hold units, waiting up to `seconds` for others to be released. Return False on timeout.

        The caller None is the server itself, which may hold everything.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._fits(caller, size), seconds):
                return False
            self._held[caller] += size
            return True

    def release(self, caller: str | None, size: int) -> None:
        """Release units that were held."""
        with self._changed:
            self._held[caller] -= size
            if self._held[caller] == 0:
                del self._held[caller]
            self._changed.notify_all()

    def _fits(self, caller: str | None, size: int) -> bool:
        mine = self._held[caller] + size
        has_share = caller is None or mine <= self.share
        return has_share and self._held.total() + size <= max(self.most, self.share)
