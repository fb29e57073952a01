"""Bound the time that one kind of background work takes before the next kind has its turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

_T = TypeVar("_T")


class TimeSlice:
    """A time after which a loop leaves its remaining items for its next turn."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._ends_at = clock() + seconds
        self._clock = clock

    @property
    def is_over(self) -> bool:
        return self._clock() >= self._ends_at

    def take(self, items: Iterable[_T]) -> Iterator[_T]:
        """Yield the first item, and further ones until the time is over."""
        for item in items:
            yield item
            if self.is_over:
                return
