"""A run's event log: one Redis stream per run, written by its worker, read by every web process.

Ids are explicit, `<claim_no>-<seq>`, so they are unique, strictly increasing, good as SSE ids, and
Redis itself refuses what a worker writes after another has claimed the run. The last entry is the
end marker. A log may be lost; the end of a run is always read again from Postgres.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import orjson
import redis

from app.bus.client import Keys

#: Name of the entry that says a run has ended; its data is {"status": …}. Never sent to a client.
END = "__end__"
_END_SEQ = 2**62
#: Redis takes 64 bits; a claim counts from 1, and no log has 10^18 events.
_ID = re.compile(r"[0-9]{1,18}-[0-9]{1,19}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Event:
    """One entry. `data` is JSON as bytes."""

    id: str
    name: str
    data: bytes


@dataclass(frozen=True, slots=True)
class LogEnd:
    """How a run ended. `status` is None for one that was rolled back; `error` is for an end that
    the run's own worker could not say."""

    run_id: UUID
    claim_no: int
    status: str | None
    error: dict[str, str] | None = None


def id_key(event_id: str) -> tuple[int, int]:
    """An id as numbers, for comparing. Raises ValueError when it is not an id."""
    if _ID.fullmatch(event_id) is None:
        raise ValueError(f"not an event id: {event_id!r}")
    claim_no, _, seq = event_id.partition("-")
    return int(claim_no), int(seq)


class EventLog:
    """Append to, read and expire event logs. Every method may raise redis.RedisError."""

    def __init__(
        self, client: redis.Redis, keys: Keys, *, ttl_seconds: int, max_events: int
    ) -> None:
        self._client = client
        self._keys = keys
        self._ttl_seconds = ttl_seconds
        self._max_events = max_events

    def append(self, run_id: UUID, events: Sequence[Event]) -> None:
        """Add events in one round trip and tell the readers."""
        with self._client.pipeline(transaction=False) as pipe:
            self._add(pipe, run_id, events, nudge=str(run_id))
            _refuse_all_but_stale(pipe.execute(raise_on_error=False))

    def append_ends(self, ends: Sequence[LogEnd]) -> None:
        """Mark the ends of runs, in one round trip."""
        with self._client.pipeline(transaction=False) as pipe:
            for end in ends:
                self._add(pipe, end.run_id, _end_events(end), nudge=f"{end.run_id}!")
            _refuse_all_but_stale(pipe.execute(raise_on_error=False))

    def _add(self, pipe: Any, run_id: UUID, events: Sequence[Event], *, nudge: str) -> None:
        key = self._keys.event_log(run_id)
        for event in events:
            fields: dict[Any, Any] = {b"e": event.name.encode(), b"d": event.data}
            pipe.xadd(key, fields, id=event.id, maxlen=self._max_events, approximate=True)
        pipe.expire(key, self._ttl_seconds)
        pipe.publish(self._keys.dirty, nudge)

    def read_after(self, run_id: UUID, last_id: str, *, count: int) -> list[Event]:
        """Up to `count` events after `last_id` (exclusive)."""
        entries: Any = self._client.xrange(
            self._keys.event_log(run_id), min=f"({last_id}", count=count
        )
        return [_event(entry_id, fields) for entry_id, fields in entries]

    def read_many(self, positions: dict[UUID, str], *, count: int) -> dict[UUID, list[Event]]:
        """The same for many runs, in one round trip."""
        with self._client.pipeline(transaction=False) as pipe:
            for run_id, last_id in positions.items():
                pipe.xrange(self._keys.event_log(run_id), min=f"({last_id}", count=count)
            answers = pipe.execute()
        return {
            run_id: [_event(entry_id, fields) for entry_id, fields in entries]
            for run_id, entries in zip(positions, answers, strict=True)
        }

    def last_id(self, run_id: UUID) -> str:
        """Id of the newest event, "0-0" when there is none."""
        newest: Any = self._client.xrevrange(self._keys.event_log(run_id), count=1)
        return newest[0][0].decode() if newest else "0-0"


def _event(entry_id: bytes, fields: dict[bytes, bytes]) -> Event:
    return Event(entry_id.decode(), fields[b"e"].decode(), fields[b"d"])


def _end_events(end: LogEnd) -> list[Event]:
    last = Event(f"{end.claim_no}-{_END_SEQ}", END, orjson.dumps({"status": end.status}))
    if end.error is None:
        return [last]
    return [Event(f"{end.claim_no}-{_END_SEQ - 1}", "error", orjson.dumps(end.error)), last]


def _refuse_all_but_stale(answers: Sequence[Any]) -> None:
    """A zombie's event, or one written twice, is refused by Redis, as it should be."""
    for answer in answers:
        if isinstance(answer, Exception) and not _is_stale(answer):
            raise answer


def _is_stale(error: Exception) -> bool:
    return isinstance(error, redis.ResponseError) and "equal or smaller" in str(error)
