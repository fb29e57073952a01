"""LangGraph's Postgres saver, fenced: what a run writes is checked against its claim.

Same tables, same format; LangGraph's own tools read them. `RunSaver` serves one run in a worker's
child: every write carries the claim, stamps its checkpoints with the run, and keeps what it is
about to change on another run's checkpoint, so that a rollback is exact. `ThreadSaver` serves the
API, which reads states and writes them on idle threads.

Both are synchronous underneath. The async methods a graph calls run on one thread that owns the
connection, in order, so a step's writes are in before the checkpoint that follows them. While
Postgres is away a run's reads and writes wait for it, and with them the run: every write may be
done twice, because an answer that was lost does not tell whether it was done.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any, TypeVar

import psycopg
from langgraph.checkpoint.base import (
    WRITES_IDX_MAP,
    CheckpointTuple,
    get_serializable_checkpoint_metadata,
)
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.serde.types import _DeltaSnapshot
from psycopg.types.json import Jsonb
from psycopg_pool import ConnectionPool

from app import fault_points
from app.db.connection import OUTAGE, Connection, unavailable_when_unreachable
from app.db.patient_connection import PatientConnection
from app.domain.runs import Claim
from app.fault_points import FaultPoint
from app.graphs.checkpoint_ids import go_on_after

_T = TypeVar("_T")
_CLAIM_OVER = "BL001"
#: One statement is one message: a writer that stalls (a node that holds the GIL, a worker that is
#: stopped) has either not asked yet or is done, and never sits on the run's row lock half-way,
#: where it would hold up a cancel or a takeover.
_PUT = """
WITH claim AS MATERIALIZED (SELECT belay_assert_claim(%(run_id)s, %(claim_no)s)),
blobs AS (
    INSERT INTO checkpoint_blobs (thread_id, checkpoint_ns, channel, version, type, blob)
    SELECT %(thread_id)s, %(checkpoint_ns)s, b.channel, b.version, b.type, b.blob
    FROM claim, unnest(
        %(channels)s::text[], %(versions)s::text[], %(types)s::text[], %(blobs)b::bytea[]
    ) AS b (channel, version, type, blob)
    ON CONFLICT (thread_id, checkpoint_ns, channel, version) DO NOTHING
)
INSERT INTO checkpoints
    (thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id, checkpoint, metadata)
SELECT %(thread_id)s, %(checkpoint_ns)s, %(checkpoint_id)s, %(parent_id)s::text,
    %(checkpoint)s::jsonb, %(metadata)s::jsonb
FROM claim
ON CONFLICT (thread_id, checkpoint_ns, checkpoint_id)
DO UPDATE SET checkpoint = EXCLUDED.checkpoint, metadata = EXCLUDED.metadata
"""
#: The before-image of another run's checkpoint is kept once, by the statement that changes it; a
#: checkpoint of this very run needs none, it will be deleted.
_PUT_WRITES = """
WITH claim AS MATERIALIZED (SELECT belay_assert_claim(%(run_id)s, %(claim_no)s)),
image AS (
    INSERT INTO run_before_image (run_id, thread_id, checkpoint_ns, checkpoint_id, writes)
    SELECT %(run_id)s, %(thread_id)s, %(checkpoint_ns)s, %(checkpoint_id)s,
        coalesce((
            SELECT jsonb_agg(to_jsonb(w)) FROM checkpoint_writes w
            WHERE w.thread_id = %(thread_id)s AND w.checkpoint_ns = %(checkpoint_ns)s
              AND w.checkpoint_id = %(checkpoint_id)s), '[]')
    FROM claim
    WHERE %(foreign)s AND NOT EXISTS (
        SELECT 1 FROM checkpoints c
        WHERE c.thread_id = %(thread_id)s AND c.checkpoint_ns = %(checkpoint_ns)s
          AND c.checkpoint_id = %(checkpoint_id)s AND c.metadata ->> 'run_id' = %(run_text)s)
    ON CONFLICT DO NOTHING
)
INSERT INTO checkpoint_writes
    (thread_id, checkpoint_ns, checkpoint_id, task_id, task_path, idx, channel, type, blob)
SELECT %(thread_id)s, %(checkpoint_ns)s, %(checkpoint_id)s, %(task_id)s, %(task_path)s,
    w.idx, w.channel, w.type, w.blob
FROM claim, unnest(
    %(indexes)s::int[], %(channels)s::text[], %(types)s::text[], %(blobs)b::bytea[]
) AS w (idx, channel, type, blob)
ON CONFLICT (thread_id, checkpoint_ns, checkpoint_id, task_id, idx)
"""
_KEEP_WRITES = _PUT_WRITES + "DO NOTHING"
#: Errors, interrupts and resumes have one row each, which the newest one takes.
_REPLACE_WRITES = (
    _PUT_WRITES
    + """
DO UPDATE SET channel = EXCLUDED.channel, type = EXCLUDED.type, blob = EXCLUDED.blob
"""
)


class ClaimLost(Exception):
    """The run belongs to somebody else now, or has ended: this attempt may write no more."""


class CheckpointsUnavailable(Exception):
    """Postgres is away and the run was told to stop meanwhile; the attempt ends."""


_LATEST_ID = """
SELECT max(checkpoint_id) FROM checkpoints
WHERE thread_id = %(thread_id)s AND checkpoint_ns = %(checkpoint_ns)s
"""


class _Saver(PostgresSaver):
    """What both savers share."""

    def get_tuple(self, config: Any) -> CheckpointTuple | None:
        found = super().get_tuple(config)
        if config["configurable"].get("checkpoint_id"):
            self._go_on_after_the_latest(config)
        elif found is not None:
            go_on_after(found.checkpoint["id"])
        return found

    def _go_on_after_the_latest(self, config: Any) -> None:
        """A run that continues an older checkpoint still makes the thread's newest one."""
        where = {
            "thread_id": config["configurable"]["thread_id"],
            "checkpoint_ns": config["configurable"].get("checkpoint_ns", ""),
        }
        with self._cursor() as cursor:
            row = cursor.execute(_LATEST_ID, where).fetchone()
        if row is not None and row["max"] is not None:
            go_on_after(row["max"])

    def put(self, config: Any, checkpoint: Any, metadata: Any, new_versions: Any) -> Any:
        return super().put(config, _without_inline_nul(checkpoint), metadata, new_versions)


class ThreadSaver(_Saver):
    """For the API: states of threads, over the web process's pool."""

    def __init__(self, pool: ConnectionPool | Connection) -> None:
        super().__init__(pool)  # type: ignore[arg-type]

    @contextmanager
    def _cursor(self, *, pipeline: bool = False) -> Iterator[Any]:
        with unavailable_when_unreachable(), super()._cursor(pipeline=pipeline) as cursor:
            yield cursor

    def put(self, config: Any, checkpoint: Any, metadata: Any, new_versions: Any) -> Any:
        """A state written by the API belongs to no run, whatever checkpoint it continues."""
        owned = {key: value for key, value in metadata.items() if key != "run_id"}
        owned["thread_id"] = config["configurable"]["thread_id"]
        return super().put(config, checkpoint, owned, new_versions)


class RunSaver(_Saver):
    """For one attempt of one run. `database_thread` must be a single thread.

    `keep_waiting` says whether to wait on for a Postgres that is away.
    """

    def __init__(
        self,
        connection: PatientConnection,
        claim: Claim,
        database_thread: Executor,
        keep_waiting: Callable[[], bool],
    ) -> None:
        super().__init__(None)  # type: ignore[arg-type]
        self._connection = connection
        self._claim = claim
        self._database_thread = database_thread
        self._keep_waiting = keep_waiting
        self._own: set[tuple[str, str]] = set()

    def _patiently(self, work: Callable[[], _T]) -> _T:
        """Raises ClaimLost when the claim is over, CheckpointsUnavailable when the wait is."""

        def on(conn: Connection) -> _T:
            self.conn = conn
            return work()

        try:
            return self._connection.run(on, keep_waiting=self._keep_waiting)
        except OUTAGE as error:
            raise CheckpointsUnavailable(str(error)) from error
        except psycopg.DatabaseError as error:
            if error.sqlstate == _CLAIM_OVER:
                raise ClaimLost(str(error)) from error
            raise

    def get_tuple(self, config: Any) -> CheckpointTuple | None:
        read = super().get_tuple
        return self._patiently(lambda: read(config))

    def list(
        self,
        config: Any,
        *,
        filter: dict[str, Any] | None = None,
        before: Any = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        read = super().list
        found = self._patiently(
            lambda: [*read(config, filter=filter, before=before, limit=limit)],
        )
        return iter(found)

    def delete_thread(self, thread_id: str) -> None:
        delete = super().delete_thread
        self._patiently(lambda: delete(thread_id))

    def get_delta_channel_history(
        self, *, config: Any, channels: Sequence[str]
    ) -> Mapping[str, Any]:
        read = super().get_delta_channel_history
        return self._patiently(lambda: read(config=config, channels=channels))

    def _execute(self, sql: str, params: dict[str, Any]) -> None:
        def write() -> None:
            with self._cursor() as cursor:
                cursor.execute(sql, params)

        self._patiently(write)

    def _where(self, config: Any) -> dict[str, Any]:
        """The claim, and the thread and namespace a write goes to."""
        configurable = config["configurable"]
        return {
            "run_id": self._claim.run_id,
            "claim_no": self._claim.claim_no,
            "thread_id": configurable["thread_id"],
            "checkpoint_ns": configurable["checkpoint_ns"],
        }

    def put(self, config: Any, checkpoint: Any, metadata: Any, new_versions: Any) -> Any:
        fault_points.reached(FaultPoint.BEFORE_CHECKPOINT, self._claim.run_id)
        checkpoint = _without_inline_nul(checkpoint)
        where = self._where(config)
        stored, blobs = _split(checkpoint)
        rows = self._dump_blobs(
            where["thread_id"],
            where["checkpoint_ns"],
            blobs,
            {channel: new_versions[channel] for channel in blobs if channel in new_versions},
        )
        stamped = {
            **get_serializable_checkpoint_metadata(config, metadata),
            "run_id": str(self._claim.run_id),
            "thread_id": where["thread_id"],
        }
        params = {
            **where,
            "checkpoint_id": checkpoint["id"],
            "parent_id": config["configurable"].get("checkpoint_id"),
            "checkpoint": Jsonb(stored),
            "metadata": Jsonb(stamped),
            "channels": [row[2] for row in rows],
            "versions": [row[3] for row in rows],
            "types": [row[4] for row in rows],
            "blobs": [row[5] for row in rows],
        }
        self._execute(_PUT, params)
        self._own.add((where["checkpoint_ns"], checkpoint["id"]))
        address = ("thread_id", "checkpoint_ns")
        written = {key: where[key] for key in address} | {"checkpoint_id": checkpoint["id"]}
        return {"configurable": written}

    def put_writes(
        self, config: Any, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        fault_points.reached(FaultPoint.BEFORE_WRITES, self._claim.run_id)
        where = self._where(config)
        checkpoint_id = config["configurable"]["checkpoint_id"]
        rows = self._dump_writes(
            where["thread_id"],
            where["checkpoint_ns"],
            checkpoint_id,
            task_id,
            task_path,
            list(writes),
        )
        special = all(channel in WRITES_IDX_MAP for channel, _ in writes)
        if special:  # one row each, and one statement may not write a row twice
            rows = list({row[5]: row for row in rows}.values())
        params = {
            **where,
            "run_text": str(self._claim.run_id),
            "checkpoint_id": checkpoint_id,
            "foreign": (where["checkpoint_ns"], checkpoint_id) not in self._own,
            "task_id": task_id,
            "task_path": task_path,
            "indexes": [row[5] for row in rows],
            "channels": [row[6] for row in rows],
            "types": [row[7] for row in rows],
            "blobs": [row[8] for row in rows],
        }
        self._execute(_REPLACE_WRITES if special else _KEEP_WRITES, params)

    async def _in_order(self, function: Callable[..., _T], *args: Any) -> _T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._database_thread, function, *args)

    async def aget_tuple(self, config: Any) -> CheckpointTuple | None:
        return await self._in_order(self.get_tuple, config)

    async def alist(
        self,
        config: Any,
        *,
        filter: dict[str, Any] | None = None,
        before: Any = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        def read() -> list[CheckpointTuple]:
            return list(self.list(config, filter=filter, before=before, limit=limit))

        for found in await self._in_order(read):
            yield found

    async def aput(self, config: Any, checkpoint: Any, metadata: Any, new_versions: Any) -> Any:
        return await self._in_order(self.put, config, checkpoint, metadata, new_versions)

    async def aput_writes(
        self, config: Any, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        await self._in_order(self.put_writes, config, writes, task_id, task_path)

    async def adelete_thread(self, thread_id: str) -> None:
        await self._in_order(self.delete_thread, thread_id)

    async def aget_delta_channel_history(self, *, config: Any, channels: Sequence[str]) -> Any:
        def read() -> Any:
            return self.get_delta_channel_history(config=config, channels=channels)

        return await self._in_order(read)


def _split(checkpoint: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A checkpoint as LangGraph's saver stores it: primitives inline, the rest as blobs."""
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


def _without_inline_nul(checkpoint: Any) -> Any:
    """The saver inlines strings in a jsonb column, which holds no NUL: U+FFFD stands for it."""
    values = checkpoint["channel_values"]
    bad = [key for key, value in values.items() if isinstance(value, str) and "\0" in value]
    if not bad:
        return checkpoint
    replaced = {key: values[key].replace("\0", "\ufffd") for key in bad}
    return {**checkpoint, "channel_values": {**values, **replaced}}
