"""Limit how many connections of a pool one caller uses at a time.

A caller may send many slow statements at once, such as searches through large rows. Further
requests of that caller then wait for one of its own connections; the rest of the pool stays
available to other callers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from belay_server.domain.errors import TooMany

#: Returns the caller a connection is for; None for the server itself, which has no limit.
Whose = Callable[[], str | None]


@dataclass(slots=True)
class _Share:
    places: threading.Semaphore
    users: int = 0


class ConnectionShares:
    """Limits each caller to half of one pool, and at least two connections."""

    def __init__(self, size: int, whose: Whose, *, seconds: float) -> None:
        """`seconds` is how long a request waits for its caller's other requests."""
        self._most = max(2, size // 2)
        self._whose = whose
        self._seconds = seconds
        self._lock = threading.Lock()
        self._shares: dict[str, _Share] = {}

    @contextmanager
    def hold(
        self, watched: AbstractContextManager[None], caller: str | None = None
    ) -> Iterator[None]:
        """Hold one of the caller's places. Waiting for one happens inside `watched`. Without
        `caller`, it is that of the current request.

        Raises TooMany on timeout.
        """
        caller = caller or self._whose()
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
        """Keep a caller's share for as long as a request holds a place of it or waits for one."""
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
