"""Close the open streams and WebSockets of an API key when the key is revoked or expires.

A request is authenticated when it begins, and a stream or a WebSocket may stay open for days. One
thread per web process checks the keys of all open requests, with one SQL statement a second.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable

from belay_server.db import api_keys as key_rows
from belay_server.db.postgres.pool import Database
from belay_server.domain.errors import Unavailable

log = logging.getLogger(__name__)

_CHECK_SECONDS = 1.0
Close = Callable[[], None]


class OpenKeys:
    """Checks the API keys of open requests. The thread starts at the first call of `watch`, so that
    importing an app starts nothing."""

    def __init__(self, database: Database, *, seconds: float = _CHECK_SECONDS) -> None:
        """`seconds` is the interval between two checks."""
        self._database = database
        self._seconds = seconds
        self._lock = threading.Lock()
        self._open: dict[str, set[Close]] = defaultdict(set)
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, prefix: str, close: Close) -> Close:
        """Call `close` once, from another thread, when the key is no longer valid. Return a
        function that ends the watch."""
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
                self._check()
            except Unavailable as error:
                log.warning("cannot check the keys of open requests, retrying: %s", error)
            except Exception:
                log.exception("cannot check the keys of open requests, retrying")

    def _check(self) -> None:
        with self._lock:
            prefixes = list(self._open)
        if not prefixes:
            return
        with self._database.connection() as conn:
            good = key_rows.good_prefixes(conn, prefixes)
        for prefix in set(prefixes) - good:
            with self._lock:
                closes = self._open.pop(prefix, set())
            log.info("key %s is no longer valid, closing %d requests", prefix, len(closes))
            for close in closes:
                try:
                    close()
                except Exception:
                    log.exception("cannot close an open request of key %s", prefix)
