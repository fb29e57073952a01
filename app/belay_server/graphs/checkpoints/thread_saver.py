"""The saver of the API. It reads states of threads at any time, and writes them on idle threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from langgraph.checkpoint.base import CheckpointTuple
from psycopg_pool import ConnectionPool

from belay_server.db.postgres.connection import Connection
from belay_server.db.postgres.pool import unavailable_when_unreachable
from belay_server.graphs.checkpoints.base_saver import FormatSaver
from belay_server.graphs.checkpoints.own_checkpointer import OwnCheckpointer

#: Bytes of the checkpoints that a condition selects, and about how many pending tasks and writes of
#: tasks they have, before any of them is read. Postgres stores the size of a value that is out of
#: line, so nothing is decompressed except a checkpoint of more than 32 KiB (compressed), which has
#: large values inline. A small `Send` in the channel of tasks has 32 bytes or more.
_SIZES = """
SELECT
    coalesce(sum(
        CASE WHEN pg_column_size(c.checkpoint) > 32768
            THEN octet_length(c.checkpoint::text) ELSE 0 END
        + b.bytes + w.bytes
    ), 0)::bigint AS size,
    coalesce(sum(w.writes + b.sends / 32), 0)::bigint AS tasks
FROM (SELECT * FROM checkpoints {where} ORDER BY checkpoint_id DESC LIMIT %s) c
CROSS JOIN LATERAL (
    SELECT coalesce(sum(octet_length(b.blob)), 0) AS bytes,
           coalesce(sum(octet_length(b.blob)) FILTER (WHERE b.channel = '__pregel_tasks'), 0)
           AS sends
    FROM jsonb_each_text(c.checkpoint -> 'channel_versions') v
    JOIN checkpoint_blobs b ON b.thread_id = c.thread_id
     AND b.checkpoint_ns = c.checkpoint_ns AND b.channel = v.key AND b.version = v.value
) b
CROSS JOIN LATERAL (
    SELECT coalesce(sum(octet_length(w.blob)), 0) AS bytes, count(*) AS writes
    FROM checkpoint_writes w
    WHERE w.thread_id = c.thread_id AND w.checkpoint_ns = c.checkpoint_ns
      AND w.checkpoint_id = c.checkpoint_id
) w
"""
#: The value of a delta channel is computed from all its writes, of any checkpoint.
_SIZE_OF_WRITES = """
SELECT coalesce(sum(octet_length(blob)), 0)::bigint AS size FROM checkpoint_writes
WHERE thread_id = %s AND checkpoint_ns = %s AND channel = ANY (%s)
"""
#: Decoding this many bytes takes about five milliseconds.
_TAKES_A_TURN = 64 * 1024


class CannotPrune(Exception):
    """The history cannot be deleted: the thread's latest state is computed from it."""


class LargeState(Exception):
    """A state has more bytes than this saver may read or store. The read or write was not done."""


class ThreadSaver(FormatSaver):
    """Reads and writes the states of threads, over the web process's pool."""

    def __init__(
        self,
        pool: ConnectionPool[Connection] | Connection,
        *,
        most_bytes: int | None = None,
        most_written_bytes: int | None = None,
        most_stored_bytes: int | None = None,
        most_tasks: int | None = None,
        turn: AbstractContextManager[object] | None = None,
        aes_key: bytes | None = None,
        checkpointer: OwnCheckpointer | None = None,
    ) -> None:
        """Raise LargeState on reading more than `most_bytes` or about `most_tasks` pending tasks at
        once, or a delta channel with more than `most_written_bytes` of writes, and on storing more
        than `most_stored_bytes` in all. None means no limit. States that are not small are decoded
        while holding `turn`."""
        super().__init__(pool, aes_key=aes_key, checkpointer=checkpointer)
        self._most_bytes = most_bytes
        self._most_written_bytes = most_written_bytes
        self._most_stored_bytes = most_stored_bytes
        self._most_tasks = most_tasks
        self._stored_bytes = 0
        self._turn = turn or nullcontext()

    @contextmanager
    def _cursor(self, *, pipeline: bool = False) -> Iterator[Any]:
        # On a connection it is part of a transaction, whose owner handles the driver's errors.
        is_part = isinstance(self.conn, Connection)
        with (
            nullcontext() if is_part else unavailable_when_unreachable(),
            super()._cursor(pipeline=pipeline) as cursor,
        ):
            yield cursor

    def get_tuple(self, config: Any) -> CheckpointTuple | None:
        """Return the checkpoint, or None. Raise LargeState if it is too large."""
        where = {"checkpoint_ns": "", **config["configurable"]}
        self._refuse_large(*self._search_where({"configurable": where}, None), limit=1)
        return super().get_tuple(config)

    def list(
        self,
        config: Any,
        *,
        filter: dict[str, Any] | None = None,
        before: Any = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        """Yield the checkpoints, newest first. Raise LargeState if together they are too large."""
        self._refuse_large(*self._search_where(config, filter, before), limit=limit)
        yield from super().list(config, filter=filter, before=before, limit=limit)

    def get_delta_channel_history(self, *, config: Any, channels: Sequence[str]) -> Any:
        """Return the writes of delta channels. Raise LargeState if they are too large."""
        if self._most_written_bytes is not None:
            configurable = config["configurable"]
            where = (configurable["thread_id"], configurable.get("checkpoint_ns", ""))
            self._refuse_more_than(
                self._most_written_bytes, _SIZE_OF_WRITES, (*where, list(channels))
            )
        return super().get_delta_channel_history(config=config, channels=channels)

    def _refuse_large(self, where: str, args: Sequence[Any], *, limit: int | None) -> None:
        if self._most_bytes is not None:
            self._refuse_more_than(self._most_bytes, _SIZES.format(where=where), (*args, limit))

    def _refuse_more_than(self, most: int, sql: str, args: Sequence[Any]) -> None:
        with self._cursor() as cursor:
            found = cursor.execute(sql, args).fetchone()
        if found["size"] > most:
            raise LargeState(f"{found['size']:,} bytes")
        tasks = found.get("tasks", 0)
        if self._most_tasks is not None and tasks > self._most_tasks:
            raise LargeState(f"about {tasks:,} tasks and writes of tasks")

    def _load_checkpoint_tuple(self, value: Any) -> CheckpointTuple:
        if _blob_bytes(value) < _TAKES_A_TURN:
            return super()._load_checkpoint_tuple(value)
        with self._turn:
            return super()._load_checkpoint_tuple(value)

    def _dump_blobs(self, *args: Any) -> Any:
        rows = super()._dump_blobs(*args)
        self._stored_bytes += sum(len(row[-1]) for row in rows if row[-1] is not None)
        if self._most_stored_bytes is not None and self._stored_bytes > self._most_stored_bytes:
            raise LargeState(f"more than {self._most_stored_bytes:,} bytes")
        return rows

    def put(self, config: Any, checkpoint: Any, metadata: Any, new_versions: Any) -> Any:
        """Store a state that belongs to no run, whatever checkpoint it continues."""
        return super().put(config, checkpoint, _of_no_run(config, metadata), new_versions)

    def keep_latest(self, thread_id: str) -> None:
        """Delete the thread's history except the latest state of the graph and its subgraphs.

        Raise CannotPrune if that state is computed from the history.
        """
        try:
            self.prune([thread_id], strategy="keep_latest")
        except NotImplementedError as error:
            raise CannotPrune(str(error)) from error


class RowSaver(ThreadSaver):
    """Reads checkpoints as Postgres has them: without the values that the project's own
    checkpointer has."""

    def _with_values(self, found: CheckpointTuple) -> CheckpointTuple:
        return found


class UpdateSaver(ThreadSaver):
    """Reads states, and holds the writes of an update until `store` stores all of them."""

    def __init__(self, pool: ConnectionPool[Connection], **limits: Any) -> None:
        super().__init__(pool, **limits)
        self._kept: list[Callable[[ThreadSaver], object]] = []

    def put(self, config: Any, checkpoint: Any, metadata: Any, new_versions: Any) -> Any:
        if self._checkpointer is not None:
            owned = _of_no_run(config, metadata)
            row = self._checkpointer.put(config, checkpoint, owned, new_versions)
            checkpoint, new_versions = row
        self._kept.append(lambda saver: saver.put(config, checkpoint, metadata, new_versions))
        where = config["configurable"]
        return {
            "configurable": {
                "thread_id": where["thread_id"],
                "checkpoint_ns": where["checkpoint_ns"],
                "checkpoint_id": checkpoint["id"],
            }
        }

    def put_writes(
        self, config: Any, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        if self._checkpointer is not None:
            self._checkpointer.put_writes(config, writes, task_id, task_path)
        self._kept.append(lambda saver: saver.put_writes(config, writes, task_id, task_path))

    def store(self, conn: Connection) -> None:
        """Store the writes that were held, on this connection."""
        saver = ThreadSaver(conn, aes_key=self._aes_key)
        saver.serde = self.serde
        for write in self._kept:
            write(saver)


def _of_no_run(config: Any, metadata: Any) -> dict[str, Any]:
    """Return the metadata of a state that belongs to no run."""
    owned = {key: value for key, value in metadata.items() if key != "run_id"}
    return {**owned, "thread_id": config["configurable"]["thread_id"]}


def _blob_bytes(value: Any) -> int:
    """Return the bytes of a row's blobs."""
    blobs = [row[2] for row in value["channel_values"] or ()]
    writes = [row[3] for row in value["pending_writes"] or ()]
    return sum(len(blob) for blob in (*blobs, *writes) if blob is not None)
