"""Ends what an API key has open when the key is revoked or expires.

A request is authenticated when it begins, and a stream or a WebSocket may stay open for days. One
thread in a web process looks at the keys of all that is open, with one statement a second.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable

from belay_server.db import api_keys as key_rows
from belay_server.db.connection import Database
from belay_server.domain.errors import Unavailable

log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
Close = Callable[[], None]


class OpenKeys:
    """Starts its thread at the first request that stays open: importing an app starts nothing."""

    def __init__(self, database: Database, *, seconds: float = _LOOK_SECONDS) -> None:
        self._database = database
        self._seconds = seconds
        self._lock = threading.Lock()
        self._open: dict[str, set[Close]] = defaultdict(set)
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, prefix: str, close: Close) -> Close:
        """Have `close` called once, from another thread, when the key is no longer good. Returns
        what ends the watch."""
        with self._lock:
            self._open[prefix].add(close)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="belay-keys", daemon=True)
                self._thread.start()

        def forget() -> None:
            with self._lock:
                if prefix in self._open:
                    self._open[prefix].discard(close)
                    if not self._open[prefix]:
                        del self._open[prefix]

        return forget

    def close(self) -> None:
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.wait(self._seconds):
            try:
                self._look()
            except Unavailable as error:
                log.warning("open requests' keys cannot be looked at: %s", error)
            except Exception:
                log.exception("open requests' keys cannot be looked at, going on")

    def _look(self) -> None:
        with self._lock:
            prefixes = list(self._open)
        if not prefixes:
            return
        with self._database.connection() as conn:
            good = key_rows.good_prefixes(conn, prefixes)
        for prefix in set(prefixes) - good:
            with self._lock:
                closes = self._open.pop(prefix, set())
            log.info("key %s is no longer good: %d open requests end", prefix, len(closes))
            for close in closes:
                try:
                    close()
                except Exception:
                    log.exception("an open request of key %s cannot be ended", prefix)
