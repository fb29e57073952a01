"""The saver of a run in a host, which stores checkpoints together with those of other runs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from belay_server.db.postgres.connection import Connection
from belay_server.graphs.checkpoints.rows import CheckpointRows, common_statement
from belay_server.graphs.checkpoints.run_saver import RunSaver
from belay_workers.host.group_commit import GroupCommit, Together

#: The bytes that one statement stores; what exceeds them is stored alone.
_MOST_BYTES = 1024 * 1024


class HostedSaver(RunSaver):
    """Its asynchronous methods store by `GroupCommit`, those for synchronous code alone."""

    def __init__(self, group: GroupCommit, *parts: Any, **options: Any) -> None:
        """The rest are the parameters of `RunSaver`."""
        super().__init__(*parts, **options)
        self._group = group

    async def flush(self) -> None:
        """Wait until all writes are stored. Raise the error of the write that failed."""
        await self._group.do(_CHECKPOINTS, self, **self._alone())
        self._raise_failure()

    async def _store_soon(self) -> None:
        if self._behind:
            self._group.do_soon(_CHECKPOINTS, self, **self._alone())
        else:
            await self.flush()

    def _alone(self) -> dict[str, Any]:
        return {"alone": lambda _conn: self._store_what_waits(), "keep_waiting": lambda: False}


def _store(conn: Connection, savers: Sequence[HostedSaver]) -> dict[Hashable, None]:
    """Store what waits, of as many savers as one statement takes. Return those that are done."""
    taken: list[tuple[HostedSaver, CheckpointRows]] = []
    size = 0
    for saver in savers:
        if size < _MOST_BYTES:
            rows = saver.take_rows()
            taken.append((saver, rows))
            size += rows.bytes
    # While Redis does not answer, the host waits for it once, not for each of its runs.
    all(saver.prepare_to_store(rows) for saver, rows in taken)
    stored = [(saver.claim, rows) for saver, rows in taken if rows]
    is_stored = False
    try:
        is_stored = not stored or conn.execute(*common_statement(stored)).fetchone() is not None
    finally:
        if not is_stored:
            for saver, rows in taken:
                saver.put_back_rows(rows)
    return {saver: None for saver, _ in taken if is_stored and not saver.has_more}


_CHECKPOINTS = Together(_store, key=lambda saver: saver)
