"""The Redis client, and the catalogue of every key and channel Belay uses.

    {prefix}cancel:{run_id}    string   cancel flag of a running run: the action. Expires.
    {prefix}events:{run_id}    stream   the run's event log, ids `<claim_no>-<seq>`. Expires.
    {prefix}events:{thread_id} stream   the thread's own log: where its runs begin. Expires.
    {prefix}open:{caller}      zset     a caller's open requests, by when they lapse. Expires.
    {prefix}cancels            channel  a nudge: "look at the flag of this run_id"
    {prefix}dirty              channel  a nudge: "the event log of this run_id has grown"

Nothing here is the truth: all of it may be lost at any moment, and Postgres decides. (Celery's
queues live in the same Redis under Celery's own names, unless BROKER_URL says otherwise.)
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from belay_server.settings import Settings

RedisError = redis.RedisError
#: Each is busy for a fraction of a millisecond, however many clients a process has; who would wait
#: longer for one than for Redis itself gets the same error.
_MOST_CONNECTIONS = 16
_POOL_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Keys:
    prefix: str

    def cancel_flag(self, run_id: UUID | str) -> str:
        return f"{self.prefix}cancel:{run_id}"

    def event_log(self, run_id: UUID | str) -> str:
        return f"{self.prefix}events:{run_id}"

    def large_events(self, run_id: UUID | str) -> str:
        return f"{self.prefix}large:{run_id}"

    def open_requests(self, caller: str) -> str:
        return f"{self.prefix}open:{caller}"

    @property
    def cancels(self) -> str:
        return f"{self.prefix}cancels"

    @property
    def dirty(self) -> str:
        return f"{self.prefix}dirty"


def connect_redis(settings: Settings, *, timeout: float | None = 2.0) -> redis.Redis:
    """A client that fails fast: what it carries may be lost, so nobody waits for it.

    `timeout=None` is for a subscriber, which waits for as long as nothing happens.
    """
    pool = redis.BlockingConnectionPool.from_url(
        settings.redis_url,
        socket_timeout=timeout,
        socket_connect_timeout=1.0,
        socket_keepalive=True,
        health_check_interval=0,
        max_connections=_MOST_CONNECTIONS,
        timeout=_POOL_SECONDS,
        retry=Retry(NoBackoff(), 1),
    )
    return redis.Redis.from_pool(pool)
