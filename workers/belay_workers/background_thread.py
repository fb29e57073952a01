"""A thread of the worker's parent process that works until the worker stops."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from belay_server.db.postgres.outages import is_outage

log = logging.getLogger(__name__)

_RETRY_SECONDS = 1.0


class BackgroundThread:
    """Runs `body` in a daemon thread, again and again until `stopping` is set.

    An error does not end the thread: it is logged, and the body runs again after a second. The body
    returns soon after `stopping` is set.
    """

    def __init__(self, name: str, body: Callable[[], None], stopping: threading.Event) -> None:
        """`name` is used in log messages, such as "sweeper"."""
        self._name = name
        self._body = body
        self._stopping = stopping
        self._thread = threading.Thread(target=self._run, name=f"belay-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, seconds: float) -> None:
        """Wait until the thread has ended, for up to `seconds`."""
        self._thread.join(seconds)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._body()
            except Exception as error:
                if is_outage(error):
                    log.warning(
                        "%s: lost the connection to Postgres; retrying: %s", self._name, error
                    )
                else:
                    log.exception("%s failed; retrying", self._name)
                self._stopping.wait(_RETRY_SECONDS)
