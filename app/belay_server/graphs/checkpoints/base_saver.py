"""The part of LangGraph's Postgres saver that both of Belay's savers share.

Tables and format are LangGraph's, so its own tools read them. `run_saver.RunSaver` serves one run
in a child process and is fenced. `thread_saver.ThreadSaver` serves the API, which reads states and
writes them on idle threads.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple
from langgraph.checkpoint.postgres import PostgresSaver

from belay_server.domain.errors import StateUnreadable
from belay_server.graphs.checkpoints.encryption import (
    decrypting,
    encrypting,
    shown,
    with_hidden_primitives,
)
from belay_server.graphs.checkpoints.ids import go_on_after
from belay_server.graphs.checkpoints.own_checkpointer import (
    OwnCheckpointer,
    lacks_values,
)

_LATEST_ID = """
SELECT max(checkpoint_id) FROM checkpoints
WHERE thread_id = %(thread_id)s AND checkpoint_ns = %(checkpoint_ns)s
"""


class FormatSaver(PostgresSaver):
    """Uses LangGraph's tables and format, and makes ids that sort after the checkpoints read.

    With `aes_key`, the values of channels and writes are encrypted. With `checkpointer`, which is
    the project's own, that has the values of channels.
    """

    def __init__(
        self,
        conn: Any,
        *,
        aes_key: bytes | None = None,
        checkpointer: OwnCheckpointer | None = None,
    ) -> None:
        super().__init__(conn)
        self._checkpointer = checkpointer
        self._aes_key = aes_key
        if aes_key is not None:
            self.serde = encrypting(self.serde, aes_key)

    def get_tuple(self, config: Any) -> CheckpointTuple | None:
        found = super().get_tuple(config)
        if config["configurable"].get("checkpoint_id"):
            self._go_on_after_the_latest(config)
        elif found is not None:
            go_on_after(found.checkpoint["id"])
        return found

    def _go_on_after_the_latest(self, config: Any) -> None:
        """Let a run that continues an older checkpoint still create the thread's newest one."""
        where = {
            "thread_id": config["configurable"]["thread_id"],
            "checkpoint_ns": config["configurable"].get("checkpoint_ns", ""),
        }
        with self._cursor() as cursor:
            row = cursor.execute(_LATEST_ID, where).fetchone()
        if row is not None and row["max"] is not None:
            go_on_after(row["max"])

    def with_allowlist(self, extra_allowlist: Collection[tuple[str, ...]]) -> FormatSaver:
        """Also read these types, those of a graph's state, and return this saver. It serves one
        run or one request, so it is changed in place: nothing would wait for a copy's writes."""
        self.serde = super().with_allowlist(extra_allowlist).serde
        return self

    def put(self, config: Any, checkpoint: Any, metadata: Any, new_versions: Any) -> Any:
        if self._checkpointer is not None:
            row = self._checkpointer.put(config, checkpoint, metadata, new_versions)
            checkpoint, new_versions = row
        return super().put(config, *self._storable(checkpoint, metadata, new_versions))

    def put_writes(
        self, config: Any, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        if self._checkpointer is not None:
            self._checkpointer.put_writes(config, writes, task_id, task_path)
        super().put_writes(config, writes, task_id, task_path)

    def get_delta_channel_history(
        self, *, config: Any, channels: Sequence[str]
    ) -> Mapping[str, Any]:
        if self._checkpointer is None:
            return super().get_delta_channel_history(config=config, channels=channels)
        # That reads the tables. The base class reads one checkpoint after the other.
        return BaseCheckpointSaver.get_delta_channel_history(self, config=config, channels=channels)

    def _load_checkpoint_tuple(self, value: Any) -> CheckpointTuple:
        return self._with_values(super()._load_checkpoint_tuple(value))

    def _with_values(self, found: CheckpointTuple) -> CheckpointTuple:
        """Return a checkpoint with its values. Raises StateUnreadable if they cannot be had."""
        return self._own_values.fill(found) if lacks_values(found) else found

    @property
    def _own_values(self) -> OwnCheckpointer:
        """Return the project's checkpointer, in which there are values."""
        if self._checkpointer is None:
            raise StateUnreadable(
                "The thread's state is in a checkpointer of the project, which "
                "checkpointer.path of langgraph.json does not name any more"
            )
        return self._checkpointer

    def _storable(self, checkpoint: Any, metadata: Any, new_versions: Any) -> tuple[Any, Any, Any]:
        """Return what to store of a checkpoint: it, its metadata and the versions of its blobs."""
        checkpoint = without_inline_nul(checkpoint)
        if self._aes_key is not None:
            checkpoint, new_versions = with_hidden_primitives(checkpoint, new_versions)
        return checkpoint, metadata, new_versions

    def _load_blobs(self, blob_values: Any) -> dict[str, Any]:
        with decrypting(kind for _channel, kind, _value in blob_values or ()):
            return super()._load_blobs(blob_values)

    def _load_writes(self, writes: Any) -> Any:
        with decrypting(kind for _task, _channel, kind, *_rest in writes or ()):
            return super()._load_writes(writes)

    def _dump_blobs(self, thread_id: str, namespace: str, values: Any, versions: Any) -> Any:
        if self._aes_key is not None:
            values = shown(values)
        return super()._dump_blobs(thread_id, namespace, values, versions)


def without_inline_nul(checkpoint: Any) -> Any:
    """Replace NUL by U+FFFD in strings, which the saver inlines in a jsonb column without NUL."""
    values = checkpoint["channel_values"]
    bad = [key for key, value in values.items() if isinstance(value, str) and "\0" in value]
    if not bad:
        return checkpoint
    replaced = {key: values[key].replace("\0", "\ufffd") for key in bad}
    return {**checkpoint, "channel_values": {**values, **replaced}}
