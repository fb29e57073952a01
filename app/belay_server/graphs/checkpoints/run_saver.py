"""The fenced saver of a run: every write is checked against the run's claim.

Every write carries the claim and stamps its checkpoints with the run. It keeps a before-image of
what it changes on another run's checkpoint, so that a rollback is exact.

All methods are synchronous inside. Those that a graph calls run on one thread that owns the
connection, in order, so a step's writes are stored before the checkpoint that follows them. While
Postgres is unavailable, a run's reads and writes wait, and with them the run. Writes are
idempotent: after a lost response, a write that may have been done is done again.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any, TypeVar

import psycopg
from langgraph._internal._constants import ERROR, ERROR_SOURCE_NODE
from langgraph.checkpoint.base import (
    WRITES_IDX_MAP,
    BaseCheckpointSaver,
    CheckpointTuple,
    get_serializable_checkpoint_metadata,
)
from langgraph.checkpoint.serde.types import _DeltaSnapshot

from belay_server.db.postgres.connection import Connection, dump_json
from belay_server.db.postgres.outages import is_worth_waiting
from belay_server.db.postgres.reconnecting import ReconnectingConnection
from belay_server.domain.access import without_secrets
from belay_server.domain.runs import Claim
from belay_server.graphs.checkpoints.base_saver import FormatSaver
from belay_server.graphs.checkpoints.own_checkpointer import (
    OwnCheckpointer,
    lacks_values,
)
from belay_server.graphs.checkpoints.rows import CheckpointRows
from belay_server.runtime import fault_points
from belay_server.runtime.fault_points import FaultPoint

#: Turns of the event loop after which the events of a finished task have been delivered, if the
#: graph streams eagerly. A subgraph's take four, those of `astream_events` three.
_TURNS = 6

_T = TypeVar("_T")
_CLAIM_OVER = "BL001"
#: Seconds that a write is delayed when nothing waits for it, so that others join its statement.
_GATHER_SECONDS = 0.005


class ClaimLost(Exception):
    """The run has been claimed again or has ended. This attempt can no longer write."""


class CheckpointsUnavailable(Exception):
    """The wait for an unavailable Postgres was ended, such as by a stop. The attempt ends."""


class RunSaver(FormatSaver):
    """The saver of one attempt of one run. `database_thread` must be a single thread: all reads
    and writes are done there, in the order of the calls.

    `keep_waiting` returns False to end the wait for an unavailable Postgres. With `behind`, async
    writes return before they are stored, and those made during one statement go with the next.
    `flush` and every read wait for all of them. The error of a failed write is raised by the next
    call. `is_new` means that nothing was ever written on this LangGraph thread. `is_retry` means
    that an earlier attempt of the run may have written.
    `before_store` is called on the database thread before something is stored; it returns False
    after it has waited in vain. With it, async writes are stored after the event loop has delivered
    the events of what they store.
    """

    def __init__(
        self,
        connection: ReconnectingConnection,
        claim: Claim,
        database_thread: Executor,
        keep_waiting: Callable[[], bool],
        *,
        behind: bool = False,
        is_new: bool = False,
        is_retry: bool = False,
        before_store: Callable[[], bool] | None = None,
        aes_key: bytes | None = None,
        checkpointer: OwnCheckpointer | None = None,
    ) -> None:
        super().__init__(None, aes_key=aes_key, checkpointer=checkpointer)
        self._connection = connection
        self.claim = claim
        self._database_thread = database_thread
        self._keep_waiting = keep_waiting
        self._behind = behind
        self._is_new = is_new
        self._is_retry = is_retry
        self._before_store = before_store
        #: Namespaces and ids of the checkpoints that this attempt has written.
        self._own: set[tuple[str, str]] = set()
        self._to_store: deque[Callable[[], CheckpointRows]] = deque()
        self._storing_is_due = False
        #: Set by a call that waits until the queued writes are stored.
        self._hurry = threading.Event()
        self._failure: Exception | None = None

    # -- on the database thread -------------------------------------------------------------------

    def _reconnecting(self, work: Callable[[], _T]) -> _T:
        """Do `work`, again after an outage. Raise ClaimLost when the claim is no longer valid, and
        CheckpointsUnavailable when the wait for Postgres was ended."""

        def on(conn: Connection) -> _T:
            self.conn = conn
            return work()

        try:
            return self._connection.run(on, keep_waiting=self._keep_waiting)
        except psycopg.Error as error:
            if is_worth_waiting(error):
                raise CheckpointsUnavailable(str(error)) from error
            if error.sqlstate == _CLAIM_OVER:
                raise ClaimLost(str(error)) from error
            raise

    def _store_what_gathers(self) -> None:
        """Wait a few milliseconds for more writes, then store all of them together, such as those
        of a step that ends and of the next one that begins."""
        self._hurry.wait(_GATHER_SECONDS)
        self._store_what_waits()

    def _store_what_waits(self) -> None:
        """Store all queued writes in as few statements as possible. Later calls raise an error."""
        self._hurry.clear()
        self._storing_is_due = False
        if self._failure is not None:
            return
        try:
            rows = CheckpointRows()
            while self._to_store:
                more = self._to_store.popleft()()
                if rows.collides(more):
                    self._store(rows)
                    rows = CheckpointRows()
                rows.merge(more)
            self._store(rows)
        except Exception as error:  # noqa: BLE001  (raised by the next call)
            self._failure = error

    def take_rows(self) -> CheckpointRows:
        """Return the rows of queued writes, as many as one statement can store; the rest stays
        queued. The caller stores them, or puts them back. An error is raised by the next call."""
        rows = CheckpointRows()
        try:
            while self._failure is None and self._to_store:
                more = self._to_store[0]()
                if rows.collides(more):
                    self._to_store[0] = partial(_as_is, more)
                    break
                self._to_store.popleft()
                rows.merge(more)
        except Exception as error:  # noqa: BLE001  (raised by the next call)
            self._failure = error
            return CheckpointRows()
        return rows

    @property
    def has_more(self) -> bool:
        """Whether writes are queued."""
        return bool(self._to_store)

    def put_back_rows(self, rows: CheckpointRows) -> None:
        """Queue rows again that could not be stored."""
        self._to_store.appendleft(partial(_as_is, rows))

    def prepare_to_store(self, rows: CheckpointRows) -> bool:
        """Call `before_store` if there are rows. Return False if it has waited in vain."""
        return not rows or self._before_store is None or self._before_store()

    def _store(self, rows: CheckpointRows) -> None:
        if not rows:
            return
        self.prepare_to_store(rows)
        sql, params = rows.statement(self.claim)

        def write() -> None:
            with self._cursor() as cursor:
                cursor.execute(sql, params)

        self._reconnecting(write)

    def _read(self, read: Callable[[], _T]) -> _T:
        self._store_what_waits()
        self._raise_failure()
        return self._reconnecting(read)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    # -- rows -------------------------------------------------------------------------------------

    def _rows_of_put(
        self, config: Any, checkpoint: Any, metadata: Any, new_versions: Any
    ) -> CheckpointRows:
        fault_points.reached(FaultPoint.BEFORE_CHECKPOINT, self.claim.run_id)
        configurable = config["configurable"]
        thread_id, namespace = configurable["thread_id"], configurable["checkpoint_ns"]
        stamped = self._stamped(config, metadata)
        checkpoint, metadata, new_versions = self._storable(checkpoint, metadata, new_versions)
        stored, blobs = _split(checkpoint)
        versions = {channel: new_versions[channel] for channel in blobs if channel in new_versions}
        rows = CheckpointRows()
        row = (
            thread_id,
            namespace,
            checkpoint["id"],
            configurable.get("checkpoint_id"),
            dump_json(stored),
            dump_json(stamped),
        )
        rows.add_checkpoint(row, self._dump_blobs(thread_id, namespace, blobs, versions))
        return rows

    def _stamped(self, config: Any, metadata: Any) -> dict[str, Any]:
        """Return the metadata of a checkpoint of the run."""
        return {
            **without_secrets(get_serializable_checkpoint_metadata(config, metadata)),
            "run_id": str(self.claim.run_id),
            "thread_id": config["configurable"]["thread_id"],
        }

    def _rows_of_writes(
        self, config: Any, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str
    ) -> CheckpointRows:
        fault_points.reached(FaultPoint.BEFORE_WRITES, self.claim.run_id)
        configurable = config["configurable"]
        thread_id, namespace = configurable["thread_id"], configurable["checkpoint_ns"]
        checkpoint_id = configurable["checkpoint_id"]
        dumped = self._dump_writes(
            thread_id, namespace, checkpoint_id, task_id, task_path, list(writes)
        )
        rows = CheckpointRows()
        rows.add_writes(
            dumped,
            special=all(channel in WRITES_IDX_MAP for channel, _ in writes),
            foreign=(namespace, checkpoint_id) not in self._own,
        )
        return rows

    def _ask(self, rows: Callable[[], CheckpointRows]) -> None:
        self._raise_failure()
        self._to_store.append(rows)

    def _put_later(
        self, config: Any, checkpoint: Any, metadata: Any, new_versions: Any
    ) -> dict[str, Any]:
        self._ask(partial(self._rows_of_put, config, checkpoint, metadata, new_versions))
        configurable = config["configurable"]
        namespace = configurable["checkpoint_ns"]
        self._own.add((namespace, checkpoint["id"]))
        return {
            "configurable": {
                "thread_id": configurable["thread_id"],
                "checkpoint_ns": namespace,
                "checkpoint_id": checkpoint["id"],
            }
        }

    def _with_values(self, found: CheckpointTuple) -> CheckpointTuple:
        """Return a checkpoint as it is read on the database thread, where other runs would wait for
        the project's checkpointer."""
        return found

    async def _awhole(self, found: CheckpointTuple) -> CheckpointTuple:
        return await self._own_values.afill(found) if lacks_values(found) else found

    def _tuple(self, config: Any) -> CheckpointTuple | None:
        """Return a checkpoint, in a retry without the output of tasks that have failed."""
        found = super().get_tuple(config)
        return without_failed_output(found) if found is not None and self._is_retry else found

    def _is_empty(self) -> bool:
        """Return True if the LangGraph thread was new and this attempt wrote no checkpoint."""
        return self._is_new and not self._own

    # -- called by a synchronous graph ------------------------------------------------------------

    def _on_its_thread(self, work: Callable[[], _T]) -> _T:
        self._hurry.set()
        return self._database_thread.submit(work).result()

    def _store_now(self) -> None:
        self._on_its_thread(self._store_what_waits)
        self._raise_failure()

    def get_tuple(self, config: Any) -> CheckpointTuple | None:
        if self._is_empty():
            return None
        found = self._on_its_thread(partial(self._read, partial(self._tuple, config)))
        return None if found is None else super()._with_values(found)

    def list(
        self,
        config: Any,
        *,
        filter: dict[str, Any] | None = None,
        before: Any = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        found = super().list

        def read() -> list[CheckpointTuple]:
            return [*found(config, filter=filter, before=before, limit=limit)]

        return map(super()._with_values, self._on_its_thread(partial(self._read, read)))

    def delete_thread(self, thread_id: str) -> None:
        self._on_its_thread(partial(self._read, partial(super().delete_thread, thread_id)))

    def get_delta_channel_history(
        self, *, config: Any, channels: Sequence[str]
    ) -> Mapping[str, Any]:
        history = super().get_delta_channel_history
        if self._checkpointer is not None:  # it calls `get_tuple`
            return history(config=config, channels=channels)
        read = partial(history, config=config, channels=channels)
        return self._on_its_thread(partial(self._read, read))

    def put(self, config: Any, checkpoint: Any, metadata: Any, new_versions: Any) -> Any:
        if self._checkpointer is not None:
            stamped = self._stamped(config, metadata)
            row = self._checkpointer.put(config, checkpoint, stamped, new_versions)
            checkpoint, new_versions = row
        written = self._put_later(config, checkpoint, metadata, new_versions)
        self._store_now()
        return written

    def put_writes(
        self, config: Any, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        if self._checkpointer is not None:
            self._checkpointer.put_writes(config, writes, task_id, task_path)
        self._ask(partial(self._rows_of_writes, config, writes, task_id, task_path))
        self._store_now()

    # -- called by an asynchronous graph ----------------------------------------------------------

    async def _in_order(self, work: Callable[[], _T]) -> _T:
        self._hurry.set()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._database_thread, work)

    async def flush(self) -> None:
        """Wait until all writes are stored. Raise the error of the write that failed."""
        await self._in_order(self._store_what_waits)
        self._raise_failure()

    async def _store_soon(self) -> None:
        if not self._behind:
            await self.flush()
        elif not self._storing_is_due:
            self._storing_is_due = True
            self._database_thread.submit(self._store_what_gathers)

    async def _let_events_be_delivered(self) -> None:
        """Let the event loop deliver the events of a step before its writes are queued. LangGraph
        starts to store them first."""
        if self._before_store is not None:
            for _ in range(_TURNS):
                await asyncio.sleep(0)

    async def aget_tuple(self, config: Any) -> CheckpointTuple | None:
        if self._is_empty():
            return None
        found = await self._in_order(partial(self._read, partial(self._tuple, config)))
        return None if found is None else await self._awhole(found)

    async def alist(
        self,
        config: Any,
        *,
        filter: dict[str, Any] | None = None,
        before: Any = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        read = super().list

        def read_all() -> list[CheckpointTuple]:
            return [*read(config, filter=filter, before=before, limit=limit)]

        for found in await self._in_order(partial(self._read, read_all)):
            yield await self._awhole(found)

    async def aput(self, config: Any, checkpoint: Any, metadata: Any, new_versions: Any) -> Any:
        await self._let_events_be_delivered()  # as for writes: so their order stays
        if self._checkpointer is not None:
            stamped = self._stamped(config, metadata)
            row = await self._checkpointer.aput(config, checkpoint, stamped, new_versions)
            checkpoint, new_versions = row
        written = self._put_later(config, checkpoint, metadata, new_versions)
        await self._store_soon()
        return written

    async def aput_writes(
        self, config: Any, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        await self._let_events_be_delivered()
        if self._checkpointer is not None:
            await self._checkpointer.aput_writes(config, writes, task_id, task_path)
        self._ask(partial(self._rows_of_writes, config, writes, task_id, task_path))
        await self._store_soon()

    async def adelete_thread(self, thread_id: str) -> None:
        await self._in_order(partial(self._read, partial(super().delete_thread, thread_id)))

    async def aget_delta_channel_history(self, *, config: Any, channels: Sequence[str]) -> Any:
        if self._checkpointer is not None:  # it calls `aget_tuple`
            return await BaseCheckpointSaver.aget_delta_channel_history(
                self, config=config, channels=channels
            )
        read = partial(super().get_delta_channel_history, config=config, channels=channels)
        return await self._in_order(partial(self._read, read))


def _as_is(rows: CheckpointRows) -> CheckpointRows:
    return rows


def without_failed_output(found: CheckpointTuple) -> CheckpointTuple:
    """Return a checkpoint without the output of tasks that have failed, so that they are repeated.

    A task fails after its output if one of its edges raises. LangGraph stores both, and takes every
    task that has output for finished (`langgraph.pregel._task_status`): an attempt after it would
    go on without the edge. A failure that went to an error handler is left to LangGraph.
    """
    writes = found.pending_writes or []
    failed = {task_id for task_id, channel, _ in writes if channel == ERROR}
    failed -= {task_id for task_id, channel, _ in writes if channel == ERROR_SOURCE_NODE}
    if not failed:
        return found
    kept = [write for write in writes if write[0] not in failed or write[1] in WRITES_IDX_MAP]
    return found._replace(pending_writes=kept)


def _split(checkpoint: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a checkpoint as LangGraph's saver does. Return it with its primitives inline, and the
    other values, which become blobs."""
    inline: dict[str, Any] = {}
    blobs: dict[str, Any] = {}
    for channel, value in checkpoint["channel_values"].items():
        if isinstance(value, _DeltaSnapshot):
            inline[channel], blobs[channel] = True, value
        elif value is None or isinstance(value, (str, int, float, bool)):
            inline[channel] = value
        else:
            blobs[channel] = value
    return {**checkpoint, "channel_values": inline}, blobs
