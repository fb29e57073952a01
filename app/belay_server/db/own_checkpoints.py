"""Deleted checkpoints whose values are in the project's own checkpointer. The queries are in
`sql/own_checkpoints.sql`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from belay_server.db.postgres.connection import Connection
from belay_server.db.postgres.queries import load_queries
from belay_server.db.postgres.statements import execute, fetch_all

SQL = load_queries("own_checkpoints")


@dataclass(frozen=True, slots=True)
class Garbage:
    """Checkpoints of one run on one thread, some of which have been deleted."""

    thread_id: str
    #: "" stands for no run, such as for a state that the API has written.
    run_id: str
    #: Whether the whole thread has been deleted.
    is_thread_gone: bool
    #: Whether the thread has no other checkpoint of the run.
    is_run_gone: bool


def find_garbage(conn: Connection) -> list[Garbage]:
    """Return what has been deleted, the runs of at most 50 threads."""
    return fetch_all(conn, SQL.find_garbage, {}, Garbage)


def forget_garbage(conn: Connection, garbage: Sequence[Garbage]) -> None:
    """Forget what has been deleted in the project's checkpointer, too."""
    params = {
        "thread_ids": [one.thread_id for one in garbage],
        "run_ids": [one.run_id for one in garbage],
    }
    execute(conn, SQL.forget_garbage, params)
