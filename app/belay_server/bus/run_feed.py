"""Follow the event logs and ends of all runs that a web process has clients for.

A publisher sends the id of a log that has grown, and a small outcome with the end. The feed reads
the changed logs that have subscriptions, all in one round trip, and delivers the events. A message
may be lost. So once a second the feed reads all followed logs, and reads from Postgres which of
those runs have ended. A process has one feed, with one Redis subscription, however many clients are
connected.

Under gunicorn's gevent workers the threads here are greenlets; nothing else differs.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import threading
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Sequence
from uuid import UUID

import orjson
import redis

from belay_server.bus.client import Keys
from belay_server.bus.event_log import END, START, Event, EventLog, Position
from belay_server.domain.errors import Unavailable

log = logging.getLogger(__name__)

EndedRuns = Callable[[Sequence[UUID]], "dict[UUID, str | None]"]

#: The most entries of one log that are read at once. Decoding a full one takes about a millisecond.
_BATCH = 4
_SWEEP_SECONDS = 1.0
_DUE = -math.inf
#: The events and bytes that are buffered for a slow client. Beyond either, nothing is delivered
#: until it has made room; it then continues where it stopped.
_BUFFER_EVENTS = 2_000
_BUFFER_BYTES = 256 * 1024
#: The bytes after which `take` adds no further event.
_TAKE_BYTES = 64 * 1024


class Subscription:
    """One client's view of one run: events after a position, and the end.

    `events=False` is for clients that wait only for the end. There may be very many of these, so a
    subscription is small. It waits for a bare lock, which is held until something happens. A wait
    has no timer of its own: the feed checks all waits once a second and ends those that are due.
    """

    __slots__ = (
        "_buffer",
        "_gate",
        "_on_room",
        "_paused",
        "_size",
        "answer",
        "client_left",
        "end_status",
        "ended",
        "has_row",
        "is_swept",
        "misses_end",
        "position",
        "run_id",
        "wake_at",
        "wants_events",
    )

    def __init__(
        self, run_id: UUID, *, after: Position, events: bool, on_room: Callable[[UUID], None]
    ) -> None:
        self.run_id = run_id
        self.position = after
        #: False until the run has been accepted, and for a thread's log: there is no row to check,
        #: and a missing row does not mean that the run has ended.
        self.has_row = True
        self.wants_events = events
        self.ended = False
        #: The run's final status in the log; None if the log has no end or the run was rolled back.
        self.end_status: str | None = None
        #: Whether events before the end are not in the log.
        self.misses_end = False
        #: Whether the run has ended in Postgres, and a sweep has found no end in the log.
        self.is_swept = False
        #: The outcome for a client that waits, if the announcement of the end had it.
        self.answer = b""
        self.client_left = False
        self._on_room = on_room
        self._paused = False
        self._buffer: list[Event] = []
        self._size = 0
        #: When the feed ends the wait, in monotonic seconds.
        self.wake_at = math.inf
        self._gate = threading.Lock()
        self._gate.acquire()

    def take(self, until: float) -> list[Event]:
        """Wait for events and return them, or an empty list when there are none until `until`, the
        run has ended or the client has disconnected. `until` is in monotonic seconds; the wait may
        end up to a second early."""
        while not self._buffer and not self.ended and not self.client_left:
            if not self._wait(until):
                break
        count = size = 0
        for event in self._buffer:
            if size >= _TAKE_BYTES:
                break
            size += len(event.data)
            count += 1
        taken = self._buffer[:count]
        del self._buffer[:count]
        self._size -= size
        if self._paused and self._has_room(2):
            self._paused = False
            self._on_room(self.run_id)
        return taken

    def wait_for_end(self, until: float) -> bool:
        """Return True when the run has ended or the client has disconnected, False at `until`."""
        while not self.ended and not self.client_left:
            if not self._wait(until):
                break
        return self.ended or self.client_left

    def _wait(self, until: float) -> bool:
        """Wait until something happens. Return False when `until` has come."""
        if time.monotonic() >= until:
            return False
        self.wake_at = until
        self._gate.acquire()
        due, self.wake_at = self.wake_at == _DUE, math.inf
        return not due

    def wake_if_due(self, before: float) -> None:
        """End a wait that is due by `before`, the time of the feed's next check."""
        if before >= self.wake_at:
            self.wake_at = _DUE
            self._open_gate()

    def _has_room(self, part: int = 1) -> bool:
        few = len(self._buffer) < _BUFFER_EVENTS // part
        return few and self._size < _BUFFER_BYTES // part

    @property
    def wants_more(self) -> bool:
        """Whether to deliver events now. False while the client is too far behind; `take` requests
        the next delivery when it has made room."""
        if not self.wants_events or self.ended:
            return False
        # Set before the check: else room that is made between the two would request no delivery.
        self._paused = True
        self._paused = not self._has_room()
        return not self._paused

    @property
    def drained(self) -> bool:
        return self.ended and not self._buffer

    def deliver(self, events: Sequence[Event]) -> None:
        """Buffer the events after the position while there is room; the rest is read again."""
        first_new = bisect_right(events, self.position, key=lambda event: event.position)
        for event in itertools.islice(events, first_new, None):
            if not self._has_room():
                self._paused = True
                break
            before, self.position = self.position, event.position
            if event.name == END:
                data = orjson.loads(event.data)
                self.end_status = data["status"]
                self.misses_end = _is_before_last(before, event.position, data.get("emitted"))
                self.ended = True
            else:
                self._size += len(event.data)
                self._buffer.append(event)
        self._open_gate()

    def end(self, answer: bytes = b"") -> None:
        self.ended, self.answer = True, answer or self.answer
        self._open_gate()

    def end_without_marker(self) -> None:
        """End a subscription to events whose log has no end, which Redis has lost."""
        self.misses_end = True
        self.end()

    def begin_after(self, position: Position) -> None:
        """Deliver the events after a position, which was not known before."""
        self.position = position
        self._on_room(self.run_id)

    def rearm(self) -> None:
        """Wait again, after an announced end that the run's row does not confirm."""
        self.ended = False

    def leave(self) -> None:
        """End the waits of a client whose socket has closed."""
        self.client_left = True
        self._open_gate()

    def _open_gate(self) -> None:
        with contextlib.suppress(RuntimeError):  # it is open already
            self._gate.release()


def _is_before_last(position: Position, end: Position, emitted: int | None) -> bool:
    """Return whether events are missing between a position and the end of an attempt, which has
    emitted so many."""
    if emitted is None:
        return False
    return position.seq < emitted if position.claim_no == end.claim_no else emitted > 0


class RunFeed:
    """The feed of a web process. Its threads start at the first subscription, so that importing an
    app starts nothing."""

    def __init__(
        self,
        connect: Callable[[float | None], redis.Redis],
        keys: Keys,
        event_log: EventLog,
        ended_runs: EndedRuns,
        on_listeners: Callable[[bool, int], None] = lambda _wants_events, _change: None,
    ) -> None:
        """`on_listeners` is called for each subscription that begins (+1) or ends (-1). Its first
        argument is whether the client wants events, or only the end."""
        self._connect = connect
        self._keys = keys
        self._event_log = event_log
        self._ended_runs = ended_runs
        self._on_listeners = on_listeners
        self._lock = threading.Lock()
        self._subscriptions: dict[UUID, set[Subscription]] = defaultdict(set)
        self._dirty: set[UUID] = set()
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []

    def subscribe(
        self, run_id: UUID, *, after: Position = START, events: bool = True, has_row: bool = True
    ) -> Subscription:
        """Follow a run, until `unsubscribe`. Pass `has_row=False` for a thread, or for a run that
        is not accepted yet; set the subscription's `has_row` when it is."""
        subscription = Subscription(run_id, after=after, events=events, on_room=self._poke)
        subscription.has_row = has_row
        with self._lock:
            self._subscriptions[run_id].add(subscription)
            self._dirty.add(run_id)
            if not self._threads:
                self._threads = [
                    threading.Thread(target=loop, name=f"belay-feed-{name}", daemon=True)
                    for name, loop in (("listen", self._listen), ("read", self._read))
                ]
                for thread in self._threads:
                    thread.start()
        self._wake.set()
        self._on_listeners(events, 1)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        with self._lock:
            followers = self._subscriptions.get(subscription.run_id)
            if followers is None or subscription not in followers:
                return
            followers.discard(subscription)
            if not followers:
                del self._subscriptions[subscription.run_id]
        self._on_listeners(subscription.wants_events, -1)

    def _poke(self, run_id: UUID) -> None:
        with self._lock:
            self._dirty.add(run_id)
        self._wake.set()

    def close(self) -> None:
        """Stop the feed's threads. Open subscriptions get nothing more."""
        self._closed.set()
        self._wake.set()
        with contextlib.suppress(redis.RedisError), self._connect(1.0) as client:
            client.publish(self._keys.dirty, b"")  # `_listen` waits for a message
        for thread in self._threads:
            thread.join(5.0)

    def _listen(self) -> None:
        while not self._closed.is_set():
            client = self._connect(None)
            try:
                pubsub = client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
                pubsub.subscribe(self._keys.dirty)
                while not self._closed.is_set():
                    # Without a timeout, redis-py does not poll the socket before each message. If
                    # the connection is silently dead, the sweep still finds the events.
                    message = pubsub.get_message(timeout=None)
                    if message is not None:
                        self._note_dirty(message.get("data"))
                pubsub.close()
            except redis.RedisError as error:
                log.warning("run feed lost Redis, polling until it reconnects: %s", error)
                self._closed.wait(0.5)
            finally:
                client.close()

    def _note_dirty(self, data: object) -> None:
        """Handle a message: a run id, followed by "!" and a small outcome when the run has
        ended."""
        if not isinstance(data, bytes):
            return
        named, ended, answer = data.partition(b"!")
        try:
            run_id = UUID(named.decode())
        except ValueError:
            return
        if run_id not in self._subscriptions:
            return
        if ended:
            for subscription in self._followers(run_id):
                if not subscription.wants_events:
                    subscription.end(answer)
        self._poke(run_id)

    def _read(self) -> None:
        while not self._closed.is_set():
            try:
                self._read_what_changed()
            except Exception:  # all subscriptions depend on this loop
                log.exception("run feed failed, retrying in a second")
                self._closed.wait(_SWEEP_SECONDS)

    def _read_what_changed(self) -> None:
        swept = time.monotonic()
        while not self._closed.is_set():
            self._wake.wait(_SWEEP_SECONDS)
            self._wake.clear()
            with self._lock:
                dirty, self._dirty = self._dirty & self._subscriptions.keys(), set()
            sweep = time.monotonic() - swept >= _SWEEP_SECONDS
            if sweep:
                swept = time.monotonic()
                with self._lock:
                    dirty = set(self._subscriptions)
                self._wake_the_due(swept + _SWEEP_SECONDS)
            self._deliver_again(self._deliver(dirty))
            if sweep:
                self._sweep_ends()

    def _wake_the_due(self, before: float) -> None:
        with self._lock:
            everybody = [s for followers in self._subscriptions.values() for s in followers]
        for subscription in everybody:
            subscription.wake_if_due(before)

    def _deliver(self, run_ids: set[UUID]) -> set[UUID]:
        """Deliver the next events of these runs to their subscriptions. Return the runs whose logs
        have more.

        Each log is read once only: the replay of a long one must not delay the other runs.
        """
        wanting = self._wanting(run_ids)
        if not wanting:
            return set()
        # Each log is read from the earliest position of its subscriptions in `wanting`. Only these
        # get the events: for others there may be a gap before the first.
        earliest = {
            run_id: min(subscription.position for subscription in wants)
            for run_id, wants in wanting.items()
        }
        try:
            read = self._event_log.read_many(earliest, count=_BATCH)
        except redis.RedisError as error:
            log.warning("run feed cannot read event logs, retrying within a second: %s", error)
            return set()
        for run_id, chunk in read.items():
            for subscription in wanting[run_id]:
                subscription.deliver(chunk.events)
        return {run_id for run_id, chunk in read.items() if chunk.more}

    def _deliver_again(self, run_ids: set[UUID]) -> None:
        if run_ids:
            with self._lock:
                self._dirty |= run_ids
            self._wake.set()

    def _wanting(self, run_ids: set[UUID]) -> dict[UUID, list[Subscription]]:
        """Return the subscriptions of these runs that want more events, by run."""
        found = {}
        for run_id in run_ids:
            wants = [s for s in self._followers(run_id) if s.wants_more]
            if wants:
                found[run_id] = wants
        return found

    def _followers(self, run_id: UUID) -> list[Subscription]:
        with self._lock:
            return list(self._subscriptions.get(run_id, ()))

    def _sweep_ends(self) -> None:
        """End the subscriptions of runs that have ended in Postgres, as logs and messages may be
        lost."""
        with self._lock:
            followed = [
                run_id
                for run_id, followers in self._subscriptions.items()
                if any(subscription.has_row for subscription in followers)
            ]
        if not followed:
            return
        try:
            ended = self._ended_runs(followed)
        except Unavailable as error:
            log.warning("run feed cannot read the ends of runs, retrying in a second: %s", error)
            return
        # A subscription that begins while the logs are read has no events yet: the next sweep ends
        # it.
        followers = [subscription for run_id in ended for subscription in self._followers(run_id)]
        # A worker writes its events before it commits the end, so the log is complete now, unless
        # Redis was too slow for the worker. Streams that have more to read end at a later sweep.
        unread = self._deliver(set(ended))
        self._deliver_again(unread)
        for subscription in followers:
            if not subscription.wants_events:
                subscription.end()
            elif subscription.run_id in unread or not subscription.wants_more:
                continue
            elif subscription.is_swept:
                subscription.end_without_marker()
            else:  # the end may be on its way to the log
                subscription.is_swept = True
