"""LangGraph's Postgres store: the same table for the API and for graphs.

LangGraph's own library does the work; what is here gives it the project's embeddings, a connection
to work on, and comparisons that know numbers from text.
"""

from __future__ import annotations

import asyncio
import copy
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from langgraph.store.postgres import PostgresStore
from psycopg_pool import ConnectionPool

from belay_server.db.connection import Connection, again_on_conflict, unavailable_when_unreachable
from belay_server.db.reconnecting import ReconnectingConnection
from belay_server.domain.errors import BadRequest

_COMPARISONS = {"$gt": ">", "$gte": ">=", "$lt": "<", "$lte": "<="}

#: Of a filter.
_MOST_CONDITIONS = 100


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """`store` of `langgraph.json`. `index` has the embedding function, once it is loaded."""

    index: dict[str, Any] | None = None
    ttl: dict[str, Any] = field(default_factory=dict)


class ProjectStore(PostgresStore):
    """The library's store, as a project configures it."""

    def __init__(self, conn: Any, config: StoreConfig) -> None:
        # What has expired is not shown, also while nobody has swept it yet.
        ttl = {"omit_expired": True, **config.ttl}
        super().__init__(conn, index=config.index, ttl=ttl)  # type: ignore[arg-type]

    def _get_filter_condition(self, key: str, op: str, value: Any) -> tuple[str, list[Any]]:
        """Numbers compare as numbers and text as text; an item without the field is not found."""
        comparison = _COMPARISONS.get(op)
        if comparison is None:
            return super()._get_filter_condition(key, op, value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            number = (
                "CASE WHEN jsonb_typeof(value -> %s) = 'number' THEN (value ->> %s)::numeric END"
            )
            return f"{number} {comparison} %s::numeric", [key, key, json.dumps(value)]
        text = "CASE WHEN jsonb_typeof(value -> %s) = 'string' THEN value ->> %s END"
        return f'{text} COLLATE "C" {comparison} %s', [key, key, str(value)]


class ApiStore(ProjectStore):
    """For the API, over the web process's pool."""

    def __init__(self, pool: ConnectionPool[Connection], config: StoreConfig) -> None:
        super().__init__(pool, config)
        self._pool = pool

    def batch(self, ops: Iterable[Any]) -> list[Any]:
        """Do operations, again when they lose a conflict: two searches that refresh the TTL of the
        same items lock them in different orders."""
        ops = list(ops)
        with unavailable_when_unreachable():
            return again_on_conflict(lambda: super(ApiStore, self).batch(ops))

    @contextmanager
    def _cursor(self, *, pipeline: bool = False) -> Iterator[Any]:
        with (
            self._pool.connection() as conn,
            ProjectStore._cursor(_on(self, conn), pipeline=pipeline) as cursor,
        ):
            yield cursor


class RunStore(ProjectStore):
    """For graphs, on a child's one connection: all of it happens on the thread that owns it."""

    def __init__(
        self, connection: ReconnectingConnection, database_thread: Executor, config: StoreConfig
    ) -> None:
        super().__init__(None, config)
        self._connection = connection
        self._database_thread = database_thread
        self._keep_waiting: Callable[[], bool] = lambda: True
        self._used = [False]

    def of_run(self, keep_waiting: Callable[[], bool]) -> RunStore:
        """The store as one attempt has it: it waits for a Postgres that is away, until told."""
        store = copy.copy(self)
        store._keep_waiting = keep_waiting
        return store

    def settle(self) -> None:
        """Wait until nothing is on its way: a node that was stopped did not."""
        if self._used[0]:
            self._used[0] = False
            self._database_thread.submit(lambda: None).result()

    def _on_the_connection(self, ops: list[Any]) -> list[Any]:
        """Doing it twice is doing it once: items are put, not added to."""

        def work(conn: Connection) -> list[Any]:
            return super(RunStore, _on(self, conn)).batch(ops)

        return self._connection.run(work, keep_waiting=self._keep_waiting)

    def batch(self, ops: Iterable[Any]) -> list[Any]:
        self._used[0] = True
        return self._database_thread.submit(self._on_the_connection, list(ops)).result()

    async def abatch(self, ops: Iterable[Any]) -> list[Any]:
        self._used[0] = True
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._database_thread, self._on_the_connection, list(ops))


def _on(store: ProjectStore, conn: Connection) -> Any:
    """The same store on this connection, which nobody else uses: its lock is its own, too."""
    store = copy.copy(store)
    store.conn = conn
    store.lock = threading.Lock()
    return store


def as_filter(asked: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A filter as the library takes it: an object without operators is a value to be equal to.

    Raises BadRequest for an operator that there is not, and for more conditions than Postgres can
    plan: the time that takes grows with the square of their number, and nothing ends it.
    """
    if not asked:
        return None
    found = {key: _condition(value) for key, value in asked.items()}
    conditions = sum(len(one) if isinstance(one, dict) else 1 for one in found.values())
    if max(len(found), conditions) > _MOST_CONDITIONS:
        raise BadRequest(f"a filter may have at most {_MOST_CONDITIONS} conditions, all together")
    return found


def _condition(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    operators = [name for name in value if name.startswith("$")]
    if not operators:
        return {"$eq": value}
    for name in value:
        if name not in (*_COMPARISONS, "$eq", "$ne"):
            raise BadRequest(f"Unsupported operator: {name}")
    for name in operators:
        if name in _COMPARISONS and (
            isinstance(value[name], bool) or not isinstance(value[name], (int, float, str))
        ):
            raise BadRequest(f"{name} compares with a number or a text")
    return value
