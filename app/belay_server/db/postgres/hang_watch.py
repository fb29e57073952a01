"""End requests that wait for a Postgres that hangs: one that is reachable but does not respond.

TCP detects a server whose machine is down, and the pool's timeout bounds the wait for a connection.
But a request that already holds a connection would wait for as long as the server hangs. A slow
statement must not be ended. So after a connection has been in use for a while, a new one is opened
to find out whether the server responds at all.

This works only with gunicorn's gevent workers, whose greenlets can be woken. Elsewhere nothing is
watched.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psycopg

log = logging.getLogger(__name__)

#: How long a connection is in use before the server is probed, and how often uses are checked.
_PATIENCE_SECONDS = 3.0
_LOOK_SECONDS = 0.5


def waits_are_watched() -> bool:
    """Return whether this process's greenlets can be woken, so that a wait can be ended."""
    return "gevent.monkey" in sys.modules


class Hung(psycopg.OperationalError):
    """The server does not respond, neither on this connection nor to a new one."""


@dataclass(eq=False, slots=True)
class _Use:
    """A connection in use: the greenlet that uses it, and since when."""

    greenlet: Any
    began: float


class HangWatch:
    """Watches one pool. `answers` opens a new connection. It returns False without a response."""

    def __init__(
        self, answers: Callable[[], bool], *, patience_seconds: float = _PATIENCE_SECONDS
    ) -> None:
        self._answers = answers
        self._patience_seconds = patience_seconds
        self._uses: set[_Use] = set()
        self._thread: threading.Thread | None = None

    @contextmanager
    def watched(self, conn: psycopg.Connection[Any] | None) -> Iterator[None]:
        """Watch the use of a connection, or (with None) a wait for one.

        If the server hangs meanwhile, close the connection and raise Hung.
        """
        if not waits_are_watched():
            yield
            return
        import gevent  # noqa: PLC0415

        use = _Use(gevent.getcurrent(), time.monotonic())
        self._uses.add(use)
        self._start()
        try:
            yield
        except Hung:
            if conn is not None:
                with suppress(psycopg.Error):
                    conn.close()
            raise
        finally:
            self._uses.discard(use)

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="belay-hangs", daemon=True)
            self._thread.start()

    def _watch(self) -> None:
        while True:
            time.sleep(_LOOK_SECONDS)
            try:
                self._check_uses()
            except Exception:
                log.exception("checking the connections in use failed, trying again")

    def _check_uses(self) -> None:
        before = time.monotonic() - self._patience_seconds
        waiting = [use for use in self._uses if use.began <= before]
        if not waiting or self._answers():
            return
        log.warning("Postgres hangs: ending %d requests that wait for it", len(waiting))
        import gevent  # noqa: PLC0415

        hub = gevent.get_hub()
        for use in waiting:
            hub.loop.run_callback(self._end, use)

    def _end(self, use: _Use) -> None:
        """End a use that has not ended by itself. Runs in gevent's hub, where nothing else runs."""
        if use in self._uses:
            use.greenlet.throw(Hung("the server does not respond"))
