"""Limit the memory and the processing time of large request bodies in a web process.

A body is held in memory while it is received, and parsing and storing it blocks the process's one
thread for up to a tenth of a second per step. All bodies together may use `BELAY_MAX_BODIES_BYTES`,
and those of one caller half of that. They are processed one at a time. After each of them, the
small requests that have arrived meanwhile are served.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from flask import Request, current_app

from belay_server.domain.errors import TooMany
from belay_server.runtime.shares import Shares

#: Smaller bodies are not counted.
_COUNTED = 64 * 1024
#: Smaller bodies are parsed in a few milliseconds, and do not wait for each other.
_LARGE = 64 * 1024
#: The pause between two large bodies, in which small requests are served. A new request takes
#: several iterations of the event loop, and would wait for a large body in each of them.
_PAUSE_SECONDS = 0.02
#: How long a request waits for its share of memory, and again for its turn.
_WAIT_SECONDS = 10.0
LARGE_BODIES = "belay.large_bodies"
_HELD = "belay.large_body"


@dataclass(slots=True)
class _Held:
    """The memory and the turn that a request holds until its view has returned."""

    caller: str
    size: int
    has_turn: bool = False


class LargeBodies:
    """Counts the large request bodies of one web process."""

    def __init__(self, most: int, whose: Callable[[], str]) -> None:
        """`most` is in bytes. `whose` returns the caller of the current request."""
        self._whose = whose
        self._shares = Shares(most)
        self._turn = threading.Lock()
        self._last_ended = 0.0

    def hold(self, request: Request) -> None:
        """Wait until the body of this request may be read. Raises TooMany."""
        size = self._size_of(request)
        if size <= _COUNTED or _HELD in request.environ:
            return
        held = _Held(self._whose(), size)
        if not self._shares.hold(held.caller, size, seconds=_WAIT_SECONDS):
            raise TooMany("Too many large requests at once; send them one after the other")
        request.environ[_HELD] = held

    def take_turn(self, request: Request, size: int) -> None:
        """Wait until no other large body is being processed. Raises TooMany."""
        held: _Held | None = request.environ.get(_HELD)
        if held is None or held.has_turn or size <= _LARGE:
            return
        self._acquire_turn()
        held.has_turn = True

    @contextmanager
    def turn(self, size: int) -> Iterator[None]:
        """Wait for a turn to process something else than a request body, such as the message of a
        WebSocket.

        Raises TooMany.
        """
        if size <= _LARGE:
            yield
            return
        self._acquire_turn()
        try:
            yield
        finally:
            self._release_turn()

    def _acquire_turn(self) -> None:
        if not self._turn.acquire(timeout=_WAIT_SECONDS):
            raise TooMany("Too many large requests at once; send them one after the other")
        ended_before = time.monotonic() - self._last_ended
        time.sleep(max(0.0, _PAUSE_SECONDS - ended_before))

    def _release_turn(self) -> None:
        self._last_ended = time.monotonic()
        self._turn.release()

    def release(self, request: Request) -> None:
        """Release what the request holds. Called when its view has returned."""
        held: _Held | None = request.environ.pop(_HELD, None)
        if held is None:
            return
        if held.has_turn:
            self._release_turn()
        self._shares.release(held.caller, held.size)

    def _size_of(self, request: Request) -> int:
        """Return the Content-Length, or for a chunked body the largest allowed size, in bytes."""
        if request.content_length is None and "HTTP_TRANSFER_ENCODING" not in request.environ:
            return 0
        largest = request.max_content_length or self._shares.share
        length = request.content_length
        return min(largest if length is None else length, largest, self._shares.share)


def large_bodies() -> LargeBodies:
    """Return the LargeBodies of this web process."""
    found: LargeBodies = current_app.extensions[LARGE_BODIES]
    return found
