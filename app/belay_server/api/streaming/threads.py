"""Stream a thread to a client: the events of its runs, one after the other, and its own changes.

A thread's log records where its runs begin and its other changes. The events of a run are in the
run's log. A frame's id has a position in both: an entry of the thread's log, then an event of the
run that the entry names. The stream ends when the thread is deleted or the client disconnects.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol
from uuid import UUID

import orjson

from belay_server.api.http.bodies.chunks import in_chunks
from belay_server.api.streaming.clients import StreamClient, in_parts, is_large_part
from belay_server.api.streaming.frames import GAP, HEARTBEAT, frame
from belay_server.api.streaming.runs import (
    HEADERS,
    StreamBody,
    follows_directly,
    when_redis_answers,
)
from belay_server.bus.client import RedisError
from belay_server.bus.event_log import (
    END_SEQ,
    NOT_KNOWN,
    RUN_STARTED,
    START,
    THREAD_DELETED,
    Event,
    EventLog,
    Position,
    just_before,
)
from belay_server.bus.run_feed import Subscription
from belay_server.db import threads as thread_rows
from belay_server.db.postgres.pool import Database
from belay_server.domain.errors import InvalidRequest, NotFound
from belay_server.graphs.serde import to_json
from belay_server.services.parts import Parts

log = logging.getLogger(__name__)

THREAD_STREAM_MODES = ("run_modes", "lifecycle", "state_update")


@dataclass(frozen=True, slots=True)
class ThreadPosition:
    """A position in a thread's stream: an entry of its log, and a position in the entry's run."""

    entry: Position
    in_run: Position = START

    @classmethod
    def parse(cls, text: str) -> ThreadPosition:
        """Return the position that a `Last-Event-ID` names. Raises InvalidRequest."""
        numbers = text.split("-")
        try:
            entry, in_run = "-".join(numbers[:2]), "-".join(numbers[2:])
            return cls(Position.parse(entry), Position.parse(in_run))
        except ValueError:
            raise InvalidRequest(f"Invalid Last-Event-ID: {text}") from None

    def __str__(self) -> str:
        return f"{self.entry}-{self.in_run}"


@dataclass(frozen=True, slots=True)
class FollowedThread:
    """A thread that a client follows, and how. `after` None: only new events."""

    thread_id: UUID
    modes: frozenset[str]
    after: ThreadPosition | None


def follow_thread(
    database: Database, thread_id: UUID, modes: frozenset[str], last_event_id: str | None
) -> FollowedThread:
    """Return a thread as one that a client follows.

    Raises NotFound for an unknown thread, InvalidRequest for an invalid `Last-Event-ID`.
    """
    with database.connection() as conn:
        if thread_rows.get_thread(conn, thread_id) is None:
            raise NotFound(f"Thread with ID {thread_id} not found")
    if last_event_id is None:
        return FollowedThread(thread_id, modes, None)
    if last_event_id in ("-", "0", "-1", "0-0", ""):
        return FollowedThread(thread_id, modes, ThreadPosition(START))
    return FollowedThread(thread_id, modes, ThreadPosition.parse(last_event_id))


def stream_thread(parts: Parts, followed: FollowedThread, client: StreamClient) -> StreamBody:
    """Stream server-sent events, each with an id, and heartbeat comments."""
    after = followed.after
    try:
        now = _from_now_on(parts.event_log, followed.thread_id)
        old, after = now.entry, after or now
    except RedisError as error:
        log.warning("cannot read the log of thread %s: %s", followed.thread_id, error)
        old = Position(int(time.time() * 1000), 0)  # Redis' own ids are the time
    encoder = _SseEncoder(followed.modes, old)
    return walk_thread(parts, followed.thread_id, after, encoder, client)


@dataclass(frozen=True, slots=True)
class RunEntry:
    """An entry of a thread's log: an attempt of a run begins."""

    position: Position
    run_id: UUID
    claim_no: int
    resumable: bool


class ThreadEncoder(Protocol):
    """Selects the events of a thread that a client receives, and encodes them as chunks."""

    def wants_run(self, entry: RunEntry, /) -> bool:
        """Return whether the client receives this run."""

    def wants_change(self, event: Event, /) -> bool:
        """Return whether the client receives this change of the thread itself."""

    def encode_change(self, event: Event, /) -> bytes:
        """Encode a change of the thread itself."""

    def wants_event(self, event: Event, /) -> bool:
        """Return whether the client receives this event of a run, before its data is read."""

    def begin_run(self, entry: RunEntry, /) -> bytes:
        """Return what precedes the events of a run."""

    def encode_events(self, entry: RunEntry, events: Iterable[Event]) -> bytes:
        """Encode the next events of the run."""

    def gap(self) -> bytes:
        """Return a mark for missing events of the run."""

    def end_run(self, entry: RunEntry, run: Subscription) -> Iterator[bytes]:
        """Yield what follows the last event of a run that has ended, in parts."""


def walk_thread(
    parts: Parts,
    thread_id: UUID,
    after: ThreadPosition | None,
    encoder: ThreadEncoder,
    client: StreamClient,
) -> StreamBody:
    """Follow a thread from a position; from now on if it is None. Yield the chunks that `encoder`
    encodes, and heartbeats."""
    parts = client.parts_of(parts)
    # The entry at the client's position is read again: its run may not have ended.
    first = NOT_KNOWN if after is None else just_before(after.entry)
    subscription = parts.feed.subscribe(thread_id, after=first, has_row=False)
    walk = _ThreadWalk(parts, thread_id, encoder, client, subscription=subscription, after=after)
    return StreamBody(parts, subscription, walk.chunks())


def has_no_events(event_log: EventLog, thread_id: UUID) -> bool:
    """Return whether a stream of the thread is known to begin with no past events."""
    try:
        return not event_log.read_newest(thread_id, count=1)
    except RedisError as error:
        log.warning("cannot read the log of thread %s: %s", thread_id, error)
        return False


def _from_now_on(event_log: EventLog, thread_id: UUID) -> ThreadPosition:
    """Return the thread's current position, which may be in the middle of a run. May raise
    RedisError."""
    newest = event_log.read_newest(thread_id, count=1)
    if not newest:
        return ThreadPosition(START)
    in_run = Position(0, END_SEQ)
    if newest[-1].name == RUN_STARTED:
        in_run = event_log.last_position(UUID(orjson.loads(newest[-1].data)["run_id"]))
    return ThreadPosition(newest[-1].position, in_run)


class _ThreadWalk:
    """Follows a thread for one client: its log, and the log of each run that it names."""

    def __init__(
        self,
        parts: Parts,
        thread_id: UUID,
        encoder: ThreadEncoder,
        client: StreamClient,
        *,
        subscription: Subscription,
        after: ThreadPosition | None,
    ) -> None:
        self._parts = parts
        self._thread_id = thread_id
        self._encoder = encoder
        self._client = client
        self._thread = subscription
        self._after = after or ThreadPosition(NOT_KNOWN)
        self._run: Subscription | None = None
        self._over: UUID | None = None

    def chunks(self) -> Generator[bytes]:
        stop_watching = self._client.watch(self._leave)
        heartbeat = self._parts.settings.heartbeat_seconds
        try:
            yield HEADERS
            if self._after.entry == NOT_KNOWN:
                yield from self._begin_when_redis_answers()
            beat_at = time.monotonic() + heartbeat
            while not self._thread.client_left:
                events = self._thread.take(beat_at)
                for event in events:
                    if event.name == THREAD_DELETED:
                        return
                    yield from self._chunks_of(event, heartbeat)
                if not events or time.monotonic() >= beat_at:
                    beat_at = time.monotonic() + heartbeat
                    if not self._thread.client_left:
                        yield HEARTBEAT
        finally:
            stop_watching()
            self._client.share.release()
            self._parts.feed.unsubscribe(self._thread)
            if self._run is not None:
                self._parts.feed.unsubscribe(self._run)

    def _begin_when_redis_answers(self) -> Generator[bytes]:
        ask = partial(_from_now_on, self._parts.event_log, self._thread_id)
        self._after = yield from when_redis_answers(self._thread, ask, self._after)
        self._thread.begin_after(just_before(self._after.entry))
        if chunk := self._encoder.gap():
            yield chunk

    def _leave(self) -> None:
        self._thread.leave()
        if self._run is not None:
            self._run.leave()

    def _chunks_of(self, event: Event, heartbeat: float) -> Generator[bytes]:
        if event.position < self._after.entry:
            return
        if event.name == RUN_STARTED:
            yield from self._chunks_of_run(_run_entry(event), heartbeat)
        elif event.position > self._after.entry:
            yield from self._chunks_of_change(event)

    def _chunks_of_change(self, event: Event) -> Generator[bytes]:
        if not self._encoder.wants_change(event):
            return
        whole = yield from self._client.whole_event(
            self._parts.event_log, self._thread_id, event, self._thread
        )
        if whole is not None:
            yield from in_chunks(self._encoder.encode_change(whole))
        self._client.share.release()

    def _chunks_of_run(self, entry: RunEntry, heartbeat: float) -> Generator[bytes]:
        """Yield a run from its start, or from the client's position in it, to its end."""
        is_here = entry.position == self._after.entry
        after = self._after.in_run if is_here else Position(entry.claim_no, 0)
        if after.seq >= END_SEQ:
            self._over = entry.run_id
        if entry.run_id == self._over:
            return  # each attempt has an entry, and the run was followed to its end
        if not is_here and not self._encoder.wants_run(entry):
            return
        run = self._run = self._parts.feed.subscribe(entry.run_id, after=after)
        try:
            if chunk := self._encoder.begin_run(entry):
                yield chunk
            last = after
            while not run.drained and not run.client_left:
                events = run.take(time.monotonic() + heartbeat)
                for some, is_behind_gap in _without_gaps(events, last):
                    if is_behind_gap and (chunk := self._encoder.gap()):
                        yield chunk
                    for part in in_parts(some):
                        yield from self._chunks_of_events(entry, run, part)
                last = events[-1].position if events else last
                if not events and not run.ended and not run.client_left:
                    yield HEARTBEAT
        finally:
            self._parts.feed.unsubscribe(run)
            self._run = None
        if run.misses_end and not run.client_left and (chunk := self._encoder.gap()):
            yield chunk
        if not run.client_left:
            self._over = entry.run_id
            yield from self._in_turns(self._encoder.end_run(entry, run))

    def _chunks_of_events(
        self, entry: RunEntry, run: Subscription, events: list[Event]
    ) -> Generator[bytes]:
        """Yield the chunks of small events, or of one large event, whose data is read now."""
        if events[0].left_in_log and self._encoder.wants_event(events[0]):
            whole = yield from self._client.whole_event(
                self._parts.event_log, entry.run_id, events[0], run
            )
            if whole is None:
                if chunk := self._encoder.gap():
                    yield chunk
                return
            events = [whole]
        if is_large_part(events):  # another process may have to translate it
            chunk = self._encoder.encode_events(entry, events)
        else:
            with self._client.turn():
                chunk = self._encoder.encode_events(entry, events)
        yield from in_chunks(chunk)
        self._client.share.release()

    def _in_turns(self, parts: Iterator[bytes]) -> Generator[bytes]:
        while True:
            with self._client.turn():
                chunk = next(parts, None)
            if chunk is None:
                return
            if chunk:
                yield chunk


def _without_gaps(events: Sequence[Event], last: Position) -> Iterator[tuple[list[Event], bool]]:
    """Yield the events in parts without gaps, and whether there is a gap before each part."""
    part: list[Event] = []
    is_behind_gap = False
    for event in events:
        if not follows_directly(last, event.position):
            if part:
                yield part, is_behind_gap
            part, is_behind_gap = [], True
        part.append(event)
        last = event.position
    if part:
        yield part, is_behind_gap


def _run_entry(event: Event) -> RunEntry:
    data = orjson.loads(event.data)
    return RunEntry(event.position, UUID(data["run_id"]), data["claim_no"], data["resumable"])


@dataclass(frozen=True, slots=True)
class _SseEncoder:
    """Encodes the events as the runs have emitted them, each with an id to resume from."""

    modes: frozenset[str]
    #: Runs up to this position are replayed, if they are resumable.
    old: Position

    def wants_run(self, entry: RunEntry) -> bool:
        return entry.resumable or entry.position > self.old

    def wants_change(self, event: Event) -> bool:
        return event.name in self.modes

    def encode_change(self, event: Event) -> bytes:
        return frame(event.name, event.data, ThreadPosition(event.position))

    def begin_run(self, _entry: RunEntry) -> bytes:
        return b""

    def wants_event(self, event: Event) -> bool:
        return "run_modes" in self.modes or ("lifecycle" in self.modes and event.name == "metadata")

    def encode_events(self, entry: RunEntry, events: Iterable[Event]) -> bytes:
        return b"".join(
            frame(event.name, event.data, ThreadPosition(entry.position, event.position))
            for event in events
            if self.wants_event(event)
        )

    def gap(self) -> bytes:
        return GAP if "run_modes" in self.modes else b""

    def end_run(self, entry: RunEntry, run: Subscription) -> Iterator[bytes]:
        if not self.modes & {"run_modes", "lifecycle"}:
            return
        done = to_json({"status": "run_done", "run_id": str(entry.run_id)})
        end = Position(run.position.claim_no, END_SEQ)
        yield frame("metadata", done, ThreadPosition(entry.position, end))
