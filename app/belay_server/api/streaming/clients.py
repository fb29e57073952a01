"""The client of a streamed response: whether it is connected, and how much memory it may use."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

from flask import current_app

from belay_server.api.streaming.frames import HEARTBEAT
from belay_server.bus.client import RedisError
from belay_server.bus.event_log import Event, EventLog
from belay_server.bus.run_feed import Subscription
from belay_server.runtime.turns import Turns
from belay_server.services.parts import Parts

log = logging.getLogger(__name__)

#: The interval of heartbeats while a client waits for its share.
_WAIT_SECONDS = 1.0
#: A log's events are encoded in parts of at most about this size.
PART_EVENTS = 64
_PART_BYTES = 64 * 1024
#: Data is held twice: as it was read from the log, and as a frame.
_COPIES = 2

STREAM_TURNS = "belay.stream_turns"


def stream_turns() -> Turns:
    """Return the turns of the streams of this web process."""
    found: Turns = current_app.extensions[STREAM_TURNS]
    return found


#: Starts watching a client's socket, and calls the given function when it closes. Returns a
#: function that stops the watch and returns whether the client has disconnected.
WatchClient = Callable[[Callable[[], None]], Callable[[], bool]]


class Share(Protocol):
    """The memory that the large parts of one response hold, out of a limit for all responses."""

    @property
    def caller(self) -> str | None:
        """The caller whose response it is."""

    def hold(self, size: int, *, seconds: float) -> bool:
        """Reserve `size` bytes. Wait up to `seconds` for other responses to be sent; return False
        on timeout."""

    def shrink(self, size: int) -> None:
        """Release what is held beyond `size` bytes."""

    def release(self) -> None:
        """Release everything, when it has been sent."""


@dataclass(frozen=True, slots=True)
class StreamClient:
    """One client of one streamed response."""

    watch: WatchClient
    share: Share
    turns: Turns

    def parts_of(self, parts: Parts) -> Parts:
        """Return parts whose database connections count against this client's caller."""
        database = parts.database.counted_for(self.share.caller)
        return dataclasses.replace(parts, database=database)

    def turn(self) -> AbstractContextManager[None]:
        """Wait for this client's turn to work on its stream."""
        return self.turns.turn(self.share.caller)

    def wait_for_share(
        self, size: int, subscription: Subscription, beat: bytes
    ) -> Generator[bytes, None, bool]:
        """Yield `beat` until the response may hold `size` bytes. Return False when the client has
        disconnected."""
        while not self.share.hold(size, seconds=_WAIT_SECONDS):
            if subscription.client_left:
                return False
            yield beat
        return True

    def whole_event(
        self, event_log: EventLog, log_id: UUID, event: Event, subscription: Subscription
    ) -> Generator[bytes, None, Event | None]:
        """Return the event with its data. Yield heartbeats until the client's share has room for
        it, then read it from the log. Return None when the log no longer has it, Redis fails, or
        the client has disconnected.

        The caller releases the share when the event has been sent.
        """
        size = event.left_in_log * _COPIES
        if size and not (yield from self.wait_for_share(size, subscription, HEARTBEAT)):
            return None
        try:
            return event_log.read_whole(log_id, event)
        except RedisError as error:
            log.warning("cannot read an event of log %s, leaving it out: %s", log_id, error)
            return None


def in_parts(events: Sequence[Event]) -> Iterator[list[Event]]:
    """Split events into parts. An event whose data was left in the log is a part alone. The others
    are grouped into parts that are translated within a few milliseconds."""
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


def is_large_part(part: Sequence[Event]) -> bool:
    """Return whether a part is one event that is too large for a turn."""
    return len(part) == 1 and len(part[0].data) > _PART_BYTES
