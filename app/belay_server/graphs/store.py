"""LangGraph's Postgres store: the same table for the API and for graphs.

LangGraph's own library does the work. This module gives it the project's embeddings, a connection,
and comparisons that distinguish numbers from text.
"""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any

from langchain_core.embeddings import Embeddings
from langgraph.store.base import BaseStore, PutOp, SearchOp
from langgraph.store.postgres import PostgresStore
from psycopg_pool import ConnectionPool

from belay_server.configuration.settings import Settings
from belay_server.db.postgres.connection import Connection, connect
from belay_server.db.postgres.pool import unavailable_when_unreachable
from belay_server.db.postgres.reconnecting import ReconnectingConnection
from belay_server.db.postgres.statements import again_on_conflict, end_row_by_row_mode
from belay_server.domain.errors import BadRequest, Unavailable
from belay_server.graphs.own_store import OwnApiStore, OwnRunStore, OwnStore
from belay_server.graphs.project.raised import is_of_project
from belay_server.graphs.project.store_section import StoreConfig
from belay_server.graphs.registry import GraphRegistry

log = logging.getLogger(__name__)

_COMPARISONS = {"$gt": ">", "$gte": ">=", "$lt": "<", "$lte": "<="}

#: Conditions in one filter.
_MOST_CONDITIONS = 100


class ProjectStore(PostgresStore):
    """The library's store, as a project configures it."""

    def __init__(self, conn: Any, config: StoreConfig) -> None:
        # An expired item is never returned, even before a sweep has deleted it.
        ttl = {"omit_expired": True, **config.ttl}
        super().__init__(conn, index=config.index, ttl=ttl)  # type: ignore[arg-type]

    def _get_filter_condition(self, key: str, op: str, value: Any) -> tuple[str, list[Any]]:
        """Compare numbers as numbers and text as text. An item without the field does not match."""
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


class _ApiEmbeddings(Embeddings):
    """The project's embeddings, whose failure is not the server's."""

    def __init__(self, embeddings: Embeddings) -> None:
        self._embeddings = embeddings

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Raises Unavailable."""
        try:
            vectors = self._embeddings.embed_documents(texts)
        except BaseException as error:
            if not is_of_project(error):
                raise
            log.exception("the embedding function of the store failed")
            kind = type(error).__name__
            raise Unavailable(f"The embedding function of the store failed: {kind}") from error
        found = len(vectors) if isinstance(vectors, Sized) else 0
        if found != len(texts):
            message = f"returned {found} vectors for {len(texts)} texts"
            log.error("the embedding function of the store %s", message)
            raise Unavailable(f"The embedding function of the store {message}")
        return vectors

    def embed_query(self, text: str) -> list[float]:
        return self.embed_documents([text])[0]


class _Embedded(Embeddings):
    """The vectors of texts that have been embedded."""

    def __init__(self, vectors: Mapping[str, list[float]]) -> None:
        self._vectors = vectors

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self._vectors[text] for text in texts]

    def embed_query(self, text: str) -> list[float]:
        return self._vectors[text]


class ApiStore(ProjectStore):
    """The store of the API, on the web process's pool."""

    def __init__(self, pool: ConnectionPool[Connection], config: StoreConfig) -> None:
        super().__init__(pool, config)
        self._pool = pool
        if self.embeddings is not None:
            self.embeddings = _ApiEmbeddings(self.embeddings)

    def batch(self, ops: Iterable[Any]) -> list[Any]:
        """Do operations, and retry them after a conflict: two searches that refresh the TTL of the
        same items lock them in different orders."""
        ops = list(ops)
        store = self._with_vectors(ops)
        with unavailable_when_unreachable():
            return again_on_conflict(lambda: super(ApiStore, store).batch(ops))

    def _with_vectors(self, ops: list[Any]) -> ApiStore:
        """Return a store that has the vectors of these operations. The library would embed while it
        holds a connection, and a slow embedding function would then exhaust the pool."""
        if self.embeddings is None:
            return self
        texts = [op.query for op in ops if isinstance(op, SearchOp) and op.query]
        if puts := [(number, op) for number, op in enumerate(ops) if isinstance(op, PutOp)]:
            _queries, embedding_request = self._prepare_batch_PUT_queries(puts)
            if embedding_request is not None:
                texts += [text for *_place, text in embedding_request[1]]
        if not texts:
            return self
        texts = list(dict.fromkeys(texts))
        store = copy.copy(self)
        store.embeddings = _Embedded(
            dict(zip(texts, self.embeddings.embed_documents(texts), strict=True))
        )
        return store

    @contextmanager
    def _cursor(self, *, pipeline: bool = False) -> Iterator[Any]:
        with self._pool.connection() as conn:
            end_row_by_row_mode(conn)
            with ProjectStore._cursor(_on(self, conn), pipeline=pipeline) as cursor:
                yield cursor


class FactoryStore(ProjectStore):
    """The store of factories of graphs outside of a run: a connection for each batch, from
    whichever thread and event loop the factory runs in."""

    def __init__(self, settings: Settings, config: StoreConfig) -> None:
        super().__init__(None, config)
        self._settings = settings

    def batch(self, ops: Iterable[Any]) -> list[Any]:
        settings = self._settings
        with connect(
            settings.database_url, pgbouncer=settings.pgbouncer, name="belay factory"
        ) as conn:
            return super(FactoryStore, _on(self, conn)).batch(ops)

    async def abatch(self, ops: Iterable[Any]) -> list[Any]:
        return self.batch(ops)  # the event loop is the factory's own


class RunStore(ProjectStore):
    """The store of graphs, on a child process's connection and the thread that owns it."""

    def __init__(
        self, connection: ReconnectingConnection, database_thread: Executor, config: StoreConfig
    ) -> None:
        super().__init__(None, config)
        self._connection = connection
        self._database_thread = database_thread
        self._keep_waiting: Callable[[], bool] = lambda: True
        self._used = [False]
        self._attempt_is_over = threading.Event()

    def of_place(self) -> RunStore:
        """Return the store of the place of one run at a time."""
        return self

    @contextmanager
    def of_run(self, keep_waiting: Callable[[], bool]) -> Iterator[RunStore]:
        """Yield the store of one attempt. It waits for an unavailable Postgres while `keep_waiting`
        returns True. After the block it raises RuntimeError: what the attempt left behind in this
        process, such as a thread, must not go on writing."""
        store = copy.copy(self)
        store._keep_waiting = keep_waiting
        store._attempt_is_over = threading.Event()
        try:
            yield store
        finally:
            store._attempt_is_over.set()

    @property
    def is_used(self) -> bool:
        """Whether operations may not be done yet."""
        return self._used[0]

    #: Postgres ends operations by itself.
    has_calls_to_cancel = False

    def settle(self, _seconds: float) -> bool:
        """Wait until all operations are done. Return True. A node that was stopped did not wait for
        its own."""
        if self._used[0]:
            self._used[0] = False
            self._database_thread.submit(lambda: None).result()
        return True

    def cancel_calls(self) -> None:
        """Do nothing."""

    def _on_the_connection(self, ops: list[Any]) -> list[Any]:
        """Do operations, again after an outage. They are idempotent: items are replaced."""

        def work(conn: Connection) -> list[Any]:
            return super(RunStore, _on(self, conn)).batch(ops)

        return self._connection.run(work, keep_waiting=self._keep_waiting)

    def _begin(self) -> None:
        if self._attempt_is_over.is_set():
            raise RuntimeError("The run of this store has ended")
        self._used[0] = True

    def batch(self, ops: Iterable[Any]) -> list[Any]:
        self._begin()
        return self._database_thread.submit(self._on_the_connection, list(ops)).result()

    async def abatch(self, ops: Iterable[Any]) -> list[Any]:
        self._begin()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._database_thread, self._on_the_connection, list(ops))


def _on(store: ProjectStore, conn: Connection) -> Any:
    """Return a copy of the store on this connection, with a new lock: only the copy uses it."""
    store = copy.copy(store)
    store.conn = conn
    store.lock = threading.Lock()
    return store


def as_filter(conditions: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return a filter for the library, None if it is empty. An object without operators is compared
    for equality.

    Raise BadRequest for an unsupported operator, for a comparison with neither number nor text, and
    for too many conditions: Postgres plans them in quadratic time, which no time limit ends.
    """
    if not conditions:
        return None
    found = {key: _condition(value) for key, value in conditions.items()}
    in_all = sum(len(one) if isinstance(one, dict) else 1 for one in found.values())
    if max(len(found), in_all) > _MOST_CONDITIONS:
        raise BadRequest(f"a filter may have at most {_MOST_CONDITIONS} conditions in total")
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


#: The store of the graphs of a child process or a host.
GraphStore = RunStore | OwnRunStore


def api_store(pool: ConnectionPool[Connection], graphs: GraphRegistry) -> BaseStore:
    """Return the store of the API."""
    own = graphs.own_store
    return ApiStore(pool, graphs.store) if own is None else OwnApiStore(own)


def run_store(
    connection: ReconnectingConnection, database_thread: Executor, graphs: GraphRegistry
) -> GraphStore:
    """Return the store of the graphs of a process."""
    own = graphs.own_store
    if own is None:
        return RunStore(connection, database_thread, graphs.store)
    return OwnRunStore(own)


def factory_store(settings: Settings, graphs: GraphRegistry) -> BaseStore:
    """Return the store of factories of graphs outside of a run."""
    own = graphs.own_store
    return FactoryStore(settings, graphs.store) if own is None else OwnStore(own)
