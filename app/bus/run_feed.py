"""The one reader of a web process: follows the event logs and ends of all runs it has clients for.

Workers publish only which log has grown. The feed reads the logs that changed and have listeners,
one round trip for all of them, and hands the events to its subscriptions. A nudge may be lost, so
once a second it looks at everything that is being followed, and asks Postgres which of those runs
have ended. One Redis subscription and one client per process, however many clients are connected.

Under gunicorn's gevent workers the threads here are greenlets; nothing else differs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from uuid import UUID

import redis

from app.bus.client import Keys
from app.bus.event_log import END, Event, EventLog, id_key
from app.domain.errors import Unavailable

log = logging.getLogger(__name__)

EndedRuns = Callable[[Sequence[UUID]], "dict[UUID, str | None]"]

_BATCH = 500
_SWEEP_SECONDS = 1.0
#: Events a slow client may be behind before it stops being fed; it resumes where it stopped.
_BUFFER = 2_000


class Subscription:
    """One client's view of one run: events after a position, and the end.

    `events=False` is for those who only wait for the end.
    """

    def __init__(
        self, run_id: UUID, *, after: str, events: bool, on_room: Callable[[UUID], None]
    ) -> None:
        self.run_id = run_id
        self.position = after
        self.wants_events = events
        self.ended = False
        self.client_left = False
        self._on_room = on_room
        self._paused = False
        self._buffer: deque[Event] = deque()
        self._changed = threading.Condition()

    def next(self, timeout: float) -> Event | None:
        """The next event, or None: nothing within `timeout`, the end, or the client left."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while not self._buffer and not self.ended and not self.client_left:
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                self._changed.wait(left)
            event = self._buffer.popleft() if self._buffer else None
            room = self._paused and len(self._buffer) < _BUFFER // 2
            if room:
                self._paused = False
        if room:
            self._on_room(self.run_id)
        return event

    def wait_for_end(self, timeout: float) -> bool:
        """True when the run has ended or the client left; False after `timeout`."""
        with self._changed:
            self._changed.wait_for(lambda: self.ended or self.client_left, timeout)
            return self.ended or self.client_left

    @property
    def wants_more(self) -> bool:
        """False for a client that is too far behind: it is fed again when it has made room."""
        if not self.wants_events or self.ended:
            return False
        self._paused = len(self._buffer) >= _BUFFER
        return not self._paused

    @property
    def drained(self) -> bool:
        return self.ended and not self._buffer

    def deliver(self, events: Sequence[Event]) -> None:
        with self._changed:
            for event in events:
                if id_key(event.id) <= id_key(self.position):
                    continue
                self.position = event.id
                if event.name == END:
                    self.ended = True
                else:
                    self._buffer.append(event)
            self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self.ended = True
            self._changed.notify_all()

    def rearm(self) -> None:
        """Wait again: the row says the run has not ended, whoever said it had."""
        with self._changed:
            self.ended = False

    def leave(self) -> None:
        """The client's socket has closed."""
        with self._changed:
            self.client_left = True
            self._changed.notify_all()


class RunFeed:
    """Starts its threads at the first subscription, so that importing an app starts nothing."""

    def __init__(
        self,
        connect: Callable[[float | None], redis.Redis],
        keys: Keys,
        event_log: EventLog,
        ended_runs: EndedRuns,
    ) -> None:
        self._connect = connect
        self._keys = keys
        self._event_log = event_log
        self._ended_runs = ended_runs
        self._lock = threading.Lock()
        self._subscriptions: dict[UUID, set[Subscription]] = defaultdict(set)
        self._dirty: set[UUID] = set()
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []

    def subscribe(self, run_id: UUID, *, after: str = "0-0", events: bool = True) -> Subscription:
        """Follow a run. Close with `unsubscribe`."""
        subscription = Subscription(run_id, after=after, events=events, on_room=self._poke)
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
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        with self._lock:
            followers = self._subscriptions.get(subscription.run_id)
            if followers is not None:
                followers.discard(subscription)
                if not followers:
                    del self._subscriptions[subscription.run_id]

    def _poke(self, run_id: UUID) -> None:
        with self._lock:
            self._dirty.add(run_id)
        self._wake.set()

    def close(self) -> None:
        """Stop following; open subscriptions get nothing more."""
        self._closed.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(5.0)

    def _listen(self) -> None:
        while not self._closed.is_set():
            client = self._connect(None)
            try:
                pubsub = client.pubsub(ignore_subscribe_messages=True)
                pubsub.subscribe(self._keys.dirty)
                while not self._closed.is_set():
                    message = pubsub.get_message(timeout=_SWEEP_SECONDS)
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
            self._deliver(dirty)
            if sweep:
                self._sweep_ends()

    def _deliver(self, run_ids: set[UUID]) -> None:
        """Feed every listener of these runs until each is up to date or its buffer is full."""
        try:
            while positions := self._positions(run_ids):
                run_ids = set()
                for run_id, events in self._event_log.read_many(positions, count=_BATCH).items():
                    for subscription in self._followers(run_id):
                        # One that wants no more now is left where it is: the batch may start
                        # behind its position only for those it was read for.
                        if subscription.wants_more:
                            subscription.deliver(events)
                    if len(events) == _BATCH:
                        run_ids.add(run_id)
        except redis.RedisError as error:
            log.warning("run feed could not read event logs: %s", error)

    def _positions(self, run_ids: set[UUID]) -> dict[UUID, str]:
        """From where to read each log: the earliest of its followers that want more."""
        positions = {}
        for run_id in run_ids:
            wanted = [s.position for s in self._followers(run_id) if s.wants_more]
            if wanted:
                positions[run_id] = min(wanted, key=id_key)
        return positions

    def _followers(self, run_id: UUID) -> list[Subscription]:
        with self._lock:
            return list(self._subscriptions.get(run_id, ()))

    def _sweep_ends(self) -> None:
        """The end of a run is in Postgres, whatever became of its log and of its nudges."""
        with self._lock:
            followed = list(self._subscriptions)
        if not followed:
            return
        try:
            ended = self._ended_runs(followed)
        except Unavailable as error:
            log.warning("run feed could not ask which runs have ended: %s", error)
            return
        # A worker writes its events before it commits the end, so what is in the log now is all.
        self._deliver(set(ended))
        for run_id in ended:
            for subscription in self._followers(run_id):
                if not subscription.wants_events or subscription.wants_more:
                    subscription.end()
