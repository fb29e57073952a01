"""Let the streams of a web process work in turns."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from flask import current_app

STREAM_TURNS = "belay.stream_turns"


class StreamTurns:
    """Serializes the work of a web process's streams, one part at a time.

    A stream that replays a long log always has work to do. Without turns, each of them would do a
    part in every iteration of the event loop, and a new request takes several iterations.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for the next iteration of the event loop, and until no other stream is working.

        The first sleep lets waiting streams go before the one that has just worked.
        """
        time.sleep(0)
        if not self._lock.acquire(blocking=False):
            self._lock.acquire()
            time.sleep(0)
        try:
            yield
        finally:
            self._lock.release()


def stream_turns() -> StreamTurns:
    """Return the StreamTurns of this web process."""
    found: StreamTurns = current_app.extensions[STREAM_TURNS]
    return found
