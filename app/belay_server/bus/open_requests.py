"""How many requests one caller has open at once, counted in Redis by all web processes together.

Streams and waits stay open for as long as their run. Each open request holds a place that lapses
unless the process that answers it renews it, so a process that was killed leaves nothing behind
for long; a Redis that was flushed is filled again by the next renewals. While Redis is away each
process counts for itself.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import redis

from belay_server.bus.client import Keys
from belay_server.domain.errors import TooMany

log = logging.getLogger(__name__)

#: How long a place outlives the process that held it.
_PLACE_SECONDS = 30.0
_RENEWALS_PER_PLACE = 3

# The time is Redis's own: clocks of web processes may differ by more than a place lasts.
_NOW = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
"""
_TAKE = (
    _NOW
    + """
local most, lasts, place = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
if redis.call('ZCARD', KEYS[1]) >= most then
    return 0
end
redis.call('ZADD', KEYS[1], now + lasts, place)
redis.call('PEXPIRE', KEYS[1], lasts)
return 1
"""
)
_RENEW = (
    _NOW
    + """
local lasts = tonumber(ARGV[1])
for i = 2, #ARGV do
    redis.call('ZADD', KEYS[1], now + lasts, ARGV[i])
end
redis.call('PEXPIRE', KEYS[1], lasts)
"""
)
#: Places that are renewed at once: a script's arguments have an end.
_BATCH = 1_000


class OpenRequests:
    """Starts its thread at the first request, so that importing an app starts nothing."""

    def __init__(
        self, client: redis.Redis, keys: Keys, most: int, *, place_seconds: float = _PLACE_SECONDS
    ) -> None:
        """At most so many for each caller."""
        self._client = client
        self._keys = keys
        self._most = most
        self._lasts = int(place_seconds * 1000)
        self._renewal_seconds = place_seconds / _RENEWALS_PER_PLACE
        self._take = client.register_script(_TAKE)
        self._renew = client.register_script(_RENEW)
        #: The places that this process holds, by caller.
        self._held: dict[str, set[str]] = defaultdict(set)
        self._lock = threading.Lock()
        self._renewing: threading.Thread | None = None
        self._closed = threading.Event()
        self._is_away = False

    @classmethod
    def of(cls, client: redis.Redis, keys: Keys, most: int) -> OpenRequests | None:
        """None where `most` is 0: as many as they like."""
        return cls(client, keys, most) if most else None

    def enter(self, caller: str) -> Callable[[], None]:
        """One more; what is returned is to be called when it has ended. Raises TooMany."""
        place = uuid.uuid4().hex
        with self._lock:
            if len(self._held.get(caller, ())) >= self._most:
                raise self._too_many()
            self._held[caller].add(place)
            self._start_renewing()
        if not self._may_take(caller, place):
            self._leave(caller, place)  # a renewal may have put it in meanwhile
            raise self._too_many()
        return partial(self._leave, caller, place)

    def close(self) -> None:
        """Stop renewing; what is still open lapses."""
        self._closed.set()
        if self._renewing is not None:
            self._renewing.join(5.0)

    def _too_many(self) -> TooMany:
        return TooMany(f"You have {self._most} requests open already")

    def _may_take(self, caller: str, place: str) -> bool:
        if self._is_away:
            return True
        arguments = (self._most, self._lasts, place)
        try:
            return bool(self._take([self._keys.open_requests(caller)], arguments))
        except redis.RedisError as error:
            self._note_outage(error)
            return True

    def _leave(self, caller: str, place: str) -> None:
        self._let_go(caller, place)
        self._give_back(caller, {place})

    def _let_go(self, caller: str, place: str) -> None:
        with self._lock:
            places = self._held[caller]
            places.discard(place)
            if not places:
                del self._held[caller]

    def _give_back(self, caller: str, places: set[str]) -> None:
        """What cannot be given back lapses."""
        if self._is_away:
            return
        try:
            self._client.zrem(self._keys.open_requests(caller), *places)
        except redis.RedisError as error:
            self._note_outage(error)

    def _note_outage(self, error: redis.RedisError) -> None:
        """From now on nobody waits for Redis, until a renewal finds it well again."""
        if not self._is_away:
            log.warning("open requests are counted by each process for itself: %s", error)
        self._is_away = True

    def _start_renewing(self) -> None:
        if self._renewing is None:
            self._renewing = threading.Thread(
                target=self._keep_renewing, name="belay-open-requests", daemon=True
            )
            self._renewing.start()

    def _keep_renewing(self) -> None:
        while not self._closed.wait(self._renewal_seconds):
            with self._lock:
                held = {caller: sorted(places) for caller, places in self._held.items()}
            try:
                self._client.ping()
                if self._is_away:
                    log.warning("open requests are counted in Redis again")
                    self._is_away = False
                for caller, places in held.items():
                    self._renew_places(caller, places)
            except redis.RedisError as error:
                self._note_outage(error)

    def _renew_places(self, caller: str, places: list[str]) -> None:
        """Raises redis.RedisError."""
        key = self._keys.open_requests(caller)
        for start in range(0, len(places), _BATCH):
            self._renew([key], (self._lasts, *places[start : start + _BATCH]))
        with self._lock:
            left = set(places) - self._held.get(caller, set())
        if left:  # requests that ended meanwhile have been given a place again
            self._give_back(caller, left)
