"""Test the metrics of the queues and the counts of the sweeper."""

from __future__ import annotations

import pytest

from belay_server.db.queues import queue_states
from belay_server.domain.metrics import LEASE_LOSSES, RUNS_ENDED
from belay_workers.slots import SlotTable
from tests.integration.runs.test_sweeper import Doorbell, sweeper


@pytest.fixture
def empty(rows):
    rows.conn.execute("DELETE FROM thread")
    return rows


def states(rows):
    return {state.queue: state for state in queue_states(rows.conn)}


def test_an_empty_queue_is_counted_as_zero(empty):
    assert {None} == set(states(empty))
    total = states(empty)[None]
    assert (total.running, total.pending, total.due, total.oldest_seconds) == (0, 0, 0, 0.0)


def test_queues_are_counted_separately_and_in_total(empty):
    busy = empty.thread()
    empty.running(busy)
    empty.pending(busy)  # blocked by the running run
    idle = empty.thread()
    empty.pending(idle, after_seconds=3600.0)  # scheduled for later: blocks no other run
    empty.pending(idle)
    empty.pending(idle)  # blocked by the run before it
    empty.pending(queue="heavy")
    found = states(empty)
    assert set(found) == {None, "runs", "heavy"}
    runs, heavy, total = found["runs"], found["heavy"], found[None]
    assert (runs.running, runs.pending, runs.due, runs.claimable) == (1, 4, 3, 1)
    assert (heavy.running, heavy.pending, heavy.due, heavy.claimable) == (0, 1, 1, 1)
    assert (total.running, total.pending, total.due, total.claimable) == (1, 5, 4, 2)


def test_the_age_of_a_queue_is_that_of_its_oldest_due_run(empty):
    old, blocked = empty.pending(), empty.thread()
    empty.running(blocked)
    oldest = empty.pending(blocked)
    for run, seconds in ((old, 60), (oldest, 600)):
        empty.conn.execute(
            "UPDATE run SET scheduled_at = now() - make_interval(secs => %s) WHERE run_id = %s",
            (seconds, run.run_id),
        )
    found = states(empty)["runs"]
    assert found.oldest_seconds == pytest.approx(600, abs=5)
    assert found.oldest_claimable_seconds == pytest.approx(60, abs=5)
    assert found.median_seconds == pytest.approx(330, abs=5)


def test_leases_that_the_sweeper_takes_over_are_counted(empty):
    table = SlotTable(1)
    made = sweeper(Doorbell(0), table.counters)
    for attempts in (1, 3):
        claimed = empty.running()
        empty.conn.execute(
            "UPDATE run SET attempts = %s WHERE run_id = %s", (attempts, claimed.run_id)
        )
        empty.expire(claimed.run_id)
    empty.conn.execute("DELETE FROM scheduler_lease")
    assert made._holds_lease(empty.conn)
    empty.conn.execute("UPDATE scheduler_lease SET judges_after = now() - interval '1 s'")
    made._take_from_the_gone(empty.conn)
    assert table.counter_table.count(LEASE_LOSSES, "sweeper") == 2
    assert table.counter_table.count(RUNS_ENDED, "error") == 1
