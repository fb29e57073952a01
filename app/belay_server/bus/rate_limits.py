"""How often a caller may ask, counted in Redis by all web processes together.

Cancels are counted apart: a caller who has used up everything else can still stop what they have
started. A Redis that is away limits nobody.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import redis
from limits import RateLimitItem, parse
from limits.errors import StorageError
from limits.storage import RedisStorage
from limits.strategies import SlidingWindowCounterRateLimiter

log = logging.getLogger(__name__)

REQUESTS, CANCELS = "requests", "cancels"


#: Failed authentications of one address: what a script with a wrong key makes is let pass, what a
#: search for keys needs is not, and the longer it goes on the longer it waits.
_FAILURES = ("300/minute", "2000/hour", "10000/day")


class FailedLogins:
    """Failed authentications by address, over all web processes. A right key is never counted, so
    nobody is locked out by others behind the same address."""

    def __init__(self, redis_url: str, prefix: str, rates: Sequence[str] = _FAILURES) -> None:
        storage = RedisStorage(redis_url, key_prefix=f"{prefix}failures", wrap_exceptions=True)
        self._limiter = SlidingWindowCounterRateLimiter(storage)
        self._items = [parse(rate) for rate in rates]

    def seconds_to_wait(self, address: str) -> float:
        """Count one more; how long they have to wait where that is one too many, else 0."""
        waits = [0.0]
        try:
            for item in self._items:
                if not self._limiter.hit(item, "failures", address):
                    reset = self._limiter.get_window_stats(item, "failures", address).reset_time
                    waits.append(max(1.0, reset - time.time()))
        except (StorageError, redis.RedisError) as error:
            log.warning("failed authentications are not counted: %s", error)
        return max(waits)


@dataclass(frozen=True, slots=True)
class RateLimits:
    """The limits of the settings. `None`: that is not limited."""

    limiter: SlidingWindowCounterRateLimiter
    items: dict[str, RateLimitItem]

    @classmethod
    def of(
        cls, redis_url: str, prefix: str, *, requests: str | None, cancels: str | None
    ) -> RateLimits | None:
        """`requests`, `cancels`: such as `100/second` or `5000 per hour`, checked already."""
        named = {REQUESTS: requests, CANCELS: cancels}
        items = {lane: parse(text) for lane, text in named.items() if text}
        if not items:
            return None
        storage = RedisStorage(redis_url, key_prefix=f"{prefix}limits", wrap_exceptions=True)
        return cls(SlidingWindowCounterRateLimiter(storage), items)

    def seconds_to_wait(self, lane: str, caller: str) -> float:
        """Count one more; how long they have to wait where that is one too many, else 0."""
        item = self.items.get(lane)
        if item is None:
            return 0.0
        try:
            if self.limiter.hit(item, lane, caller):
                return 0.0
            stats = self.limiter.get_window_stats(item, lane, caller)
        except (StorageError, redis.RedisError) as error:
            log.warning("requests are not counted: %s", error)
            return 0.0
        return max(1.0, stats.reset_time - time.time())
