"""Connect to Redis, and name every key and channel that Belay uses.

    {prefix}cancel:{run_id}    string   cancel flag of a running run: the action. Expires.
    {prefix}events:{run_id}    stream   the run's event log, ids `<claim_no>-<seq>`. Expires.
    {prefix}events:{thread_id} stream   the thread's own log: where its runs begin. Expires.
    {prefix}large:{log_id}     hash     the data of a log's large events, in parts. Expires.
    {prefix}open:{caller}      zset     a caller's open requests, by expiry. Expires.
    {prefix}cache:{key}        string   a value of the project, by `langgraph_sdk.cache`. Expires.
    {prefix}cancels            channel  the run_id whose cancel flag was set
    {prefix}limits…            string   counters of requests by caller, those of `limits`. Expire.
    {prefix}failures…          string   counters of failed authentications by address. Expire.
    {prefix}dirty              channel  the run or thread whose event log has grown; `!`: has ended

All of it may be lost at any moment: Postgres is the source of truth. Celery's queues are in the
same Redis under Celery's own names, unless BROKER_URL is set.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from belay_server.configuration.settings import Settings

RedisError = redis.RedisError
#: Each is in use for a fraction of a millisecond, however many clients a process has. Waiting
#: longer for one than for Redis itself raises the same error.
_MOST_CONNECTIONS = 16
_POOL_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Keys:
    """The names of keys and channels in Redis, which all start with `prefix`."""

    prefix: str

    def cancel_flag(self, run_id: UUID | str) -> str:
        return f"{self.prefix}cancel:{run_id}"

    def event_log(self, run_id: UUID | str) -> str:
        return f"{self.prefix}events:{run_id}"

    def large_events(self, run_id: UUID | str) -> str:
        return f"{self.prefix}large:{run_id}"

    def cached(self, key: str) -> str:
        return f"{self.prefix}cache:{key}"

    def open_requests(self, caller: str) -> str:
        return f"{self.prefix}open:{caller}"

    def isolated_graph(self, graph_id: str) -> str:
        return f"{self.prefix}isolated:{graph_id}"

    @property
    def cancels(self) -> str:
        return f"{self.prefix}cancels"

    @property
    def dirty(self) -> str:
        return f"{self.prefix}dirty"


def connect_redis(settings: Settings, *, timeout: float | None = 2.0) -> redis.Redis:
    """Return a client that fails fast, since everything in Redis may be lost.

    `timeout` is in seconds; None is for a subscriber, which waits for messages indefinitely.
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
