"""The saver of the API: states of threads, read at any time and written while nothing runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from psycopg_pool import ConnectionPool

from belay_server.db.connection import Connection, unavailable_when_unreachable
from belay_server.graphs.saver import FormatSaver


class CannotPrune(Exception):
    """The thread's latest state is built from its history."""


class ThreadSaver(FormatSaver):
    """For the API: states of threads, over the web process's pool."""

    def __init__(self, pool: ConnectionPool[Connection] | Connection) -> None:
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

    def keep_latest(self, thread_id: str) -> None:
        """Delete the thread's history, but for the latest state of the graph and its subgraphs."""
        try:
            self.prune([thread_id], strategy="keep_latest")
        except NotImplementedError as error:
            raise CannotPrune(str(error)) from error
