"""Follow the event logs and ends of all runs that clients of this web process follow.

Workers publish only which log has grown. The feed reads the changed logs that have subscriptions,
all of them in one round trip, and passes the events to the subscriptions. A message may be lost, so
once a second it reads all followed logs, and queries Postgres for the runs that have ended. There
is one Redis subscription and one client per process, however many clients are connected.

Under gunicorn's gevent workers the threads here are greenlets; nothing else differs.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
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

#: Entries read of one log at a time.
_BATCH = 16
_SWEEP_SECONDS = 1.0
_DUE = -math.inf
#: What a slow client may be behind before it is fed no more; it goes on where it stopped as soon as
#: it has made room.
_BUFFER_EVENTS = 2_000
_BUFFER_BYTES = 256 * 1024
#: What is handed to a client at once.
_TAKE_BYTES = 64 * 1024


class Subscription:
    """One client's view of one run: events after a position, and the end.

    `events=False` is for clients that only wait for the end. There may be very many of these, so a
    subscription is small: it waits for a bare lock, which is held until something happens. A wait
    has no timer of its own: the feed, which checks all subscriptions once a second, ends it.
    """

    __slots__ = (
        "_buffer",
        "_gate",
        "_on_room",
        "_paused",
        "_size",
        "client_left",
        "end_status",
        "ended",
        "has_row",
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
        #: False until the run has been accepted: its row is not there yet, and not gone either.
        self.has_row = True
        self.wants_events = events
        self.ended = False
        #: What the log says the run ended as; None when it does not say, or was rolled back.
        self.end_status: str | None = None
        self.client_left = False
        self._on_room = on_room
        self._paused = False
        self._buffer: list[Event] = []
        self._size = 0
        #: When the feed ends the wait, by the monotonic clock.
        self.wake_at = math.inf
        self._gate = threading.Lock()
        self._gate.acquire()

    def take(self, until: float) -> list[Event]:
        """The events that have come; none: nothing came until that moment (to the second, on the
        monotonic clock), the run has ended, or the client has left."""
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
        """True when the run has ended or the client left; False when that moment has come."""
        while not self.ended and not self.client_left:
            if not self._wait(until):
                break
        return self.ended or self.client_left

    def _wait(self, until: float) -> bool:
        """Wait until something happens; False when the moment has come."""
        if time.monotonic() >= until:
            return False
        self.wake_at = until
        self._gate.acquire()
        due, self.wake_at = self.wake_at == _DUE, math.inf
        return not due

    def wake_if_due(self, before: float) -> None:
        """End a wait whose time is over before the next check."""
        if before >= self.wake_at:
            self.wake_at = _DUE
            self._open_gate()

    def _has_room(self, part: int = 1) -> bool:
        few = len(self._buffer) < _BUFFER_EVENTS // part
        return few and self._size < _BUFFER_BYTES // part

    @property
    def wants_more(self) -> bool:
        """False for a client that is too far behind: it is fed again when it has made room."""
        if not self.wants_events or self.ended:
            return False
        # Looked at again after it was set: the client may have made room just before.
        self._paused = True
        self._paused = not self._has_room()
        return not self._paused

    @property
    def drained(self) -> bool:
        return self.ended and not self._buffer

    def deliver(self, events: Sequence[Event]) -> None:
        """Take what comes after the position, as far as there is room; the rest is read again."""
        for event in events:
            if event.position <= self.position:
                continue
            if not self._has_room():
                self._paused = True
                break
            self.position = event.position
            if event.name == END:
                self.end_status = orjson.loads(event.data)["status"]
                self.ended = True
            else:
                self._size += len(event.data)
                self._buffer.append(event)
        self._open_gate()

    def end(self) -> None:
        self.ended = True
        self._open_gate()

    def rearm(self) -> None:
        """Wait again: according to its row, the run has not ended."""
        self.ended = False

    def leave(self) -> None:
        """End the waits of a client whose socket has closed."""
        self.client_left = True
        self._open_gate()

    def _open_gate(self) -> None:
        with contextlib.suppress(RuntimeError):  # it is open
            self._gate.release()


class RunFeed:
    """The feed of a web process. Its threads start with the first subscription, not when the
    application is made."""

    def __init__(
        self,
        connect: Callable[[float | None], redis.Redis],
        keys: Keys,
        event_log: EventLog,
        ended_runs: EndedRuns,
        on_listeners: Callable[[bool, int], None] = lambda _wants_events, _change: None,
    ) -> None:
        """`on_listeners` is called for each client that subscribes (+1) and unsubscribes (-1), with
        whether it follows events or waits for the end only."""
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
        """Follow a run. Close with `unsubscribe`. Without `has_row` it is yet to be accepted: set
        the subscription's own `has_row` when it is."""
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
        """Stop following; open subscriptions get nothing more."""
        self._closed.set()
        self._wake.set()
        with contextlib.suppress(redis.RedisError), self._connect(1.0) as client:
            client.publish(self._keys.dirty, b"")  # who listens waits for the next word
        for thread in self._threads:
            thread.join(5.0)

    def _listen(self) -> None:
        while not self._closed.is_set():
            client = self._connect(None)
            try:
                pubsub = client.pubsub(ignore_subscribe_messages=True)
                pubsub.subscribe(self._keys.dirty)
                while not self._closed.is_set():
                    # Without a timeout a message costs no look at the socket before; a silent
                    # connection may be a dead one, and then the sweep follows.
                    message = pubsub.get_message(timeout=None)
                    if message is not None:
                        self._note_dirty(message.get("data"))
                pubsub.close()
            except redis.RedisError as error:
                log.warning("run feed lost Redis, following by polling: %s", error)
                self._closed.wait(0.5)
            finally:
                client.close()

    def _note_dirty(self, data: object) -> None:
        """A nudge is a run id, with "!" behind it when the run has ended."""
        if not isinstance(data, bytes):
            return
        try:
            run_id = UUID(data.decode().removesuffix("!"))
        except ValueError:
            return
        if run_id not in self._subscriptions:
            return
        if data.endswith(b"!"):
            for subscription in self._followers(run_id):
                if not subscription.wants_events:
                    subscription.end()
        self._poke(run_id)

    def _read(self) -> None:
        while not self._closed.is_set():
            try:
                self._read_what_changed()
            except Exception:  # all clients depend on this loop
                log.exception("run feed failed, retrying")
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
            self._deliver(dirty)
            if sweep:
                self._sweep_ends()

    def _wake_the_due(self, before: float) -> None:
        with self._lock:
            everybody = [s for followers in self._subscriptions.values() for s in followers]
        for subscription in everybody:
            subscription.wake_if_due(before)

    def _deliver(self, run_ids: set[UUID]) -> None:
        """Feed every listener of these runs until each is up to date or its buffer is full."""
        try:
            while wanting := self._wanting(run_ids):
                # Each log is read from the earliest of those it is read for. Nobody else is given
                # what was read: it may begin behind where they are.
                earliest = {
                    run_id: min(subscription.position for subscription in wants)
                    for run_id, wants in wanting.items()
                }
                run_ids = set()
                for run_id, chunk in self._event_log.read_many(earliest, count=_BATCH).items():
                    for subscription in wanting[run_id]:
                        subscription.deliver(chunk.events)
                    if chunk.more:
                        run_ids.add(run_id)
        except redis.RedisError as error:
            log.warning("run feed could not read event logs: %s", error)

    def _wanting(self, run_ids: set[UUID]) -> dict[UUID, list[Subscription]]:
        """The followers of these runs that want more."""
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
        """The end of a run is in Postgres, whatever became of its log and of its nudges."""
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
            log.warning("run feed could not ask which runs have ended: %s", error)
            return
        # Who comes while the logs are read has been given nothing yet, and is looked at next time.
        followers = [subscription for run_id in ended for subscription in self._followers(run_id)]
        # A worker writes its events before it commits the end, so what is in the log now is all.
        self._deliver(set(ended))
        for subscription in followers:
            if not subscription.wants_events or subscription.wants_more:
                subscription.end()
