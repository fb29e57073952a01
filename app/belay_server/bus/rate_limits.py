"""Limit the rate of each caller's requests, counted in Redis over all web processes.

Cancels are counted separately, so a caller that has reached its limit can still stop its runs.
While Redis is unavailable, there is no limit.
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


#: Failed authentications of one address. A script with a wrong key stays below them; a search for
#: keys does not, and waits longer the longer it goes on.
_FAILURES = ("300/minute", "2000/hour", "10000/day")


class FailedLogins:
    """Counts failed authentications by address, over all web processes. Valid keys are never
    counted, so clients behind the same address do not lock each other out."""

    def __init__(self, redis_url: str, prefix: str, rates: Sequence[str] = _FAILURES) -> None:
        storage = RedisStorage(redis_url, key_prefix=f"{prefix}failures", wrap_exceptions=True)
        self._limiter = SlidingWindowCounterRateLimiter(storage)
        self._items = [parse(rate) for rate in rates]

    def seconds_to_wait(self, address: str) -> float:
        """Count one more. Return the seconds to wait if the limit is exceeded, else 0."""
        waits = [0.0]
        try:
            for item in self._items:
                if not self._limiter.hit(item, "failures", address):
                    reset = self._limiter.get_window_stats(item, "failures", address).reset_time
                    waits.append(max(1.0, reset - time.time()))
        except (StorageError, redis.RedisError) as error:
            log.warning("cannot count failed authentications, allowing the request: %s", error)
        return max(waits)


@dataclass(frozen=True, slots=True)
class RateLimits:
    """The rate limits of the settings, by kind of request; a kind that is missing has none."""

    limiter: SlidingWindowCounterRateLimiter
    items: dict[str, RateLimitItem]

    @classmethod
    def of(
        cls, redis_url: str, prefix: str, *, requests: str | None, cancels: str | None
    ) -> RateLimits | None:
        """Make them of validated rates such as `100/second` or `5000 per hour`. Return None when
        neither is limited."""
        named = {REQUESTS: requests, CANCELS: cancels}
        items = {lane: parse(text) for lane, text in named.items() if text}
        if not items:
            return None
        storage = RedisStorage(redis_url, key_prefix=f"{prefix}limits", wrap_exceptions=True)
        return cls(SlidingWindowCounterRateLimiter(storage), items)

    def seconds_to_wait(self, lane: str, caller: str) -> float:
        """Count one more. Return the seconds to wait if the limit is exceeded, else 0."""
        item = self.items.get(lane)
        if item is None:
            return 0.0
        try:
            if self.limiter.hit(item, lane, caller):
                return 0.0
            stats = self.limiter.get_window_stats(item, lane, caller)
        except (StorageError, redis.RedisError) as error:
            log.warning("cannot count requests, allowing the request: %s", error)
            return 0.0
        return max(1.0, stats.reset_time - time.time())
