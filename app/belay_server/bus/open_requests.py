"""Limit the open requests of each caller, counted in Redis over all web processes.

Streams and waits stay open for as long as their run. Each open request holds a place, which expires
unless the process that serves the request renews it. So the places of a killed process are soon
free, and after a flush of Redis the next renewals restore all places. While Redis is unavailable,
each process counts its own requests.
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

#: Seconds after which the place of a killed process expires.
_PLACE_SECONDS = 30.0
_RENEWALS_PER_PLACE = 3

# Use Redis's clock: those of web processes may differ by more than the expiry of a place.
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
#: Places that are renewed at once: the number of a script's arguments is limited.
_BATCH = 1_000


class OpenRequests:
    """Counts the open requests of callers. Its thread starts with the first request, not when the
    application is made."""

    def __init__(
        self, client: redis.Redis, keys: Keys, most: int, *, place_seconds: float = _PLACE_SECONDS
    ) -> None:
        """`most` is the limit of each caller; `place_seconds` is the expiry of a place."""
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
        """Return None if `most` is 0, which means no limit."""
        return cls(client, keys, most) if most else None

    def enter(self, caller: str) -> Callable[[], None]:
        """Count one more request. Returns a function to call when it has ended. Raises TooMany."""
        place = uuid.uuid4().hex
        with self._lock:
            if len(self._held.get(caller, ())) >= self._most:
                raise self._too_many()
            self._held[caller].add(place)
            self._start_renewing()
        if not self._may_take(caller, place):
            self._leave(caller, place)  # a renewal may have added it meanwhile
            raise self._too_many()
        return partial(self._leave, caller, place)

    def close(self) -> None:
        """Stop renewing: the places of open requests expire."""
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
        """Free places in Redis. If Redis is unavailable, they expire."""
        if self._is_away:
            return
        try:
            self._client.zrem(self._keys.open_requests(caller), *places)
        except redis.RedisError as error:
            self._note_outage(error)

    def _note_outage(self, error: redis.RedisError) -> None:
        """Count without Redis until a renewal reaches it again."""
        if not self._is_away:
            log.warning(
                "cannot count open requests in Redis, counting those of this process: %s", error
            )
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
                    log.warning("counting open requests in Redis again")
                    self._is_away = False
                for caller, places in held.items():
                    self._renew_places(caller, places)
            except redis.RedisError as error:
                self._note_outage(error)

    def _renew_places(self, caller: str, places: list[str]) -> None:
        """Renew the places of one caller. Raises redis.RedisError."""
        key = self._keys.open_requests(caller)
        for start in range(0, len(places), _BATCH):
            self._renew([key], (self._lasts, *places[start : start + _BATCH]))
        with self._lock:
            left = set(places) - self._held.get(caller, set())
        if left:  # the renewal has added places of requests that ended meanwhile
            self._give_back(caller, left)
