"""Keeps one caller from holding every connection of a pool.

A statement may take long on purpose (a search through large rows, many times at once). Whoever has
their share of the pool in use waits for it, and the rest of the pool is there for everybody else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from belay_server.domain.errors import TooMany

#: Says for whom a connection is wanted; None for the server itself, which has no share.
Whose = Callable[[], str | None]


@dataclass(slots=True)
class _Share:
    places: threading.Semaphore
    users: int = 0


class ConnectionShares:
    """Of one pool. A caller has half of it, and two connections at least."""

    def __init__(self, size: int, whose: Whose, *, seconds: float) -> None:
        """`seconds`: how long a caller waits for a place of its own."""
        self._most = max(2, size // 2)
        self._whose = whose
        self._seconds = seconds
        self._lock = threading.Lock()
        self._shares: dict[str, _Share] = {}

    @contextmanager
    def hold(self, watched: AbstractContextManager[None]) -> Iterator[None]:
        """Hold a place. A wait for one is `watched`. Raises TooMany."""
        caller = self._whose()
        if caller is None:
            yield
            return
        with self._used(caller) as share:
            if not share.places.acquire(blocking=False):
                with watched:
                    had = share.places.acquire(timeout=self._seconds)
                if not had:
                    raise TooMany(
                        "Your other requests hold all database connections that one caller may have"
                    )
            try:
                yield
            finally:
                share.places.release()

    @contextmanager
    def _used(self, caller: str) -> Iterator[_Share]:
        """A caller's share is kept for as long as somebody holds a part of it or waits for one."""
        with self._lock:
            share = self._shares.get(caller)
            if share is None:
                share = self._shares[caller] = _Share(threading.Semaphore(self._most))
            share.users += 1
        try:
            yield share
        finally:
            with self._lock:
                share.users -= 1
                if share.users == 0:
                    del self._shares[caller]
