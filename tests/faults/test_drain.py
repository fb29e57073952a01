"""SIGTERM on a worker: runs get the grace period, then are put back without an attempt charged."""

from __future__ import annotations

import signal

import pytest

from tests.long_forms import full_case


def test_a_run_that_exceeds_the_grace_period_continues_elsewhere_uncharged(cluster, probe):
    thread_id, run_id, tag = probe.start(seconds=1.0)
    worker, _ = probe.worker_of(probe.wait_for(tag, "s2").pid)
    assert worker.stop() == 0
    probe.assert_done_once(thread_id, run_id, tag)
    row = probe.row(run_id)
    assert (row["attempts"], row["claim_no"]) == (1, 2)
    assert probe.starts(tag).count("s1") == 1
    assert [e.beats[0].attempt for e in probe.executions(tag)] == [1, 1]


@pytest.mark.full
def test_a_run_that_ends_within_the_grace_period_is_not_stopped(cluster, probe):
    thread_id, run_id, tag = probe.start(seconds=0.1)
    worker, _ = probe.worker_of(probe.wait_for(tag, "s2").pid)
    assert worker.stop() == 0
    assert probe.status(thread_id, run_id) == "success"
    assert probe.row(run_id)["claim_no"] == 1


@pytest.mark.parametrize("action", [full_case("interrupt"), "rollback"])
def test_a_cancel_during_a_drain_takes_effect(cluster, probe, action):
    thread_id, run_id, tag = probe.start(seconds=5.0, graph="probe")
    worker, _ = probe.worker_of(probe.wait_for(tag, "s1").pid)
    worker.send(signal.SIGTERM)
    probe.client.runs.cancel(thread_id, run_id, action=action)
    expected = "interrupted" if action == "interrupt" else None
    assert probe.wait_until_over(thread_id, run_id) == expected
    assert worker.process.wait(20) == 0
    assert probe.starts(tag) == ["s1"]


def test_a_draining_worker_takes_no_further_runs(cluster, probe):
    long = probe.start(seconds=0.1)
    worker, other = probe.worker_of(probe.wait_for(long[2], "s1").pid)
    worker.send(signal.SIGTERM)
    runs = [probe.start() for _ in range(5)]
    for run in [*runs, long]:
        probe.assert_done_once(*run)
    children = {child.pid for child in other.children()}
    assert worker.process.wait(20) == 0
    for run in runs:
        assert {beat.pid for beat in probe.beats(run[2])} <= children
