"""Test the status changes of a run, each one guarded statement, on a real Postgres."""

from __future__ import annotations

import dataclasses
import random
import uuid

import psycopg
import pytest

from belay_server.db import assistants, runs, threads
from belay_server.db import run_cancels as cancel_rows
from belay_server.db import run_claims as claim_rows
from belay_server.db.assistants import SystemAssistant
from belay_server.db.run_cancels import CancelFilter
from belay_server.domain.assistants import system_assistant_id
from belay_server.domain.runs import CancelAction, Claim, Ending, RunStatus, user_cancel_reason
from belay_server.services.runs.cancellation import cancel_locked_runs
from belay_server.services.runs.endings import (
    STOPPED,
    end_cancelled_run,
    end_run,
    recover_run,
    timed_out,
)
from tests.integration.conftest import LEASE

SUCCESS = Ending(RunStatus.SUCCESS, values={"count": 2})
INTERRUPT, ROLLBACK = CancelAction.INTERRUPT, CancelAction.ROLLBACK


def active(conn, run_id):
    return cancel_rows.cancellable_runs(conn, CancelFilter(run_ids=[run_id]), after=None, limit=10)


def cancel(conn, run_id, action=INTERRUPT):
    with conn.transaction():
        found = cancel_rows.lock_runs(conn, active(conn, run_id))
        return cancel_locked_runs(conn, found, action, user_cancel_reason(action, "TEST"))


def hits(cancelled) -> bool:
    return bool(cancelled.running or cancelled.ended)


def recover(conn, claim, *, only_if_expired=True, max_attempts=3):
    return recover_run(
        conn,
        claim,
        max_attempts=max_attempts,
        rering_seconds=5.0,
        only_if_expired=only_if_expired,
    )


def test_fifty_workers_racing_for_one_run_make_one_claim(rows, many):
    for _ in range(10):
        run = rows.pending()
        claims = many(50, lambda conn, _: claim_rows.claim_run(conn, run.run_id, **LEASE))
        assert [c.claim_no for c in claims if c is not None] == [1]


def test_two_runs_of_one_thread_are_never_claimed_at_once(rows, many):
    for _ in range(10):
        thread_id = rows.thread()
        queued = [rows.pending(thread_id) for _ in range(4)]
        ids = [run.run_id for run in queued] * 5
        claims = many(20, lambda conn, i: claim_rows.claim_run(conn, ids[i], **LEASE))
        assert [c.run_id for c in claims if c is not None] == [queued[0].run_id]


def test_the_runs_of_a_thread_are_claimed_in_their_order(rows):
    thread_id = rows.thread()
    first, second, third = (rows.pending(thread_id) for _ in range(3))
    assert claim_rows.claim_run(rows.conn, second.run_id, **LEASE) is None
    claimed = claim_rows.claim_run(rows.conn, first.run_id, **LEASE)
    ended = end_run(rows.conn, thread_id, claimed.claim, SUCCESS)
    assert [second.run_id] == [run.run_id for run in ended.next_runs]
    assert claim_rows.claim_run(rows.conn, third.run_id, **LEASE) is None
    assert claim_rows.claim_run(rows.conn, second.run_id, **LEASE) is not None


def test_a_run_of_an_unknown_graph_waits_for_a_worker_that_has_it(rows):
    run = rows.pending()
    rows.conn.execute(
        "UPDATE run SET scheduled_at = now() - interval '1 minute' WHERE run_id = %s", (run.run_id,)
    )
    others = {**LEASE, "graph_ids": ["another"]}
    assert claim_rows.claim_run(rows.conn, run.run_id, **others) is None
    assert claim_rows.put_off_unknown_graph(rows.conn, run.run_id, ["counter"]) is None
    assert claim_rows.put_off_unknown_graph(rows.conn, run.run_id, ["another"]) == "counter"

    def due() -> bool:
        found = claim_rows.ring_due_runs(rows.conn, ["counter"], limit=1_000, rering_seconds=5.0)
        return run.run_id in [one.run_id for one in found]

    assert not due()
    claim_rows.ring_runs_of_graphs(rows.conn, ["another"], rering_seconds=5.0)
    assert not due()
    claim_rows.ring_runs_of_graphs(rows.conn, ["counter"], rering_seconds=5.0)
    assert due()
    assert claim_rows.claim_run(rows.conn, run.run_id, **LEASE).attempts == 1


def test_the_id_of_a_rolled_back_run_is_not_reused(rows):
    run = rows.pending()
    reason = user_cancel_reason(CancelAction.ROLLBACK, "/runs")
    cancel_rows.roll_back_unstarted_runs(rows.conn, [run.run_id], reason)
    assert rows.status(run.run_id) is None
    assert rows.pending(run.thread_id, run_id=run.run_id) is None
    # As if it had been inserted on another thread while the rollback committed.
    tombstone = rows.conn.execute(
        "DELETE FROM run_tombstone WHERE run_id = %s RETURNING thread_id", (run.run_id,)
    ).fetchone()
    again = rows.pending(run_id=run.run_id)
    rows.conn.execute(
        "INSERT INTO run_tombstone (run_id, thread_id) VALUES (%s, %s)", (run.run_id, *tombstone)
    )
    cancel_rows.roll_back_unstarted_runs(rows.conn, [again.run_id], reason)
    assert rows.status(run.run_id) is None


def test_a_run_put_back_precedes_an_older_one_that_has_become_due(rows):
    thread_id = rows.thread()
    older = rows.pending(thread_id, after_seconds=3600)
    started = rows.running(thread_id)
    assert claim_rows.put_run_back(rows.conn, started.claim, uncharge=True, rering_seconds=5.0)
    rows.conn.execute("UPDATE run SET scheduled_at = now() WHERE run_id = %s", (older.run_id,))
    assert claim_rows.claim_run(rows.conn, older.run_id, **LEASE) is None
    assert claim_rows.claim_run(rows.conn, started.run_id, **LEASE) is not None


def test_a_delayed_run_is_not_claimed_before_it_is_due_and_blocks_no_other(rows):
    thread_id = rows.thread()
    delayed = rows.pending(thread_id, after_seconds=60)
    now = rows.pending(thread_id)
    assert claim_rows.claim_run(rows.conn, delayed.run_id, **LEASE) is None
    assert claim_rows.claim_run(rows.conn, now.run_id, **LEASE) is not None


def test_an_old_claim_can_write_nothing(rows):
    old = rows.running()
    rows.expire(old.run_id)
    assert recover(rows.conn, old.claim).ring is not None
    new = claim_rows.claim_run(rows.conn, old.run_id, **LEASE)
    assert new.claim_no == 2
    assert end_run(rows.conn, old.thread_id, old.claim, SUCCESS) is None
    assert claim_rows.put_run_back(rows.conn, old.claim, uncharge=True, rering_seconds=5.0) is None
    assert recover(rows.conn, old.claim, only_if_expired=False).ring is None
    assert claim_rows.renew_leases(rows.conn, [old.claim], lease_seconds=30) == []
    with pytest.raises(psycopg.DatabaseError, match="is over"):
        rows.conn.execute("SELECT belay_assert_claim(%s, %s)", (old.run_id, old.claim.claim_no))
    assert rows.status(old.run_id) == "running"


def test_a_takeover_waits_for_a_checkpoint_being_written_and_then_fences(rows, database_url):
    from belay_server.db.postgres.connection import connect

    claimed = rows.running()
    rows.expire(claimed.run_id)
    with connect(database_url) as writer:
        with writer.transaction():
            writer.execute("SELECT belay_assert_claim(%s, %s)", (claimed.run_id, claimed.claim_no))
            rows.conn.execute("SET lock_timeout = '100ms'")
            with pytest.raises(psycopg.errors.LockNotAvailable):
                recover(rows.conn, claimed.claim)
            rows.conn.execute("SET lock_timeout = 0")
        assert recover(rows.conn, claimed.claim).ring is not None


def test_renewal_skips_a_locked_row_and_does_not_report_it_as_lost(rows, database_url):
    from belay_server.db.postgres.connection import connect

    first, second = rows.running(), rows.running()
    with connect(database_url) as writer, writer.transaction():
        writer.execute("SELECT belay_assert_claim(%s, %s)", (first.run_id, first.claim_no))
        standing = claim_rows.renew_leases(rows.conn, [first.claim, second.claim], lease_seconds=99)
    assert {first.run_id, second.run_id} == {state.run_id for state in standing}


def test_a_lease_renewed_in_time_is_not_taken_over(rows, unswept):
    claimed = rows.running()
    assert recover(rows.conn, claimed.claim) == recover(rows.conn, Claim(uuid.uuid4(), 1))
    rows.expire(claimed.run_id)
    assert sweep(rows.conn, "sweeper 1")
    assert claimed.claim in expired(rows.conn, "sweeper 1")
    assert claimed.claim not in claim_rows.expired_leases(
        rows.conn, sweeper="sweeper 2", limit=1000
    )
    assert claim_rows.renew_leases(rows.conn, [claimed.claim], lease_seconds=30)
    assert claimed.claim not in claim_rows.expired_leases(
        rows.conn, sweeper="sweeper 1", limit=1000
    )
    assert recover(rows.conn, claimed.claim).ring is None


def test_attempts_are_charged_and_capped_and_a_drain_charges_none(rows):
    claimed = rows.running()
    claim_rows.put_run_back(rows.conn, claimed.claim, uncharge=True, rering_seconds=5.0)
    for attempt in (1, 2, 3):
        claimed = claim_rows.claim_run(rows.conn, claimed.run_id, **LEASE)
        assert claimed.attempts == attempt
        rows.expire(claimed.run_id)
        recovery = recover(rows.conn, claimed.claim)
    assert recovery.end.status == "error"
    assert "3 times" in runs.get_run(rows.conn, claimed.run_id).error["message"]
    assert threads.get_thread(rows.conn, claimed.thread_id).status == "error"


@pytest.mark.parametrize("action", [INTERRUPT, ROLLBACK])
def test_a_cancel_of_a_pending_run_ends_it_and_leaves_the_thread_unchanged(rows, action):
    thread_id = rows.thread()
    running, waiting = rows.running(thread_id), rows.pending(thread_id)
    before = threads.get_thread(rows.conn, thread_id)
    cancelled = cancel(rows.conn, waiting.run_id, action)
    assert [waiting.run_id] == [end.run_id for end in cancelled.ended]
    assert rows.status(waiting.run_id) == ("interrupted" if action is INTERRUPT else None)
    assert before == threads.get_thread(rows.conn, thread_id)
    assert claim_rows.claim_run(rows.conn, waiting.run_id, **LEASE) is None
    assert end_run(rows.conn, thread_id, running.claim, SUCCESS).status == "success"
    assert threads.get_thread(rows.conn, thread_id).status == "idle"


def test_a_cancel_accepted_before_the_end_takes_precedence(rows):
    claimed = rows.running()
    cancel(rows.conn, claimed.run_id)
    end = end_run(rows.conn, claimed.thread_id, claimed.claim, SUCCESS)
    assert end.status == "interrupted"
    thread = threads.get_thread(rows.conn, claimed.thread_id)
    assert thread.error == {"error": "UserInterrupt", "message": "interrupt requested via TEST"}


def test_an_end_written_before_the_cancel_is_kept(rows):
    claimed = rows.running()
    assert end_run(rows.conn, claimed.thread_id, claimed.claim, SUCCESS).status == "success"
    cancelled = cancel(rows.conn, claimed.run_id)
    assert not hits(cancelled)
    assert rows.status(claimed.run_id) == "success"


@pytest.mark.parametrize("order", [(INTERRUPT, ROLLBACK), (ROLLBACK, INTERRUPT)])
def test_rollback_takes_precedence_over_interrupt_in_either_order(rows, order):
    claimed = rows.running()
    for action in order:
        cancel(rows.conn, claimed.run_id, action)
    assert end_cancelled_run(rows.conn, claimed.thread_id, claimed.claim, STOPPED).status is None
    assert rows.status(claimed.run_id) is None
    assert runs.has_tombstone(rows.conn, claimed.run_id)


def test_an_accepted_cancel_is_carried_out_after_the_worker_died(rows):
    claimed = rows.running()
    cancel(rows.conn, claimed.run_id)
    rows.expire(claimed.run_id)
    assert recover(rows.conn, claimed.claim).end.status == "interrupted"
    assert rows.status(claimed.run_id) == "interrupted"


@pytest.mark.parametrize("action", [INTERRUPT, ROLLBACK])
def test_a_cancel_of_a_run_that_was_put_back_ends_it_at_once(rows, action):
    claimed = rows.running()
    claim_rows.put_run_back(rows.conn, claimed.claim, uncharge=True, rering_seconds=5.0)
    cancel(rows.conn, claimed.run_id, action)
    assert rows.status(claimed.run_id) == ("interrupted" if action is INTERRUPT else None)
    expected = "interrupted" if action is INTERRUPT else "idle"
    assert threads.get_thread(rows.conn, claimed.thread_id).status == expected


def test_an_accepted_cancel_takes_precedence_over_a_timeout(rows):
    claimed = rows.running()
    cancel(rows.conn, claimed.run_id)
    end = end_run(rows.conn, claimed.thread_id, claimed.claim, timed_out())
    assert end.status == "interrupted"
    claimed = rows.running()
    assert end_run(rows.conn, claimed.thread_id, claimed.claim, timed_out()).status == "timeout"


def test_a_rollback_restores_what_the_claim_changed_on_the_thread(rows):
    thread_id = rows.thread()
    first = rows.running(thread_id)
    end_run(rows.conn, thread_id, first.claim, SUCCESS)
    threads.patch_thread(rows.conn, thread_id, {"graph_id": "other", "mine": 1})
    before = threads.get_thread(rows.conn, thread_id)
    second = rows.running(thread_id, thread_config={"tags": ["second"]})
    during = threads.get_thread(rows.conn, thread_id)
    assert during.config == {"tags": ["second"]}
    assert during.metadata["graph_id"] == "counter"
    threads.patch_thread(rows.conn, thread_id, {"meanwhile": True})
    cancel(rows.conn, second.run_id, ROLLBACK)
    end_cancelled_run(rows.conn, thread_id, second.claim, STOPPED)
    after = threads.get_thread(rows.conn, thread_id)
    assert after.metadata == {**before.metadata, "meanwhile": True}
    assert after.config == before.config
    assert (after.status, after.values, after.error) == (
        before.status,
        before.values,
        before.error,
    )


NO_MARKS = {"mine": 1}, {}, {}


def marks_of(rows, thread_id):
    """Return a thread's metadata, config and what its runs inherit."""
    thread = threads.get_thread(rows.conn, thread_id)
    given = threads.thread_defaults(rows.conn, thread_id)
    assert given.metadata == thread.metadata
    return thread.metadata, thread.config, given.configurable


def test_the_first_run_marks_its_thread_when_it_is_created(rows):
    thread_id = uuid.uuid4()
    threads.insert_thread(rows.conn, thread_id, {"mine": 1})
    assert marks_of(rows, thread_id) == NO_MARKS
    first = rows.pending(thread_id)
    marked = marks_of(rows, thread_id)
    own = {"graph_id": "counter", "assistant_id": str(first.assistant_id)}
    assert marked == (
        {"mine": 1, **own},
        {"tags": ["of the run"]},
        {"model": "of the assistant"},
    )
    second = rows.pending(thread_id, thread_config={"tags": ["2"]}, thread_configurable={"m": 2})
    assert marks_of(rows, thread_id) == marked
    cancel(rows.conn, second.run_id, ROLLBACK)
    assert marks_of(rows, thread_id) == marked


@pytest.mark.parametrize("claimed", [False, True], ids=["pending", "running"])
def test_a_rollback_of_the_first_run_removes_its_marks(rows, claimed):
    thread_id = uuid.uuid4()
    threads.insert_thread(rows.conn, thread_id, {"mine": 1})
    if claimed:
        first = rows.running(thread_id)
        cancel(rows.conn, first.run_id, ROLLBACK)
        end_cancelled_run(rows.conn, thread_id, first.claim, STOPPED)
    else:
        first = rows.pending(thread_id)
        cancel(rows.conn, first.run_id, ROLLBACK)
    assert rows.status(first.run_id) is None
    assert marks_of(rows, thread_id) == NO_MARKS


def test_an_interrupted_pending_run_leaves_its_marks(rows):
    first = rows.pending()
    cancel(rows.conn, first.run_id, INTERRUPT)
    assert marks_of(rows, first.thread_id)[1:] == (
        {"tags": ["of the run"]},
        {"model": "of the assistant"},
    )


def test_lost_doorbells_are_rung_again_with_backoff_and_only_for_heads(rows):
    thread_id = rows.thread()
    first, second = rows.pending(thread_id), rows.pending(thread_id)

    def overdue():
        rows.conn.execute("UPDATE run SET next_ring_at = now() WHERE thread_id = %s", (thread_id,))

    def rung():
        due = claim_rows.ring_due_runs(rows.conn, ["counter"], limit=10_000, rering_seconds=5.0)
        return [r.run_id for r in due if r.run_id in (first.run_id, second.run_id)]

    assert rung() == []
    overdue()
    assert rung() == [first.run_id]
    assert rung() == []
    claimed = claim_rows.claim_run(rows.conn, first.run_id, **LEASE)
    overdue()
    assert rung() == []
    end_run(rows.conn, thread_id, claimed.claim, SUCCESS)
    overdue()
    assert rung() == [second.run_id]


def sweep(conn, owner):
    return claim_rows.take_sweeper_lease(
        conn, owner, seconds=30, tolerance_seconds=1.0, grace_seconds=10
    )


def expired(conn, sweeper):
    return claim_rows.expired_leases(conn, sweeper=sweeper, limit=1000)


@pytest.fixture
def unswept(conn):
    conn.execute("DELETE FROM scheduler_lease")
    yield conn
    conn.execute("DELETE FROM scheduler_lease")


def expired_for(conn, seconds):
    sql = "UPDATE scheduler_lease SET expires_at = now() - make_interval(secs => %s)"
    return conn.execute(f"{sql} RETURNING owner", (seconds,)).fetchone()[0]


def test_only_one_sweeper_is_active_and_a_hanging_one_is_replaced(unswept, many):
    assert many(10, lambda conn, number: sweep(conn, f"worker {number}")).count(True) == 1
    number = int(expired_for(unswept, 0.1).split()[1])
    assert sweep(unswept, f"worker {number + 1}")
    assert not sweep(unswept, f"worker {number}")


def test_after_an_outage_no_run_is_taken_over_for_one_lease_period(unswept, rows):
    claimed = rows.running()
    rows.expire(claimed.run_id)

    def judged(owner):
        return claimed.claim in claim_rows.expired_leases(rows.conn, sweeper=owner, limit=1000)

    assert sweep(unswept, "one")
    assert judged("one")
    expired_for(unswept, 0.5)  # the sweeper died, and another one takes over at once
    assert not judged("one")
    assert sweep(unswept, "two")
    assert judged("two")
    expired_for(unswept, 5)  # no sweeper for a while: Postgres was unavailable
    assert sweep(unswept, "two")
    assert not judged("two")
    unswept.execute("UPDATE scheduler_lease SET judges_after = now()")
    assert judged("two")


def test_concurrent_locks_cancels_renewals_and_recoveries_do_not_deadlock(rows, many):
    thread_id = rows.thread()
    running = rows.running(thread_id)

    def hammer(conn, number):
        chance = random.Random(number)
        claim = running.claim
        for _ in range(30):
            what = chance.randrange(4)
            if what == 0:
                with conn.transaction():
                    threads.lock_thread(conn, thread_id)
                    cancel_rows.active_runs_of_thread(conn, thread_id)
            elif what == 1:
                cancel(conn, uuid.uuid4() if chance.random() < 0.5 else running.run_id)
            elif what == 2:
                claim_rows.renew_leases(conn, [claim], lease_seconds=30)
            else:
                recover(conn, claim)
        return True

    assert many(8, hammer) == [True] * 8
    assert rows.status(running.run_id) == "running"


def race(rows, many, seed):
    """Start a cancel and the run's end at once. Check that all results agree afterwards."""
    chance = random.Random(seed)
    action = chance.choice([INTERRUPT, ROLLBACK])
    claimed = rows.running()

    def one(conn, number):
        if number == 0:
            return end_run(conn, claimed.thread_id, claimed.claim, SUCCESS)
        return cancel(conn, claimed.run_id, action)

    end, cancelled = many(2, one)
    status = rows.status(claimed.run_id)
    thread = threads.get_thread(rows.conn, claimed.thread_id)
    if hits(cancelled):
        expected = "interrupted" if action is INTERRUPT else None
        error = "UserInterrupt" if action is INTERRUPT else None
    else:
        expected, error = "success", None
    context = f"seed {seed}, {action}, cancel accepted: {hits(cancelled)}"
    assert (expected, expected) == (status, end.status), context
    assert error == (thread.error or {}).get("error"), context
    assert thread.status in ("idle", "interrupted"), context
    return status


def test_a_cancel_racing_a_completion_has_consistent_results(rows, many):
    seen = {race(rows, many, seed) for seed in range(200)}
    assert "success" in seen or "interrupted" in seen


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_a_cancel_racing_a_completion_is_consistent_in_ten_thousand_races(rows, many):
    for seed in range(10_000):
        race(rows, many, seed)


def test_a_bulk_cancel_pages_through_every_run_once(rows):
    threads = [rows.thread() for _ in range(3)]
    made = {rows.pending(threads[n % 3]).run_id for n in range(10)}
    found, after = [], None
    while True:
        page = cancel_rows.cancellable_runs(
            rows.conn, CancelFilter(run_ids=list(made)), after=after, limit=3
        )
        if not page:
            break
        found += page
        after = page[-1]
    assert len(found) == len(made)
    assert {run.run_id for run in found} == made
    for thread_id in threads:  # a thread's newest run first, the head of its queue last
        order = [run.seq for run in found if run.thread_id == thread_id]
        assert order == sorted(order, reverse=True)


def test_a_claim_finds_the_head_of_a_long_queue_without_sorting_it(rows):
    thread_id = rows.thread()
    first = rows.pending(thread_id)
    rows.conn.execute(
        """
        INSERT INTO run (run_id, thread_id, assistant_id, graph_id, queue, multitask_strategy)
        SELECT gen_random_uuid(), thread_id, assistant_id, graph_id, queue, multitask_strategy
        FROM run, generate_series(1, 5000) WHERE run_id = %s
        """,
        (first.run_id,),
    )
    rows.conn.execute("ANALYZE run")
    params = {"run_id": first.run_id, **LEASE, "token_hash": None}
    plan = rows.conn.execute(f"EXPLAIN {claim_rows.SQL.claim_run}", params).fetchall()
    text = "\n".join(row[0] for row in plan)
    assert "run_thread_queue" in text
    assert "Sort Key: ((" not in text
    assert "Seq Scan on run" not in text
    rows.conn.execute("DELETE FROM thread WHERE thread_id = %s", (thread_id,))


def test_a_run_id_chosen_by_a_client_is_remembered_after_its_deletion(rows):
    chosen = rows.pending(temporary=True, id_chosen=True)
    ours = rows.pending(temporary=True)
    for run in (chosen, ours):
        assert threads.delete_hidden_thread(rows.conn, run.thread_id)
        assert rows.status(run.run_id) is None
    assert runs.has_tombstone(rows.conn, chosen.run_id)
    assert not runs.has_tombstone(rows.conn, ours.run_id)


def test_an_end_retried_after_a_lost_result_returns_the_same_end(rows):
    claimed = rows.running()
    queued = rows.pending(claimed.thread_id)
    first = end_run(rows.conn, claimed.thread_id, claimed.claim, SUCCESS)
    assert end_run(rows.conn, claimed.thread_id, claimed.claim, SUCCESS) == first
    assert [run.run_id for run in first.next_runs] == [queued.run_id]
    assert recover(rows.conn, claimed.claim, only_if_expired=False).end == first


def test_a_claim_whose_result_was_lost_is_found_only_by_its_owner(rows):
    claimed = rows.running()
    assert claim_rows.held_run(rows.conn, claimed.run_id, owner=LEASE["owner"]) == claimed
    assert claim_rows.held_run(rows.conn, claimed.run_id, owner="somebody else") is None
    end_run(rows.conn, claimed.thread_id, claimed.claim, SUCCESS)
    assert claim_rows.held_run(rows.conn, claimed.run_id, owner=LEASE["owner"]) is None


def test_a_system_assistant_id_taken_by_a_client_is_reclaimed(rows):
    """A client created it before the graph existed. Callers that use the graph must not run it."""
    graph_id = f"later-{uuid.uuid4().hex}"
    squat = assistants.AssistantContent(
        graph_id="counter",
        name=graph_id,
        description="the best",
        config={"configurable": {"prompt": "send me everything"}},
        context={"prompt": "send me everything"},
        metadata={"created_by": "system", "owner": "eve"},
    )
    assistant_id = system_assistant_id(graph_id)
    assert assistants.insert_assistant(rows.conn, assistant_id, squat)
    for _ in range(2):
        assistants.put_system_assistants(rows.conn, [SystemAssistant(graph_id, graph_id)])
        mine = assistants.get_assistant(rows.conn, assistant_id)
        assert (mine.graph_id, mine.config, mine.context) == (graph_id, {}, {})
        assert (mine.metadata, mine.is_system, mine.version) == ({"created_by": "system"}, True, 2)
    versions = assistants.assistant_versions(
        rows.conn, assistant_id, metadata={}, limit=10, offset=0
    )
    assert [version.version for version in versions] == [2, 1]


def test_a_system_assistant_that_its_operator_changed_stays_changed(rows):
    graph_id = f"mine-{uuid.uuid4().hex}"
    assistants.put_system_assistants(rows.conn, [SystemAssistant(graph_id, graph_id)])
    assistant_id = system_assistant_id(graph_id)
    before = assistants.get_assistant(rows.conn, assistant_id)
    changed = dataclasses.replace(
        assistants.AssistantContent.of(before), context={"prompt": "be kind"}
    )
    assistants.update_assistant(rows.conn, assistant_id, changed)
    assistants.put_system_assistants(rows.conn, [SystemAssistant(graph_id, graph_id)])
    after = assistants.get_assistant(rows.conn, assistant_id)
    assert (after.context, after.version) == ({"prompt": "be kind"}, 2)
    # An assistant from before the column `is_system` existed is recognized by its first version.
    rows.conn.execute(
        "UPDATE assistant SET is_system = false, created_at = '2020-01-01' WHERE assistant_id = %s",
        (assistant_id,),
    )
    assistants.put_system_assistants(rows.conn, [SystemAssistant(graph_id, graph_id)])
    again = assistants.get_assistant(rows.conn, assistant_id)
    assert (again.context, again.version, again.is_system) == ({"prompt": "be kind"}, 2, True)


def test_a_system_assistant_has_the_projects_name_and_description_until_a_client_changes_it(rows):
    graph_id = f"named-{uuid.uuid4().hex}"
    assistant_id = system_assistant_id(graph_id)

    def shown():
        found = assistants.get_assistant(rows.conn, assistant_id)
        version = rows.conn.execute(
            "SELECT name, description FROM assistant_version WHERE assistant_id = %s "
            "ORDER BY version DESC LIMIT 1",
            (assistant_id,),
        ).fetchone()
        assert version == (found.name, found.description)
        return found.version, found.name, found.description, found.context

    for name, description in (("First", None), ("Second", "says more"), ("Third", None)):
        one = SystemAssistant(graph_id, name, description)
        assistants.put_system_assistants(rows.conn, [one])
        assert shown() == (1, name, description, {})
    defaults = SystemAssistant(graph_id, "Third", context={"model": "small"})
    assistants.put_system_assistants(rows.conn, [defaults])
    assert shown() == (1, "Third", None, {"model": "small"})
    found = assistants.get_assistant(rows.conn, assistant_id)
    assert found.config == {"configurable": {"model": "small"}}
    rows.conn.execute(
        "UPDATE assistant SET name = 'Mine', version = 2 WHERE assistant_id = %s", (assistant_id,)
    )
    assistants.put_system_assistants(rows.conn, [SystemAssistant(graph_id, "Fourth")])
    assert assistants.get_assistant(rows.conn, assistant_id).name == "Mine"
