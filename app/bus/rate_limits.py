"""How often a caller may ask, counted in Redis by all web processes together.

Cancels are counted apart: a caller who has used up everything else can still stop what they have
started. A Redis that is away limits nobody.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import redis
from limits import RateLimitItem, parse
from limits.errors import StorageError
from limits.storage import RedisStorage
from limits.strategies import SlidingWindowCounterRateLimiter

log = logging.getLogger(__name__)

REQUESTS, CANCELS = "requests", "cancels"


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
