"""Fire the crons that are due. Each due time fires once, with any number of sweepers.

The run and the next due time are written in one transaction. Due times that were missed while no
sweeper ran fire once, and the next due time is computed from now.

Crons are handled independently. A cron whose run cannot be stored is retried after a delay, which
doubles each time, and disabled after `TRIES` failures in a row. Its `last_error` has the reason,
which the API returns too.
"""

from __future__ import annotations

import dataclasses
import logging
from datetime import timedelta
from uuid import UUID

from belay_server.db import crons as cron_rows
from belay_server.db.postgres.connection import Connection, restricted
from belay_server.db.postgres.outages import in_short, is_outage
from belay_server.db.postgres.statements import in_transaction
from belay_server.domain.access import Access
from belay_server.domain.crons import DueCron
from belay_server.domain.errors import BelayError
from belay_server.domain.run_options import RunOptions
from belay_server.services.crons import time_after
from belay_server.services.parts import RunParts
from belay_server.services.runs.creation import (
    Accepted,
    RunRequest,
    announce_accepted,
    create_in_transaction,
)
from belay_server.services.time_slice import TimeSlice

log = logging.getLogger(__name__)

#: Failures in a row after which a cron is disabled, and the delay after the first failure.
TRIES = 5
FIRST_SECONDS = 5.0


def fire_due_crons(parts: RunParts, conn: Connection, *, limit: int, time_slice: TimeSlice) -> None:
    """Fire the crons that are due; when the time slice is over, only the first of each caller. So
    crons with large inputs delay only those of the same caller.

    Raises only the error of an outage.
    """
    for due in cron_rows.due_crons(conn, limit=limit):
        if time_slice.is_over and not due.is_first:
            break
        try:
            _fire(parts, conn, due.cron_id)
        except Exception as error:
            if is_outage(error):
                raise
            _put_off(conn, due.cron_id, error)


def _put_off(conn: Connection, cron_id: UUID, error: Exception) -> None:
    """Set a later due time for a cron whose transaction was rolled back, or disable it."""

    def put_off() -> int | None:
        cron = cron_rows.lock_due_cron(conn, cron_id)
        if cron is None:
            return None
        failures = cron.failures + 1
        cron_rows.put_off_cron(
            conn,
            cron_id,
            again_at=cron.now + timedelta(seconds=FIRST_SECONDS * 2 ** (failures - 1)),
            failures=failures,
            last_error=f"{type(error).__name__}: {in_short(error)}",
            enabled=failures < TRIES,
        )
        return failures

    failures = in_transaction(conn, put_off)
    if failures is None:
        return
    if failures < TRIES:
        log.warning("cron %s: cannot store its run, retrying later", cron_id, exc_info=error)
        return
    log.error(
        "cron %s: cannot store its run, disabling it after %d failures; see its last_error",
        cron_id,
        failures,
        exc_info=error,
    )


def _fire(parts: RunParts, conn: Connection, cron_id: UUID) -> None:
    def fire() -> tuple[RunRequest, Accepted] | None:
        cron = cron_rows.lock_due_cron(conn, cron_id)
        if cron is None:
            return None
        due = time_after(cron.schedule, cron.timezone, cron.end_time, cron.now)
        cron_rows.set_next_run_date(conn, cron_id, due)
        request = _request(cron)
        try:
            # The cron goes on when its run cannot be created.
            with conn.transaction(), restricted(conn, _access(cron)):
                return request, create_in_transaction(parts, conn, request, request.run_id)
        except BelayError as error:
            log.warning("cron %s: skipping a due time without a run: %s", cron_id, error.detail)
            cron_rows.set_last_error(conn, cron_id, error.detail)
            return None

    fired = in_transaction(conn, fire)
    if fired is not None:
        announce_accepted(parts, *fired)


def _access(cron: DueCron) -> Access:
    """Return what the cron's creator could access when it created the cron. An assistant or a
    thread that has since been taken from the creator is not found."""
    return Access(**cron.maker.get("access") or {})


def _request(cron: DueCron) -> RunRequest:
    config = dict(cron.payload["config"])
    open_keys = {k: v for k, v in config.pop("configurable").items() if k != "cron_id"}
    options = dataclasses.replace(
        RunOptions.from_document(cron.payload),
        config={**config, "configurable": open_keys} if open_keys else config,
        run_id=cron.run_id,
        on_completion=cron.on_run_completed,
    )
    return RunRequest(
        options=options,
        thread_id=cron.thread_id,
        request_id=str(cron.run_id),
        headers={"cron_id": str(cron.cron_id)},
        caller=cron.maker.get("caller"),
        user=cron.maker.get("user"),
        creator=cron.maker.get("creator"),
        thread_metadata=cron.maker.get("thread_metadata") or {},
    )
