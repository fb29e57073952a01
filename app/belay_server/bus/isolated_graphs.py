"""Report which graphs a worker does not let share hosts any more, and why.

A worker reports them again and again, so a report expires soon after its worker has ended.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import orjson
import redis

from belay_server.bus.client import Keys

#: Seconds for which a report is valid.
_VALID_SECONDS = 30.0


class IsolatedGraphs:
    """The reports of all workers. Every method may raise redis.RedisError."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._client = client
        self._keys = keys

    def report(self, worker: str, reasons: Mapping[str, str]) -> None:
        """Report the graphs that a worker has isolated, with the reasons, by graph id."""
        until = time.time() + _VALID_SECONDS
        with self._client.pipeline(transaction=False) as pipe:
            for graph_id, reason in reasons.items():
                key = self._keys.isolated_graph(graph_id)
                pipe.hset(key, worker, orjson.dumps([until, reason]))
                pipe.expire(key, int(_VALID_SECONDS))
            pipe.execute()

    def of(self, graph_id: str) -> dict[str, str]:
        """Return why workers have isolated a graph, by worker."""
        found: dict[Any, Any] = self._client.hgetall(self._keys.isolated_graph(graph_id))
        reports = {worker.decode(): orjson.loads(said) for worker, said in found.items()}
        now = time.time()
        return {worker: reason for worker, (until, reason) in reports.items() if until > now}
