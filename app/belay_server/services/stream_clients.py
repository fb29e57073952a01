"""The client of a streamed response: whether it is still there, and what it may have at once."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

from belay_server.bus.client import RedisError
from belay_server.bus.event_log import Event, EventLog
from belay_server.bus.run_feed import Subscription

log = logging.getLogger(__name__)

#: A comment, and no blank line behind it: the JavaScript SDK would make an event of that.
HEARTBEAT = b": heartbeat\n"
#: How often a client gets a heartbeat while it waits for its share.
_WAIT_SECONDS = 1.0
#: What is sent at once.
PIECE_BYTES = 256 * 1024
#: What of a log is translated at once, into the events of a protocol.
PART_EVENTS = 64
_PART_BYTES = 64 * 1024
#: What is read of the log is copied into a frame.
_COPIES = 2

#: Starts watching a client's socket; calls back when it closes. Returns a function that stops it
#: and says whether the client has left.
WatchClient = Callable[[Callable[[], None]], Callable[[], bool]]


class Share(Protocol):
    """What the large parts of one response may hold, with those of other responses."""

    @property
    def caller(self) -> str | None:
        """For whom it is."""

    def hold(self, size: int, *, seconds: float) -> bool:
        """Hold so many bytes, waiting up to `seconds` for others to be sent. False on timeout."""

    def shrink(self, size: int) -> None:
        """Hold no more than `size` bytes any longer."""

    def release(self) -> None:
        """Hold nothing any longer: it has been sent."""


@dataclass(frozen=True, slots=True)
class StreamClient:
    """One client of one streamed response."""

    watch: WatchClient
    share: Share

    def wait_for_share(
        self, size: int, subscription: Subscription, beat: bytes
    ) -> Generator[bytes, None, bool]:
        """Yield `beat` until the response may hold so many bytes. False: the client has left."""
        while not self.share.hold(size, seconds=_WAIT_SECONDS):
            if subscription.client_left:
                return False
            yield beat
        return True

    def whole_event(
        self, event_log: EventLog, log_id: UUID, event: Event, subscription: Subscription
    ) -> Generator[bytes, None, Event | None]:
        """Return the event with its data, read from the log when the client may have it; yield
        heartbeats until then. None: the log does not have it any more, or the client has left.

        Release the share when it has been sent.
        """
        size = event.left_in_log * _COPIES
        if size and not (yield from self.wait_for_share(size, subscription, HEARTBEAT)):
            return None
        try:
            return event_log.read_whole(log_id, event)
        except RedisError as error:
            log.warning("an event of log %s not read: %s", log_id, error)
            return None


def pieces(data: bytes) -> Iterator[bytes]:
    """Yield data in pieces, and let other requests be served between them: a client on a fast
    connection takes all of it without a pause."""
    for at in range(0, len(data), PIECE_BYTES):
        if at:
            time.sleep(0)
        yield data[at : at + PIECE_BYTES]


def in_parts(events: Sequence[Event]) -> Iterator[list[Event]]:
    """Split events: those without data, which was left in the log, are alone; others together, as
    many as are translated within a few milliseconds."""
    part: list[Event] = []
    size = 0
    for event in events:
        if part and (event.left_in_log or len(part) == PART_EVENTS or size > _PART_BYTES):
            yield part
            part, size = [], 0
        part.append(event)
        size += len(event.data)
        if event.left_in_log:
            yield part
            part, size = [], 0
    if part:
        yield part


class StreamTurns:
    """Lets the streams of a web process do their work one part after the other.

    Each stream that replays a long log has work at any time. Without turns, every one of them would
    do a part of it in each round of the event loop, and a new request takes several rounds.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for the next round of the event loop, and until no other stream works.

        A stream that has just worked lets those that wait go first, by its first sleep.
        """
        time.sleep(0)
        if not self._lock.acquire(blocking=False):
            self._lock.acquire()
            time.sleep(0)
        try:
            yield
        finally:
            self._lock.release()
