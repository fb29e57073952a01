"""Prune or delete threads, on request and when their TTL has expired."""

from __future__ import annotations

import logging
from functools import partial
from uuid import UUID

import tenacity

from belay_server.db import runs as run_rows
from belay_server.db import threads as thread_rows
from belay_server.db.postgres.connection import Connection
from belay_server.db.postgres.outages import CONFLICT
from belay_server.db.postgres.statements import in_transaction
from belay_server.db.threads import DeletedThread
from belay_server.domain.errors import BadRequest, Conflict
from belay_server.domain.threads import TtlStrategy
from belay_server.graphs.checkpoints.thread_saver import CannotPrune, ThreadSaver
from belay_server.services.quarantine import Quarantine
from belay_server.services.time_slice import TimeSlice

log = logging.getLogger(__name__)

#: A prune is repeated if the thread's row has been changed since the snapshot it reads.
_AGAIN = tenacity.Retrying(
    retry=tenacity.retry_if_exception_type(CONFLICT),
    wait=tenacity.wait_random(0, 0.1),
    stop=tenacity.stop_after_attempt(30),
    reraise=True,
)


def keep_latest(conn: Connection, thread_id: UUID) -> bool:
    """Delete a thread's history except its latest state. Return False, and change nothing, when
    the thread does not exist or is busy: an active run may use the history.

    Raises BadRequest for a thread whose latest state depends on its history, Conflict for a thread
    that other requests keep changing.
    """
    try:
        return _AGAIN(_prune, conn, thread_id)
    except CannotPrune as error:
        raise BadRequest(str(error)) from error
    except CONFLICT as error:
        raise Conflict(f"Other requests keep changing thread {thread_id}. Try again.") from error


def _prune(conn: Connection, thread_id: UUID) -> bool:
    """Raises an error of CONFLICT when the thread's row was changed after the snapshot."""
    # Wait for the changes that are under way: a snapshot taken before their commit is outdated.
    in_transaction(conn, partial(thread_rows.lock_thread, conn, thread_id))
    with conn.transaction():
        # The saver needs this isolation level for its own part of the transaction.
        thread_rows.repeatable_read(conn)
        if not thread_rows.lock_thread(conn, thread_id):
            return False
        if run_rows.thread_is_busy(conn, thread_id):
            return False
        ThreadSaver(conn).keep_latest(str(thread_id))
        return True


def expire_threads(
    conn: Connection, quarantine: Quarantine, *, limit: int, time_slice: TimeSlice
) -> list[DeletedThread]:
    """Prune or delete the threads that have expired, until the time slice is over. Return the
    deleted ones."""
    deleted = []
    found = thread_rows.expired_threads(conn, limit=limit, but=quarantine.put_off())
    for expired in time_slice.take(found):
        thread_id = expired.thread_id
        if expired.ttl_strategy == TtlStrategy.DELETE:
            gone = quarantine.handle(thread_id, partial(_delete_expired, conn, thread_id))
            if gone is not None:
                deleted.append(gone)
        else:
            quarantine.handle(thread_id, partial(_prune_expired, conn, thread_id))
    return deleted


def _delete_expired(conn: Connection, thread_id: UUID) -> DeletedThread | None:
    def delete() -> DeletedThread | None:
        if not thread_rows.lock_thread(conn, thread_id):
            return None
        if not thread_rows.thread_is_expired(conn, thread_id):
            return None
        return thread_rows.delete_thread(conn, thread_id)

    return in_transaction(conn, delete)


def _prune_expired(conn: Connection, thread_id: UUID) -> None:
    try:
        pruned = keep_latest(conn, thread_id)
    except BadRequest as error:
        log.warning("cannot prune the expired thread %s, keeping it: %s", thread_id, error)
        pruned = True
    if pruned:
        thread_rows.thread_has_been_pruned(conn, thread_id)
