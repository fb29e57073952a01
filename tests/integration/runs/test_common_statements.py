"""Test the statements that claim, store and end several runs at once, on a real Postgres.

Each does what its statement for one run does, or leaves the run out, and waits for no lock.
"""

from __future__ import annotations

import uuid
from contextlib import contextmanager

import psycopg
import pytest
from psycopg.types.json import Jsonb

from belay_server.db import run_claims as claim_rows
from belay_server.db.postgres.connection import connect
from belay_server.db.run_claims import ClaimRequest, RunEnding
from belay_server.domain.runs import Claim, Ending, RunStatus
from belay_server.graphs.checkpoints.rows import CheckpointRows, common_statement
from belay_server.services.runs.endings import end_cancelled_run, end_runs
from tests.integration.conftest import LEASE

DONE = Ending(RunStatus.SUCCESS, values={"count": 1})


@pytest.fixture
def other(database_url):
    with connect(database_url) as made:
        yield made


@contextmanager
def locked(conn, table, key, value):
    """Another transaction has a row locked."""
    with conn.transaction():
        conn.execute(f"SELECT FROM {table} WHERE {key} = %s FOR UPDATE", (value,))
        yield


def claim(conn, *run_ids):
    requests = [ClaimRequest(run_id, uuid.uuid4().hex) for run_id in run_ids]
    found = claim_rows.claim_runs(conn, requests, **LEASE)
    assert found.keys() <= {request.token_hash for request in requests}
    return {run.run_id: run for run in found.values()}


def row(conn, table, key, value):
    names = ["run_id", "thread_id", "seq", "token_hash", "lease_expires_at", "scheduled_at"]
    with conn.cursor(row_factory=psycopg.rows.dict_row) as cursor:
        found = cursor.execute(f"SELECT * FROM {table} WHERE {key} = %s", (value,)).fetchone()
    return {k: v for k, v in found.items() if k not in names and not k.endswith("_at")}


def test_runs_are_claimed_as_by_their_own_statement(conn, rows):
    alone, *together = [rows.pending() for _ in range(3)]
    expected = claim_rows.claim_run(conn, alone.run_id, **LEASE)
    found = claim(conn, *[run.run_id for run in together])
    assert found.keys() == {run.run_id for run in together}
    for run in together:
        claimed = found[run.run_id]
        assert (claimed.claim_no, claimed.attempts, claimed.kwargs) == (
            expected.claim_no,
            expected.attempts,
            expected.kwargs,
        )
        for table, key, mine, its in (
            ("run", "run_id", run.run_id, alone.run_id),
            ("thread", "thread_id", run.thread_id, alone.thread_id),
        ):
            assert row(conn, table, key, mine) == row(conn, table, key, its)


def test_of_two_requests_for_a_run_one_gets_it(conn, rows):
    run, other_run = rows.pending(), rows.pending()
    requests = [ClaimRequest(of.run_id, uuid.uuid4().hex) for of in (run, run, other_run)]
    found = claim_rows.claim_runs(conn, requests, **LEASE)
    assert sorted(one.run_id for one in found.values()) == sorted([run.run_id, other_run.run_id])
    token = next(token for token, one in found.items() if one.run_id == run.run_id)
    held = claim_rows.held_run(conn, run.run_id, owner=LEASE["owner"], token_hash=token)
    assert held is not None
    for request in requests[:2]:
        if request.token_hash != token:
            refused = {"owner": LEASE["owner"], "token_hash": request.token_hash}
            assert claim_rows.held_run(conn, run.run_id, **refused) is None


def test_runs_that_cannot_be_claimed_are_left_out(conn, rows):
    good = rows.pending()
    first = rows.pending()
    second = rows.pending(first.thread_id)
    behind_running = rows.pending(rows.running().thread_id)
    unknown, later = rows.pending(graph_id="unknown"), rows.pending(after_seconds=60.0)
    left_out = [second, behind_running, unknown, later, rows.running()]
    found = claim(conn, good.run_id, *[run.run_id for run in left_out], uuid.uuid4())
    assert found.keys() == {good.run_id}
    assert rows.status(first.run_id) == "pending"


def test_a_locked_thread_is_left_out_of_a_claim(conn, other, rows):
    free, busy = rows.pending(), rows.pending()
    with locked(other, "thread", "thread_id", busy.thread_id):
        assert claim(conn, busy.run_id, free.run_id).keys() == {free.run_id}
    assert claim(conn, busy.run_id).keys() == {busy.run_id}


def test_a_locked_head_of_a_queue_is_an_error_of_a_claim(conn, other, rows):
    free, head = rows.pending(), rows.pending()
    behind = rows.pending(head.thread_id)
    with locked(other, "run", "run_id", head.run_id):
        with pytest.raises(psycopg.errors.LockNotAvailable):
            claim(conn, free.run_id, behind.run_id)
        assert rows.status(free.run_id) == rows.status(behind.run_id) == "pending"


def test_concurrent_claims_of_the_same_runs_claim_each_once(rows, many):
    for _ in range(5):
        run_ids = [rows.pending().run_id for _ in range(20)]

        def attempt(conn, number, run_ids=run_ids):
            mine = run_ids if number % 2 else run_ids[::-1]
            try:
                return list(claim(conn, *mine))
            except (psycopg.errors.LockNotAvailable, psycopg.errors.UniqueViolation):
                return []

        found = [run_id for claimed in many(6, attempt) for run_id in claimed]
        assert len(found) == len(set(found))
        for run_id in set(run_ids).difference(found):
            assert claim_rows.claim_run(rows.conn, run_id, **LEASE) is not None


def ended(run, ending=DONE):
    return RunEnding(run.thread_id, run.claim, ending)


@pytest.mark.parametrize(
    "ending",
    [
        DONE,
        Ending(RunStatus.SUCCESS, values=None),
        Ending(RunStatus.ERROR, values_known=False, error={"error": "E", "message": "m"}),
        Ending(
            RunStatus.INTERRUPTED,
            values={"text": "\u00fc"},
            has_next=True,
            interrupts={"task": [{"id": "1", "value": "?"}]},
        ),
    ],
)
@pytest.mark.parametrize("temporary", [False, True])
def test_runs_are_ended_as_by_their_own_statement(conn, rows, ending, temporary):
    alone, *together = [rows.running(temporary=temporary) for _ in range(3)]
    assert claim_rows.finish_run(conn, alone.thread_id, alone.claim, ending) is not None
    found = end_runs(conn, [ended(run, ending) for run in together])
    assert found.keys() == {run.run_id for run in together}
    for run in together:
        assert (found[run.run_id].claim_no, found[run.run_id].status) == (1, ending.status)
        for table, key, mine, its in (
            ("run", "run_id", run.run_id, alone.run_id),
            ("thread", "thread_id", run.thread_id, alone.thread_id),
        ):
            assert row(conn, table, key, mine) == row(conn, table, key, its)


def test_interrupted_runs_are_ended_as_by_their_own_statements(conn, rows):
    reached = Ending(RunStatus.INTERRUPTED, values={"count": 1}, has_next=True)
    alone, *together = runs = [rows.running() for _ in range(3)]
    reason = {"error": "UserInterrupt", "message": "m"}
    conn.execute(
        "UPDATE run SET cancel_action = 'interrupt', cancel_reason = %s, "
        "cancel_requested_at = now()"
        " WHERE run_id = ANY (%s)",
        (Jsonb(reason), [run.run_id for run in runs]),
    )
    assert end_cancelled_run(conn, alone.thread_id, alone.claim, reached) is not None
    endings = [
        RunEnding(run.thread_id, run.claim, reached, is_interrupted=True) for run in together
    ]
    found = end_runs(conn, endings)
    for run in together:
        end = found[run.run_id]
        assert (end.claim_no, end.status, end.answer) == (1, RunStatus.INTERRUPTED, b"")
        assert end.cancel_seconds is not None
        stored = row(conn, "run", "run_id", run.run_id)
        assert stored == row(conn, "run", "run_id", alone.run_id)
        assert stored["error"] == reason
        thread = row(conn, "thread", "thread_id", run.thread_id)
        assert thread == row(conn, "thread", "thread_id", alone.thread_id)


@pytest.mark.parametrize("action", [None, "rollback"])
def test_a_run_without_an_accepted_interrupt_is_not_ended_as_interrupted(conn, rows, action):
    run = rows.running()
    conn.execute("UPDATE run SET cancel_action = %s WHERE run_id = %s", (action, run.run_id))
    assert end_runs(conn, [RunEnding(run.thread_id, run.claim, DONE, is_interrupted=True)]) == {}
    assert rows.status(run.run_id) == "running"


def test_the_next_runs_of_threads_are_returned_with_the_ends(conn, rows):
    with_next, without = rows.running(), rows.running()
    following = rows.pending(with_next.thread_id)
    found = end_runs(conn, [ended(with_next), ended(without)])
    assert [run.run_id for run in found[with_next.run_id].next_runs] == [following.run_id]
    assert found[without.run_id].next_runs == ()


def test_runs_whose_end_is_not_the_graphs_are_left_out(conn, other, rows):
    good, cancelled, stale, busy, of_busy_thread = [rows.running() for _ in range(5)]
    conn.execute(
        "UPDATE run SET cancel_action = 'interrupt' WHERE run_id = %s", (cancelled.run_id,)
    )
    endings = [ended(run) for run in (good, cancelled, busy, of_busy_thread)]
    endings.append(RunEnding(stale.thread_id, Claim(stale.run_id, 7), DONE))
    with (
        locked(other, "run", "run_id", busy.run_id),
        other.transaction(),
    ):
        other.execute(
            "SELECT FROM thread WHERE thread_id = %s FOR UPDATE", (of_busy_thread.thread_id,)
        )
        found = end_runs(conn, endings)
    assert found.keys() == {good.run_id}
    for run in (cancelled, stale, busy, of_busy_thread):
        assert rows.status(run.run_id) == "running"


def checkpoint_of(run, checkpoint_id="c1", *, foreign=False):
    thread_id = str(run.thread_id)
    found = CheckpointRows()
    metadata = f'{{"run_id": "{run.run_id}"}}'
    blob = (thread_id, "", "channel", "v1", "msgpack", b"1")
    found.add_checkpoint((thread_id, "", checkpoint_id, None, "{}", metadata), [blob])
    write = (thread_id, "", checkpoint_id, "task", "", 0, "channel", "msgpack", b"1")
    found.add_writes([write], special=False, foreign=foreign)
    return run.claim, found


def counts(conn, run):
    return [
        conn.execute(
            f"SELECT count(*) FROM {table} WHERE thread_id = %s", (str(run.thread_id),)
        ).fetchone()[0]
        for table in ("checkpoints", "checkpoint_writes", "checkpoint_blobs")
    ]


def store(conn, *stored):
    return conn.execute(*common_statement(stored)).fetchone()


def test_the_rows_of_several_runs_are_stored_by_one_statement(conn, rows):
    runs = [rows.running() for _ in range(3)]
    assert store(conn, *[checkpoint_of(run) for run in runs]) is not None
    assert [counts(conn, run) for run in runs] == [[1, 1, 1]] * 3


def test_nothing_is_stored_if_one_of_the_claims_is_over(conn, rows):
    good, stale = rows.running(), rows.running()
    rows.expire(stale.run_id)
    conn.execute("UPDATE run SET claim_no = 2 WHERE run_id = %s", (stale.run_id,))
    assert store(conn, checkpoint_of(good), checkpoint_of(stale)) is None
    assert counts(conn, good) == counts(conn, stale) == [0, 0, 0]


def test_a_common_statement_does_not_wait_for_a_run_that_is_being_cancelled(conn, other, rows):
    good, busy = rows.running(), rows.running()
    with locked(other, "run", "run_id", busy.run_id):
        with pytest.raises(psycopg.errors.LockNotAvailable):
            store(conn, checkpoint_of(good), checkpoint_of(busy))
    assert counts(conn, good) == [0, 0, 0]


def test_each_run_has_the_before_images_of_what_it_changes(conn, rows):
    resumed, own = rows.running(), rows.running()
    before = rows.running(rows.thread())
    for run, of in ((resumed, before), (own, own)):
        claim_of_checkpoint, found = checkpoint_of(of)
        del claim_of_checkpoint
        thread_id = str(run.thread_id)
        moved = CheckpointRows()
        [checkpoint] = found.checkpoints.values()
        moved.add_checkpoint((thread_id, *checkpoint[1:]), [])
        assert store(conn, (run.claim, moved)) is not None
    more = []
    for run in (resumed, own):
        found = CheckpointRows()
        write = (str(run.thread_id), "", "c1", "resumed", "", 0, "channel", "msgpack", b"2")
        found.add_writes([write], special=False, foreign=True)
        more.append((run.claim, found))
    assert store(conn, *more) is not None
    images = conn.execute(
        "SELECT run_id, thread_id, writes FROM run_before_image WHERE run_id = ANY (%s)",
        ([resumed.run_id, own.run_id],),
    ).fetchall()
    assert images == [(resumed.run_id, str(resumed.thread_id), [])]
