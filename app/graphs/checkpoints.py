"""LangGraph's Postgres saver, fenced: what a run writes is checked against its claim.

Same tables, same format; LangGraph's own tools read them. `RunSaver` serves one run in a worker's
child: every write carries the claim, stamps its checkpoints with the run, and keeps what it is
about to change on another run's checkpoint, so that a rollback is exact. `ThreadSaver` serves the
API, which reads states and writes them on idle threads.

Both are synchronous underneath. The async methods a graph calls run on one thread that owns the
connection, in order, so a step's writes are in before the checkpoint that follows them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any, TypeVar
from uuid import UUID

import psycopg
from langgraph.checkpoint.base import WRITES_IDX_MAP, CheckpointTuple
from langgraph.checkpoint.postgres import PostgresSaver
from psycopg_pool import ConnectionPool

from app.db.connection import Connection
from app.domain.runs import Claim

_T = TypeVar("_T")
_CLAIM_OVER = "BL001"
_ASSERT_CLAIM = "SELECT belay_assert_claim(%s, %s)"
#: Once per checkpoint and run; a checkpoint of this very run needs no image, it will be deleted.
_KEEP_BEFORE_IMAGE = """
INSERT INTO run_before_image (run_id, thread_id, checkpoint_ns, checkpoint_id, writes)
SELECT %(run_id)s, %(thread_id)s, %(checkpoint_ns)s, %(checkpoint_id)s,
    coalesce((
        SELECT jsonb_agg(to_jsonb(w)) FROM checkpoint_writes w
        WHERE w.thread_id = %(thread_id)s AND w.checkpoint_ns = %(checkpoint_ns)s
          AND w.checkpoint_id = %(checkpoint_id)s), '[]')
WHERE NOT EXISTS (
    SELECT 1 FROM checkpoints c
    WHERE c.thread_id = %(thread_id)s AND c.checkpoint_ns = %(checkpoint_ns)s
      AND c.checkpoint_id = %(checkpoint_id)s AND c.metadata ->> 'run_id' = %(run_text)s)
ON CONFLICT DO NOTHING
"""


class ClaimLost(Exception):
    """The run belongs to somebody else now, or has ended: this attempt may write no more."""


class CheckpointsUnavailable(Exception):
    """Postgres failed during a checkpoint read or write; the attempt ends, the run does not."""


class _Saver(PostgresSaver):
    """What both savers share."""

    def put(self, config: Any, checkpoint: Any, metadata: Any, new_versions: Any) -> Any:
        return super().put(config, _without_inline_nul(checkpoint), metadata, new_versions)


class ThreadSaver(_Saver):
    """For the API: states of threads, over the web process's pool."""

    def __init__(self, pool: ConnectionPool | Connection) -> None:
        super().__init__(pool)  # type: ignore[arg-type]

    def put(self, config: Any, checkpoint: Any, metadata: Any, new_versions: Any) -> Any:
        """A state written by the API belongs to no run, whatever checkpoint it continues."""
        owned = {key: value for key, value in metadata.items() if key != "run_id"}
        return super().put(config, checkpoint, owned, new_versions)


class RunSaver(_Saver):
    """For one attempt of one run. `database_thread` must be a single thread."""

    def __init__(self, conn: Connection, claim: Claim, database_thread: Executor) -> None:
        super().__init__(conn)
        self._claim = claim
        self._database_thread = database_thread
        self._own: set[tuple[str, str]] = set()

    @contextmanager
    def _cursor(self, *, pipeline: bool = False) -> Iterator[Any]:
        """Writes come in pipelines; the fence goes first in the same implicit transaction."""
        try:
            with super()._cursor(pipeline=pipeline) as cursor:
                if pipeline:
                    cursor.execute(_ASSERT_CLAIM, (self._claim.run_id, self._claim.claim_no))
                yield cursor
        except psycopg.DatabaseError as error:
            if error.sqlstate == _CLAIM_OVER:
                raise ClaimLost(str(error)) from error
            if isinstance(error, psycopg.OperationalError):
                raise CheckpointsUnavailable(str(error)) from error
            raise

    def put(self, config: Any, checkpoint: Any, metadata: Any, new_versions: Any) -> Any:
        stamped = {**metadata, "run_id": str(self._claim.run_id)}
        saved = super().put(config, checkpoint, stamped, new_versions)
        self._own.add((config["configurable"]["checkpoint_ns"], checkpoint["id"]))
        return saved

    def put_writes(
        self, config: Any, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        where = config["configurable"]
        thread_id, namespace, checkpoint_id = (
            where["thread_id"],
            where["checkpoint_ns"],
            where["checkpoint_id"],
        )
        special = all(channel in WRITES_IDX_MAP for channel, _ in writes)
        query = self.UPSERT_CHECKPOINT_WRITES_SQL if special else self.INSERT_CHECKPOINT_WRITES_SQL
        rows = self._dump_writes(
            thread_id, namespace, checkpoint_id, task_id, task_path, list(writes)
        )
        with self._cursor(pipeline=True) as cursor:
            if (namespace, checkpoint_id) not in self._own:
                run_id: UUID = self._claim.run_id
                image = {
                    "run_id": run_id,
                    "run_text": str(run_id),
                    "thread_id": thread_id,
                    "checkpoint_ns": namespace,
                    "checkpoint_id": checkpoint_id,
                }
                cursor.execute(_KEEP_BEFORE_IMAGE, image)
            cursor.executemany(query, rows)

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


def _without_inline_nul(checkpoint: Any) -> Any:
    """The saver inlines strings in a jsonb column, which holds no NUL: U+FFFD stands for it."""
    values = checkpoint["channel_values"]
    bad = [key for key, value in values.items() if isinstance(value, str) and "\0" in value]
    if not bad:
        return checkpoint
    replaced = {key: values[key].replace("\0", "\ufffd") for key in bad}
    return {**checkpoint, "channel_values": {**values, **replaced}}
