"""Stream a thread with version 2 of the streaming protocol (the SDK's `threads.stream`).

The events of the thread's runs are translated from the start for each client. An event's `seq` is
made of the time when its run began and the event's number in the run. So a client that reconnects
with `since`, to any web process, receives the events after it, and none twice.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import orjson
from langgraph_sdk.stream.subscription import matches_subscription

from belay_server.api.streaming.clients import PART_EVENTS, StreamClient
from belay_server.api.streaming.frames import GAP, frame
from belay_server.api.streaming.runs import StreamBody
from belay_server.api.streaming.threads import RunEntry, ThreadPosition, walk_thread
from belay_server.bus.event_log import START, Event
from belay_server.bus.run_feed import Subscription
from belay_server.db import runs as run_rows
from belay_server.domain.errors import TooMany, Unavailable
from belay_server.domain.runs import RunStatus
from belay_server.graphs.protocol.events import ProtocolEvent, RunTranslator
from belay_server.graphs.serde import to_json
from belay_server.services.parts import Parts
from belay_server.states import jobs as state_jobs
from belay_server.states.jobs import with_fragments

#: A run may have this many events per millisecond before its `seq` reaches that of the thread's
#: next run. With a larger factor, `seq` would exceed JavaScript's safe integers.
_EVENTS_PER_MS = 1000
#: The size of a string in memory, without its characters.
_BYTES_PER_NAME = 64


@dataclass(frozen=True, slots=True)
class EventFilter:
    """The events that a client subscribes to. `since`: only events with a greater `seq`."""

    channels: tuple[str, ...]
    namespaces: tuple[tuple[str, ...], ...] | None = None
    depth: int | None = None
    since: int = -1

    @property
    def size(self) -> int:
        """Return the approximate size of the filter in memory, in bytes."""
        names = itertools.chain(self.channels, *(self.namespaces or ()))
        return sum(len(name) + _BYTES_PER_NAME for name in names)

    def passes(self, event: Mapping[str, Any]) -> bool:
        definition: Any = {"channels": self.channels, "namespaces": self.namespaces}
        if self.depth is not None:
            definition["depth"] = self.depth
        return event["seq"] > self.since and matches_subscription(event, definition)  # type: ignore[arg-type]


_GAP_MESSAGE = b'{"type":"gap"}\n'
#: Encodes one event for the connection, from its method, its `seq` and its JSON.
Frame = Callable[[str, int, bytes], bytes]


def sse_frame(method: str, seq: int, data: bytes) -> bytes:
    """Return an event as a server-sent event whose id is `seq` (HTML standard, section 9.2)."""
    return frame(method, data, seq)


def line_frame(_method: str, _seq: int, data: bytes) -> bytes:
    """Return an event for a WebSocket, where each line is a separate message."""
    return data + b"\n"


def stream_protocol(
    parts: Parts, thread_id: UUID, wanted: EventFilter, frame: Frame, client: StreamClient
) -> StreamBody:
    """Stream the past and future events of the thread that pass the filter, until the thread is
    deleted or the client disconnects."""
    caller = client.share.caller
    encoder = _ProtocolEncoder(client.parts_of(parts), thread_id, wanted, frame, caller)
    return walk_thread(parts, thread_id, ThreadPosition(START), encoder, client)


class _ProtocolEncoder:
    """Translates a thread's events into the protocol's, for one client."""

    def __init__(
        self,
        parts: Parts,
        thread_id: UUID,
        wanted: EventFilter,
        frame: Frame,
        caller: str | None,
    ) -> None:
        self._parts = parts
        self._caller = caller
        self._thread_id = thread_id
        self._wanted = wanted
        self._frame = frame
        self._translator = RunTranslator(None)
        self._seq = 0

    def wants_run(self, _entry: RunEntry) -> bool:
        return True

    def wants_change(self, _event: Event) -> bool:
        return False

    def encode_change(self, _event: Event) -> bytes:
        return b""

    def wants_event(self, _event: Event) -> bool:
        """Return True: events that the filter drops are numbered too."""
        return True

    def begin_run(self, entry: RunEntry) -> bytes:
        self._translator = RunTranslator(self._graph_of(entry.run_id))
        began_ms = entry.position.claim_no  # a thread's log has Redis' own ids: the time
        self._seq = began_ms * _EVENTS_PER_MS
        return self._frames(entry, self._translator.begin(), began_ms)

    def encode_events(self, entry: RunEntry, events: Iterable[Event]) -> bytes:
        now = _now_ms()
        return b"".join(
            self._frames(entry, self._translator.translate(event.name, self._data_of(event)), now)
            for event in events
        )

    def _data_of(self, event: Event) -> Any:
        """Return an event's data. The parts of large data stay encoded, except messages."""
        small = self._parts.settings.large_state_bytes
        if len(event.data) <= small or event.name.startswith("messages"):
            return orjson.loads(event.data)
        return with_fragments(
            self._parts.states.run_for(self._caller, state_jobs.split, event.data)
        )

    def gap(self) -> bytes:
        """Return a comment for server-sent events. A WebSocket has no comments: it gets a message
        without a method, which clients ignore as they do the responses to commands."""
        return GAP if self._frame is sse_frame else _GAP_MESSAGE

    def end_run(self, entry: RunEntry, run: Subscription) -> Iterator[bytes]:
        """Yield the last events in batches: a run may end with thousands of interrupts, each of
        which is an event."""
        status, error, interrupts = self._end_of(entry.run_id, run.end_status)
        events = self._translator.end(status, error, interrupts)
        now = _now_ms()
        return (self._frames(entry, some, now) for some in _batches(events, PART_EVENTS))

    def _graph_of(self, run_id: UUID) -> str | None:
        try:
            with self._parts.database.connection() as conn:
                run = run_rows.get_run(conn, run_id)
        except (Unavailable, TooMany):
            return None
        return None if run is None else run.graph_id

    def _end_of(
        self, run_id: UUID, log_status: str | None
    ) -> tuple[str | None, Mapping[str, Any] | None, list[Any]]:
        """Return the run's status, error and interrupts from its row. When the row is deleted or
        cannot be read now, return the status from the run's log."""
        try:
            with self._parts.database.connection() as conn:
                now = run_rows.run_end(conn, self._thread_id, run_id)
        except (Unavailable, TooMany):
            now = None
        if now is None:
            return log_status, None, []
        asks = (now.interrupts or []) if now.status == RunStatus.SUCCESS else []
        return now.status, now.error, asks

    def _frames(self, entry: RunEntry, events: Iterable[ProtocolEvent], timestamp: int) -> bytes:
        frames = []
        for method, namespace, data in events:
            seq = self._seq
            event = {
                "type": "event",
                "event_id": f"{entry.run_id}:{seq}",
                "seq": seq,
                "method": method,
                "params": {"namespace": list(namespace), "timestamp": timestamp, "data": data},
            }
            self._seq += 1
            if self._wanted.passes(event):
                frames.append(self._frame(method, seq, to_json(event)))
        return b"".join(frames)


def _batches(events: Iterable[ProtocolEvent], size: int) -> Iterator[list[ProtocolEvent]]:
    rest = iter(events)
    while batch := list(itertools.islice(rest, size)):
        yield batch


def _now_ms() -> int:
    return int(time.time() * 1000)
