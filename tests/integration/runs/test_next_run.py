"""Test that the end of a run returns the thread's next run, even one created at the same moment."""

from __future__ import annotations

import threading
from uuid import UUID

import pytest
import uuid_utils

from belay_server.db import run_cancels as cancel_rows
from belay_server.db import run_claims as claim_rows
from belay_server.db import runs as run_rows
from belay_server.db import threads as thread_rows
from belay_server.db.postgres.connection import connect
from belay_server.db.postgres.statements import fetch_value
from belay_server.db.runs import NewRun
from belay_server.domain.run_options import RunKwargs
from belay_server.domain.runs import CancelAction, Ending, RunStatus
from belay_server.services.runs.endings import end_run
from tests.waiting import wait_until


def new_id() -> UUID:
    return UUID(str(uuid_utils.uuid7()))


def insert(conn, thread_id: UUID) -> UUID:
    new = NewRun(
        run_id=new_id(),
        thread_id=thread_id,
        assistant_id=new_id(),
        graph_id="counter",
        queue="runs",
        metadata={},
        kwargs=RunKwargs(config={"configurable": {}}),
        thread_config={},
        thread_configurable={},
        multitask_strategy="enqueue",
        temporary=False,
        timeout_seconds=None,
        after_seconds=0.0,
    )
    run_rows.insert_run(conn, new, rering_seconds=5.0)
    return new.run_id


@pytest.mark.parametrize("cancelled", [False, True], ids=["finished", "interrupted"])
def test_a_run_created_while_another_ends_is_rung_exactly_once(database_url, cancelled):
    with (
        connect(database_url) as creator,
        connect(database_url) as worker,
        connect(database_url) as onlooker,
    ):
        thread_id = new_id()
        thread_rows.insert_thread(creator, thread_id, {})
        first = insert(creator, thread_id)
        claimed = claim_rows.claim_run(
            worker, first, owner="me", lease_seconds=60, graph_ids=["counter"]
        )
        assert claimed is not None
        if cancelled:
            cancel_rows.flag_running_runs(creator, [first], CancelAction.INTERRUPT, {})
        ending = Ending(RunStatus.INTERRUPTED if cancelled else RunStatus.SUCCESS, values={})
        answers = []

        def finish():
            answers.append(end_run(worker, thread_id, claimed.claim, ending))

        with creator.transaction():
            assert thread_rows.lock_thread(creator, thread_id)
            second = insert(creator, thread_id)
            head = claim_rows.next_runs_of_threads(creator, [thread_id])
            finishing = threading.Thread(target=finish)
            finishing.start()
            pid = {"pid": worker.info.backend_pid}
            waits = "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = %(pid)s"
            wait_until(lambda: fetch_value(onlooker, waits, pid), what="the end to wait")
        finishing.join(10)
        (ended,) = answers
        assert ended is not None
        rung = [run.run_id for run in (*head, *ended.next_runs)]
        assert rung == [second]
