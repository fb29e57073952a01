"""The event log of a run: one Redis stream, written by its worker, read by the web processes.

Events have explicit ids, `<claim_no>-<seq>`. So they are unique and strictly increasing, serve as
SSE ids, and Redis refuses what a worker writes after another one has claimed the run. Events that
were emitted together share one entry of the stream, which has the id of the last one: an entry of
many events costs the writer, Redis and every reader little more than an entry of one. The data of a
large event is in a hash beside the stream. Following a log therefore stays cheap, and a web process
reads the data when the client is ready to receive it. The last event is the end marker. A log may
be lost; the end of a run is in Postgres, and only a small outcome is also announced.

A thread has a log too, which names its runs.
"""

from __future__ import annotations

import re
import secrets
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from uuid import UUID

import orjson
import redis

from belay_server.bus.client import Keys
from belay_server.configuration.settings import Settings
from belay_server.runtime.turns import yield_to_sockets

#: Name of the event that marks the end; its data is {"status": …, "emitted": …}, the fields of a
#: `LogEnd`. It is never sent to clients.
END = "__end__"
END_SEQ = 2**62
#: Events of a thread's log: the start of a run, and changes of the thread itself.
RUN_STARTED = "run_started"
STATE_UPDATE = "state_update"
THREAD_DELETED = "thread_deleted"
#: Redis allows 64 bits. Claims count from 1, and no log has 10^18 events.
_ID = re.compile(r"([0-9]{1,18})-([0-9]{1,19})", re.ASCII)
#: The most events and bytes of one entry, unless a single event is larger.
_ENTRY_EVENTS = 500
_ENTRY_BYTES = 256 * 1024
#: The data of events above this size, in bytes, is stored in the hash.
LARGE_EVENT = _ENTRY_BYTES
#: The size of the parts in which it is stored and read.
_PART_BYTES = 256 * 1024
#: The number of large events of a thread's log whose data is kept.
_THREAD_PLACES = 4
#: Seconds for which the log of a deleted thread or run can still be read.
_FORGET_SECONDS = 30
#: Seconds without a further attempt after deleting an old log has failed.
_NO_DROP_SECONDS = 5.0


class Position(NamedTuple):
    """The position of an event in a log. Positions compare in the order of the events."""

    claim_no: int
    seq: int

    @classmethod
    def parse(cls, event_id: str) -> Position:
        """Parse an event id. Raises ValueError when it is not one."""
        found = _ID.fullmatch(event_id)
        if found is None:
            raise ValueError(f"not an event id: {event_id!r}")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.claim_no}-{self.seq}"


START = Position(0, 0)
#: After every event: for a client that gets only new events, until it is known which are new.
NOT_KNOWN = Position(END_SEQ, 0)


class Event(NamedTuple):
    """An event. `data` is JSON as bytes; `name` and `data` have no line breaks."""

    position: Position
    name: str
    data: bytes
    #: The size of data in the hash, which `EventLog.read_whole` reads, and its token there.
    left_in_log: int = 0
    token: bytes = b""


@dataclass(frozen=True, slots=True)
class LogEnd:
    """The end of a run. `status` is None for one that was rolled back. `error` is set when the
    run's worker could not write it to the log. `answer` is what clients that wait for the run get,
    as JSON; they read it from Postgres if it is empty. `emitted` is the sequence number of the last
    event of the attempt, in the log or lost; None if it is not known."""

    run_id: UUID
    claim_no: int
    status: str | None
    error: dict[str, str] | None = None
    answer: bytes = b""
    emitted: int | None = None


def just_before(position: Position) -> Position:
    """Return the last position before this one."""
    if position.seq > 0:
        return Position(position.claim_no, position.seq - 1)
    return Position(position.claim_no - 1, END_SEQ) if position.claim_no > 0 else START


@dataclass(frozen=True, slots=True)
class Started:
    """The start of an attempt on a thread that clients may follow."""

    thread_id: UUID
    resumable: bool


@dataclass(frozen=True, slots=True)
class EventBatch:
    """Events of one run to append. With `started`, they are the first of an attempt, and the
    thread's log gets an entry of it."""

    run_id: UUID
    events: Sequence[Event]
    written: Written
    started: Started | None = None


class Chunk(NamedTuple):
    """The result of one read. `more` is set when there may be further events already."""

    events: list[Event]
    more: bool


class EventLog:
    """Appends to, reads and expires event logs. Every method may raise redis.RedisError.

    For `ttl_seconds` it keeps about the newest `max_events` events of a run, and of each of its
    attempts about the newest `max_bytes`.
    """

    def __init__(
        self,
        client: redis.Redis,
        keys: Keys,
        *,
        ttl_seconds: int,
        max_events: int,
        max_bytes: int = 64 * 1024 * 1024,
    ) -> None:
        self._client = client
        self._keys = keys
        self._ttl_seconds = ttl_seconds
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._written = Written()
        self._no_drop_before = 0.0

    @classmethod
    def of(cls, settings: Settings, client: redis.Redis, keys: Keys) -> EventLog:
        return cls(
            client,
            keys,
            ttl_seconds=settings.event_log_ttl_seconds,
            max_events=settings.event_log_max_events,
            max_bytes=settings.event_log_max_bytes,
        )

    def append(
        self, run_id: UUID, events: Sequence[Event], *, started: Started | None = None
    ) -> None:
        """Append events of a run, as `append_batches`. Only of one run at a time."""
        self.append_batches([EventBatch(run_id, events, self._written, started)])

    def append_batches(self, batches: Sequence[EventBatch]) -> None:
        """Append events of several runs and notify the readers, in one round trip."""
        with self._client.pipeline(transaction=False) as pipe:
            for batch in batches:
                if batch.started is not None:
                    said = {
                        "run_id": str(batch.run_id),
                        "claim_no": batch.events[0].position.claim_no,
                        "resumable": batch.started.resumable,
                    }
                    self._note(pipe, batch.started.thread_id, RUN_STARTED, orjson.dumps(said))
                nudge = str(batch.run_id).encode()
                self._add(pipe, batch.run_id, batch.events, batch.written, nudge=nudge)
            _refuse_all_but_stale(pipe.execute(raise_on_error=False))

    def append_ends(self, ends: Sequence[LogEnd]) -> None:
        """Append the end markers of runs, in one round trip."""
        with self._client.pipeline(transaction=False) as pipe:
            for end in ends:
                nudge = b"%b!%b" % (str(end.run_id).encode(), end.answer)
                self._add(pipe, end.run_id, _end_events(end), Written(), nudge=nudge)
            _refuse_all_but_stale(pipe.execute(raise_on_error=False))

    def _add(
        self, pipe: Any, run_id: UUID, events: Sequence[Event], written: Written, *, nudge: bytes
    ) -> None:
        key, large_key = self._keys.event_log(run_id), self._keys.large_events(run_id)
        for entry in _entries(events):
            last = entry[-1].position
            names = b"\n".join(event.name.encode() for event in entry)
            data = b"\n".join(event.data for event in entry)
            size = len(names) + len(data)
            oldest = written.oldest_to_keep(run_id, last, size, self._max_bytes)
            if large := written.dropped_large():
                pipe.execute_command("HDEL", large_key, *large)
            fields: tuple[bytes, ...] = (b"e", names, b"d", data)
            if len(data) > LARGE_EVENT:
                token = str(last).encode()
                fields = _apart(names, data, token)
                self._put_apart(pipe, large_key, token, data)
            # redis-py's own xadd takes longer to build the command than Redis to execute it.
            pipe.execute_command("XADD", key, *self._trim(last, oldest), str(last), *fields)
        pipe.execute_command("EXPIRE", key, self._ttl_seconds)
        pipe.execute_command("PUBLISH", self._keys.dirty, nudge)

    def append_to_thread(self, thread_id: UUID, name: str, data: bytes) -> None:
        """Append to the log of a thread. Redis generates the ids of its entries."""
        with self._client.pipeline(transaction=False) as pipe:
            self._note(pipe, thread_id, name, data)
            pipe.execute()

    def _note(self, pipe: Any, thread_id: UUID, name: str, data: bytes) -> None:
        key = self._keys.event_log(thread_id)
        fields: tuple[bytes, ...] = (b"e", name.encode(), b"d", data)
        if len(data) > LARGE_EVENT:
            # The data of the newest few is kept: an older event finds a token that is not its own.
            token = secrets.token_hex(8).encode()
            fields = _apart(name.encode(), data, token)
            self._put_apart(pipe, self._keys.large_events(thread_id), token, data)
        pipe.execute_command("XADD", key, "MAXLEN", "~", self._max_events, "*", *fields)
        pipe.execute_command("EXPIRE", key, self._ttl_seconds)
        pipe.execute_command("PUBLISH", self._keys.dirty, str(thread_id))

    def _put_apart(self, pipe: Any, key: str, token: bytes, data: bytes) -> None:
        view = memoryview(data)
        parts: list[bytes] = []
        for at, place in zip(
            range(0, len(data), _PART_BYTES), _places(token, len(data)), strict=True
        ):
            parts += (place, token + view[at : at + _PART_BYTES])
        pipe.execute_command("HSET", key, *parts)
        pipe.execute_command("EXPIRE", key, self._ttl_seconds)

    def _trim(self, last: Position, oldest: int) -> tuple[str, ...]:
        """Return the arguments that trim the log, by sequence number: entries have different
        numbers of events."""
        if last.seq >= END_SEQ - 1:
            return ()
        oldest = max(oldest, last.seq - self._max_events)
        return ("MINID", "~", f"{last.claim_no}-{oldest}") if oldest > 0 else ()

    def forget(self, ids: Sequence[UUID]) -> None:
        """Let the logs of these runs and threads expire soon, after followers have read the end."""
        if not ids:
            return
        with self._client.pipeline(transaction=False) as pipe:
            for log_id in ids:
                pipe.expire(self._keys.event_log(log_id), _FORGET_SECONDS)
                pipe.expire(self._keys.large_events(log_id), _FORGET_SECONDS)
            pipe.execute()

    def drop(self, log_id: UUID) -> None:
        """Delete the log of a deleted run or thread that had this id before.

        After a failure, nothing is attempted for some seconds: the caller holds a database
        connection, and a Redis that hangs takes seconds to fail.
        """
        if time.monotonic() < self._no_drop_before:
            return
        try:
            self._client.delete(self._keys.event_log(log_id), self._keys.large_events(log_id))
        except redis.RedisError:
            self._no_drop_before = time.monotonic() + _NO_DROP_SECONDS
            raise

    def read_after(self, run_id: UUID, last: Position, *, count: int) -> Chunk:
        """Return the events of up to `count` entries after `last` (exclusive)."""
        return self.read_many({run_id: last}, count=count)[run_id]

    def read_many(self, positions: dict[UUID, Position], *, count: int) -> dict[UUID, Chunk]:
        """Return, for each run, the events of up to `count` entries after its position. This takes
        one round trip."""
        with self._client.pipeline(transaction=False) as pipe:
            for run_id, last in positions.items():
                pipe.xrange(self._keys.event_log(run_id), f"({last}", count=count)
            answers = pipe.execute()
        found = {}
        for run_id, entries in zip(positions, answers, strict=True):
            found[run_id] = Chunk(list(_after(positions[run_id], entries)), len(entries) == count)
            if len(entries) > 1:
                yield_to_sockets()
        return found

    def read_whole(self, run_id: UUID, event: Event) -> Event | None:
        """Return the event with its data, or None when the log no longer has it."""
        if not event.left_in_log:
            return event
        key = self._keys.large_events(run_id)
        parts: list[bytes] = []
        for place in _places(event.token, event.left_in_log):
            found: Any = self._client.hget(key, place)
            if found is None or not found.startswith(event.token):
                return None
            parts.append(found[len(event.token) :])
            yield_to_sockets()
        return Event(event.position, event.name, b"".join(parts))

    def read_newest(self, run_id: UUID, *, count: int) -> list[Event]:
        """Return the events of the newest `count` entries, oldest first."""
        entries: Any = self._client.xrevrange(self._keys.event_log(run_id), count=count)
        return list(_after(START, reversed(entries)))

    def last_position(self, run_id: UUID) -> Position:
        """Return the position of the newest event, START when there is none."""
        newest: Any = self._client.xrevrange(self._keys.event_log(run_id), count=1)
        return Position.parse(newest[0][0].decode()) if newest else START


class Written:
    """Counts what an attempt has written to the log of its run."""

    def __init__(self) -> None:
        self._of: tuple[UUID, int] | None = None
        #: The last sequence number and the size of each entry, oldest first.
        self._entries: deque[tuple[int, int]] = deque()
        self._bytes = 0
        #: The last sequence number of what has been dropped.
        self._dropped = 0
        self._dropped_large: list[bytes] = []

    def dropped_large(self) -> list[bytes]:
        """Return the places of the data of large events that were dropped since the last call."""
        dropped, self._dropped_large = self._dropped_large, []
        return dropped

    def oldest_to_keep(self, run_id: UUID, last: Position, size: int, most: int) -> int:
        """Count an entry, once if it is written again. Return the sequence number from which on the
        entries fit into `most` bytes, the newest entry in any case; 0 while all of them fit."""
        if last.seq >= END_SEQ - 1:
            return 0
        if self._of != (run_id, last.claim_no):
            self._of, self._bytes = (run_id, last.claim_no), 0
            self._entries.clear()
            self._dropped = 0
        if not self._entries or last.seq > self._entries[-1][0]:
            self._entries.append((last.seq, size))
            self._bytes += size
        while self._bytes > most and len(self._entries) > 1:
            self._dropped, dropped_size = self._entries.popleft()
            self._bytes -= dropped_size
            if dropped_size > LARGE_EVENT:
                token = str(Position(last.claim_no, self._dropped)).encode()
                self._dropped_large += _places(token, dropped_size)
        return self._dropped + 1 if self._dropped else 0


def _entries(events: Iterable[Event]) -> Iterator[list[Event]]:
    """Group consecutive events into entries."""
    entry: list[Event] = []
    size = 0
    for event in events:
        follows = entry and event.position == (entry[-1].position[0], entry[-1].position[1] + 1)
        full = len(entry) >= _ENTRY_EVENTS or size + len(event.data) > _ENTRY_BYTES
        if entry and (full or not follows):
            yield entry
            entry, size = [], 0
        entry.append(event)
        size += len(event.data)
    if entry:
        yield entry


def _after(last: Position, entries: Iterable[tuple[bytes, dict[bytes, bytes]]]) -> Iterator[Event]:
    """Yield the events of entries that are after a position. The first entry may begin before."""
    for entry_id, fields in entries:
        claim_no, newest = map(int, entry_id.split(b"-"))
        names = fields[b"e"].decode().split("\n")
        if b"s" in fields:
            position = Position(claim_no, newest)
            if position > last:
                yield Event(position, names[0], b"", int(fields[b"s"]), fields[b"t"])
            continue
        first = newest - len(names) + 1
        for offset, (name, data) in enumerate(zip(names, fields[b"d"].split(b"\n"), strict=True)):
            position = Position(claim_no, first + offset)
            if position > last:
                yield Event(position, name, data)


def _apart(names: bytes, data: bytes, token: bytes) -> tuple[bytes, ...]:
    """Return the fields of an entry whose data is in the hash."""
    return (b"e", names, b"s", b"%d" % len(data), b"t", token)


def _places(token: bytes, size: int) -> list[bytes]:
    """Return the names of the parts of data in the hash. Each event of a run has its own, those of
    a thread share a few."""
    name = token if b"-" in token else b"%d" % (int(token, 16) % _THREAD_PLACES)
    return [b"%b:%d" % (name, number) for number in range(-(-size // _PART_BYTES))]


def _end_events(end: LogEnd) -> list[Event]:
    data = orjson.dumps({"status": end.status, "emitted": end.emitted})
    last = Event(Position(end.claim_no, END_SEQ), END, data)
    if end.error is None:
        return [last]
    said = Event(Position(end.claim_no, END_SEQ - 1), "error", orjson.dumps(end.error))
    return [said, last]


def _refuse_all_but_stale(answers: Sequence[Any]) -> None:
    """Raise the first error of a pipeline, except the refusal of stale events: those of a worker
    that has lost its lease, or written twice."""
    for answer in answers:
        if isinstance(answer, Exception) and not _is_stale(answer):
            raise answer


def _is_stale(error: Exception) -> bool:
    return isinstance(error, redis.ResponseError) and "equal or smaller" in str(error)
