"""Crons that are due: each fires once for each time, whoever sweeps and however often.

The run and the next due time are written in one transaction. What was missed while nobody was there
fires once; the next time is counted from now.
"""

from __future__ import annotations

import logging
from uuid import UUID

from app.db import crons as cron_rows
from app.db.connection import Connection, in_transaction
from app.domain.crons import DueCron
from app.domain.errors import BelayError
from app.services.crons import time_after
from app.services.parts import RunParts
from app.services.run_creates import Accepted, RunRequest, accept_run, announce_accepted

log = logging.getLogger(__name__)


def fire_due_crons(parts: RunParts, conn: Connection, *, limit: int) -> None:
    for cron_id in cron_rows.due_crons(conn, limit=limit):
        _fire(parts, conn, cron_id)


def _fire(parts: RunParts, conn: Connection, cron_id: UUID) -> None:
    def fire() -> tuple[RunRequest, Accepted] | None:
        cron = cron_rows.lock_due_cron(conn, cron_id)
        if cron is None:
            return None
        due = time_after(cron.schedule, cron.timezone, cron.end_time, cron.now)
        cron_rows.set_next_run_date(conn, cron_id, due)
        request = _request(cron)
        try:
            with conn.transaction():  # what cannot be created does not stop the cron
                return request, accept_run(parts, conn, request, request.run_id)
        except BelayError as error:
            log.warning("cron %s was due, and created no run: %s", cron_id, error.detail)
            return None

    fired = in_transaction(conn, fire)
    if fired is not None:
        announce_accepted(parts, *fired)


def _request(cron: DueCron) -> RunRequest:
    config = dict(cron.payload["config"])
    open_keys = {k: v for k, v in config.pop("configurable").items() if k != "cron_id"}
    body = {
        "multitask_strategy": "enqueue",
        **cron.payload,
        "config": {**config, "configurable": open_keys} if open_keys else config,
        "run_id": cron.run_id,
        "on_completion": cron.on_run_completed,
    }
    return RunRequest(
        body=body,
        thread_id=cron.thread_id,
        request_id=str(cron.run_id),
        configurable={"cron_id": str(cron.cron_id)},
        caller=cron.maker.get("caller"),
        user=cron.maker.get("user"),
        thread_metadata=cron.maker.get("thread_metadata") or {},
    )
