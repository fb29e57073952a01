"""Test that a due cron creates one run per due time, in whichever worker and however late."""

from __future__ import annotations

import dataclasses
import threading
import uuid
from datetime import UTC, datetime, timedelta

import pytest

from belay_server.db import assistants as assistant_rows
from belay_server.db import crons as cron_rows
from belay_server.db import runs as run_rows
from belay_server.db import threads as thread_rows
from belay_server.db.assistants import SystemAssistant
from belay_server.db.crons import CronContent
from belay_server.db.postgres.connection import connect
from belay_server.domain.assistants import system_assistant_id
from belay_server.services import cron_firing
from belay_server.services.cron_firing import fire_due_crons
from belay_server.services.runs import creation as run_creates
from belay_server.services.time_slice import TimeSlice

COUNTER = system_assistant_id("counter")
ALL = 100


@pytest.fixture
def conn(database_url):
    with connect(database_url) as conn:
        assistant_rows.put_system_assistants(conn, [SystemAssistant("counter", "counter")])
        yield conn


def new_cron(conn, *, due, schedule="0 0 * * *", end_time=None, caller=None, **payload):
    """Insert a cron on its own thread."""
    cron_id, thread_id = uuid.uuid4(), uuid.uuid4()
    thread_rows.insert_thread(conn, thread_id, {})
    content = CronContent(
        schedule=schedule,
        timezone=None,
        end_time=end_time,
        enabled=True,
        on_run_completed=None,
        payload={"assistant_id": str(COUNTER), "config": {"configurable": {}}, **payload},
        metadata={},
        next_run_date=due,
    )
    return cron_rows.insert_cron(
        conn,
        cron_id,
        content,
        assistant_id=COUNTER,
        thread_id=thread_id,
        maker={} if caller is None else {"caller": caller},
    )


def runs_of(conn, cron):
    return run_rows.list_runs(conn, cron.thread_id, status=None, metadata={}, limit=ALL, offset=0)


def now():
    return datetime.now(UTC)


def test_missed_due_times_fire_once_and_the_next_counts_from_now(conn, run_parts):
    cron = new_cron(conn, due=now() - timedelta(hours=5), schedule="* * * * *")
    for _ in range(3):
        fire_due_crons(run_parts, conn, limit=ALL, time_slice=TimeSlice(60))
    assert len(runs_of(conn, cron)) == 1
    after = cron_rows.get_cron(conn, cron.cron_id).next_run_date
    assert now() < after <= now() + timedelta(minutes=1)


def test_concurrent_sweepers_create_one_run_for_each_cron(conn, run_parts, database_url):
    crons = [new_cron(conn, due=now() - timedelta(seconds=1)) for _ in range(20)]
    ready = threading.Barrier(4)

    def sweep():
        with connect(database_url) as mine:
            ready.wait()
            fire_due_crons(run_parts, mine, limit=ALL, time_slice=TimeSlice(60))

    sweepers = [threading.Thread(target=sweep) for _ in range(4)]
    for sweeper in sweepers:
        sweeper.start()
    for sweeper in sweepers:
        sweeper.join()
    assert [len(runs_of(conn, cron)) for cron in crons] == [1] * 20


def test_a_cron_that_has_reached_its_end_time_is_not_due_again(conn, run_parts):
    cron = new_cron(conn, due=now() - timedelta(seconds=2), end_time=now())
    fire_due_crons(run_parts, conn, limit=ALL, time_slice=TimeSlice(60))
    assert len(runs_of(conn, cron)) == 1
    assert cron_rows.get_cron(conn, cron.cron_id).next_run_date is None


def test_a_run_that_cannot_be_created_does_not_stop_its_cron_or_others(conn, run_parts):
    past = now() - timedelta(seconds=2)
    refused = new_cron(conn, due=past, schedule="* * * * *", multitask_strategy="reject")
    busy = new_cron(conn, due=past)
    conn.execute(
        "UPDATE cron SET thread_id = %s WHERE cron_id = %s", (refused.thread_id, busy.cron_id)
    )
    other = new_cron(conn, due=now() - timedelta(seconds=1))
    conn.execute(
        "UPDATE cron SET next_run_date = %s WHERE cron_id = %s", (past - timedelta(1), busy.cron_id)
    )
    fire_due_crons(run_parts, conn, limit=ALL, time_slice=TimeSlice(60))
    assert len(runs_of(conn, refused)) == 1  # the run of the other cron
    assert len(runs_of(conn, other)) == 1
    assert cron_rows.get_cron(conn, refused.cron_id).next_run_date > now()


@pytest.fixture
def too_much_for_postgres(monkeypatch):
    """Return a list of crons whose runs Postgres rejects, with a real error of SQLSTATE 54000."""
    refused: list = []

    def create_in_transaction(parts, conn, request, run_id):
        if request.headers["cron_id"] in refused:
            conn.execute("SELECT jsonb_build_array(repeat('x', 300000000))")
        return run_creates.create_in_transaction(parts, conn, request, run_id)

    monkeypatch.setattr(cron_firing, "create_in_transaction", create_in_transaction)
    return refused


@pytest.mark.long
def test_a_cron_whose_run_cannot_be_stored_is_postponed_then_disabled(
    conn, run_parts, too_much_for_postgres
):
    cron = new_cron(conn, due=now() - timedelta(seconds=2), schedule="* * * * * *")
    too_much_for_postgres.append(str(cron.cron_id))
    for failures in range(1, cron_firing.TRIES + 1):
        other = new_cron(conn, due=now() - timedelta(seconds=1))
        conn.execute(
            "UPDATE cron SET next_run_date = now() - interval '1 second' WHERE cron_id = %s",
            (cron.cron_id,),
        )
        before = conn.execute("SELECT clock_timestamp()").fetchone()[0]
        fire_due_crons(run_parts, conn, limit=ALL, time_slice=TimeSlice(60))
        assert len(runs_of(conn, other)) == 1
        failing = cron_rows.get_cron(conn, cron.cron_id)
        assert failing.failures == failures
        assert "ProgramLimitExceeded" in failing.last_error
        put_off = failing.next_run_date - before
        assert put_off >= timedelta(seconds=cron_firing.FIRST_SECONDS * 2 ** (failures - 1))
        assert failing.enabled is (failures < cron_firing.TRIES)
    assert runs_of(conn, cron) == []


def test_a_cron_that_fires_again_has_its_error_cleared(conn, run_parts, too_much_for_postgres):
    cron = new_cron(conn, due=now() - timedelta(seconds=2))
    too_much_for_postgres.append(str(cron.cron_id))
    fire_due_crons(run_parts, conn, limit=ALL, time_slice=TimeSlice(60))
    too_much_for_postgres.clear()
    conn.execute("UPDATE cron SET next_run_date = now() WHERE cron_id = %s", (cron.cron_id,))
    fire_due_crons(run_parts, conn, limit=ALL, time_slice=TimeSlice(60))
    again = cron_rows.get_cron(conn, cron.cron_id)
    assert (again.failures, again.last_error) == (0, None)
    assert len(runs_of(conn, cron)) == 1


def test_a_cron_whose_run_is_refused_has_the_error_and_stays_enabled(conn, run_parts):
    cron = new_cron(conn, due=now() - timedelta(seconds=2), context={"x": "y" * 2_000_000})
    small = dataclasses.replace(run_parts.settings, max_run_bytes=1_000_000)
    fire_due_crons(
        dataclasses.replace(run_parts, settings=small), conn, limit=ALL, time_slice=TimeSlice(60)
    )
    refused = cron_rows.get_cron(conn, cron.cron_id)
    assert refused.enabled and refused.next_run_date > now()
    assert "BELAY_MAX_RUN_BYTES" in refused.last_error


def test_a_caller_with_many_due_crons_delays_only_their_own(conn, run_parts):
    conn.execute("DELETE FROM cron")
    flood = [new_cron(conn, due=now() - timedelta(minutes=5), caller="ann") for _ in range(30)]
    others = [new_cron(conn, due=now(), caller=name) for name in ("bob", "cid", None)]
    fire_due_crons(run_parts, conn, limit=6, time_slice=TimeSlice(60))
    assert [len(runs_of(conn, cron)) for cron in others] == [1, 1, 1]
    assert sum(len(runs_of(conn, cron)) for cron in flood) == 3
    conn.execute("DELETE FROM cron")


def test_after_its_time_slice_only_the_first_cron_of_each_caller_is_fired(conn, run_parts):
    conn.execute("DELETE FROM cron")
    flood = [new_cron(conn, due=now() - timedelta(minutes=5), caller="ann") for _ in range(5)]
    other = new_cron(conn, due=now(), caller="bob")
    fire_due_crons(run_parts, conn, limit=ALL, time_slice=TimeSlice(0))
    assert len(runs_of(conn, other)) == 1
    assert sum(len(runs_of(conn, cron)) for cron in flood) == 1
    fire_due_crons(run_parts, conn, limit=ALL, time_slice=TimeSlice(60))
    assert [len(runs_of(conn, cron)) for cron in flood] == [1] * 5
    conn.execute("DELETE FROM cron")
