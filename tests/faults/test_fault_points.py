"""Processes are killed at every named moment of a run's life, and the run ends exactly once."""

from __future__ import annotations

import os
import signal
import uuid

import httpx
import psutil
import pytest
import redis
from langgraph_sdk import get_sync_client

from tests.cluster import Cluster
from tests.faults.conftest import (
    LEASE_SECONDS,
    QUICK,
    Probe,
    mend,
    pass_time,
    signal_tree,
)
from tests.long_forms import full_case, in_turn, long_case
from tests.waiting import wait_until

#: The moments in a child, from the doorbell's arrival to the announcement of the end.
IN_A_CHILD = ("P3", "P4", "P5", "P7", "P8", "P9", "P10", "P11")


@pytest.fixture(scope="module")
def unlapsing(scratch):
    """Yield a cluster whose leases outlast every test, so that no sweeper can take over."""
    made = Cluster(scratch / "unlapsing", workers=1, **{**QUICK, "BELAY_LEASE_SECONDS": "600"})
    yield made.start()
    made.stop()


@pytest.mark.parametrize(("point", "durability"), in_turn(IN_A_CHILD, ["sync", "async"]))
def test_a_child_killed_at_any_point_is_replaced_before_its_lease_expires(
    unlapsing, tmp_path, point, durability
):
    mend(unlapsing)
    with get_sync_client(url=unlapsing.url) as client:
        probe = Probe(unlapsing, client, tmp_path / "history")
        assert_replaced(unlapsing, probe, point, durability)


def assert_replaced(cluster, probe, point, durability):
    cluster.plan(point, "kill")
    thread_id, run_id, tag = probe.start(seconds=0.02, durability=durability)
    probe.assert_done_once(thread_id, run_id, tag)
    [(at, _, fault, *_)] = cluster.injected()
    assert (at, fault) == (point, "kill")
    charged = probe.row(run_id)["attempts"]
    assert charged == (1 if point in ("P3", "P10", "P11") else 2)
    if durability == "sync":
        # Only the interrupted step is executed again: P7 and P8 come after a step's work.
        assert len(probe.starts(tag)) <= 5


@pytest.mark.parametrize(("durability", "step"), in_turn(["sync", "async"], ["s1", "s3"]))
def test_a_child_killed_inside_a_node_resumes_at_that_node(probe, step, durability):
    thread_id, run_id, tag = probe.start(seconds=0.2, durability=durability)
    beat = probe.wait_for(tag, step)
    os.kill(beat.pid, signal.SIGKILL)
    probe.assert_done_once(thread_id, run_id, tag)
    starts = probe.starts(tag)
    assert starts.count(step) == 2
    if durability == "sync":
        assert len(starts) == 5


@pytest.mark.parametrize(("point", "fault"), in_turn(["P4", "P7", "P9"], ["segv", "exit"]))
def test_a_crashed_child_is_recovered_like_a_killed_one(cluster, probe, point, fault):
    cluster.plan(point, fault)
    thread_id, run_id, tag = probe.start()
    probe.assert_done_once(thread_id, run_id, tag)
    assert probe.row(run_id)["attempts"] == 2


def test_a_child_killed_three_times_ends_the_run_with_an_error(cluster, probe):
    cluster.plan("P8", "kill", "kill", "kill")
    thread_id, run_id, _ = probe.start()
    assert probe.wait_until_over(thread_id, run_id) == "error"
    answer = probe.client.runs.join(thread_id, run_id)
    assert answer["__error__"]["error"] == "MaxAttemptsExceeded"
    assert "died 3 times" in answer["__error__"]["message"]
    assert probe.client.threads.get(thread_id)["status"] == "error"


@pytest.mark.parametrize("point", [full_case("P4"), "P7", full_case("P9")])
def test_a_killed_worker_is_taken_over_by_another(cluster, probe, point):
    cluster.plan(point, "hold")
    thread_id, run_id, tag = probe.start()
    wait_until(cluster.injected, what="the run to get there")
    pid = int(cluster.injected()[0][3])
    worker, _ = probe.worker_of(pid)
    children = worker.children()
    worker.kill()
    (cluster.faults / "release").touch()
    wait_until(lambda: not any(map(_lives, children)), 10, "the children to die too")
    probe.assert_done_once(thread_id, run_id, tag)
    assert probe.row(run_id)["attempts"] == 2
    assert len(probe.starts(tag)) <= 5


def test_a_web_process_killed_before_the_commit_has_accepted_no_run(cluster, probe):
    thread_id = probe.client.threads.create()["thread_id"]
    run_id = str(uuid.uuid4())
    cluster.plan("P0", "kill")
    with pytest.raises(httpx.TransportError):
        create(cluster, probe, thread_id, run_id)
    cluster.wait_until_up()
    assert httpx.get(f"{cluster.url}/threads/{thread_id}/runs/{run_id}").status_code == 404
    assert create(cluster, probe, thread_id, run_id).status_code == 200
    probe.assert_done_once(thread_id, run_id, "once")


@pytest.mark.parametrize(
    ("point", "by"),
    [("P2", "run_id"), long_case("P1", "key"), full_case("P1", "run_id"), full_case("P2", "key")],
)
def test_a_create_whose_response_was_lost_can_be_retried(cluster, probe, point, by):
    thread_id = probe.client.threads.create()["thread_id"]
    run_id = str(uuid.uuid4())
    cluster.plan(point, "kill")
    with pytest.raises(httpx.TransportError):
        create(cluster, probe, thread_id, run_id, by)
    cluster.wait_until_up()
    runs = wait_until(lambda: probe.client.runs.list(thread_id), what="the accepted run")
    again = create(cluster, probe, thread_id, run_id, by)
    assert again.status_code == 200
    assert [run["run_id"] for run in runs] == [again.json()["run_id"]]
    probe.assert_done_once(thread_id, again.json()["run_id"], "once")
    assert len(probe.client.runs.list(thread_id)) == 1
    assert probe.starts("once") == ["s1", "s2", "s3", "s4"]


def create(cluster, probe, thread_id, run_id, by="run_id"):
    given = {"tag": "once", "history": str(probe.history)}
    body = {"assistant_id": "sync_probe", "input": given}
    headers = {}
    if by == "run_id":
        body["run_id"] = run_id
    else:
        headers["Idempotency-Key"] = run_id
    url = f"{cluster.url}/threads/{thread_id}/runs"
    return httpx.post(url, json=body, headers=headers, timeout=30)


@pytest.mark.parametrize(
    ("point", "action"), in_turn(["P5", "P7", "P8", "P9"], ["interrupt", "rollback"])
)
def test_a_cancelled_run_whose_child_is_killed_ends_as_cancelled(cluster, probe, point, action):
    before = probe.start()
    probe.assert_done_once(*before)
    state = probe.client.threads.get_state(before[0])
    cluster.plan(point, "hold")
    thread_id, run_id, tag = probe.start(thread_id=before[0])
    wait_until(cluster.injected, what="the run to get there")
    pid = int(cluster.injected()[0][3])
    worker, _ = probe.worker_of(pid)
    worker.send(signal.SIGSTOP)  # its supervisor cannot receive the cancel
    probe.client.runs.cancel(thread_id, run_id, action=action)
    os.kill(pid, signal.SIGKILL)
    worker.send(signal.SIGCONT)
    expected = "interrupted" if action == "interrupt" else None
    assert probe.wait_until_over(thread_id, run_id) == expected
    steps = len(probe.starts(tag))
    if action == "rollback":
        assert probe.client.threads.get_state(thread_id) == state
    after = probe.start(thread_id=thread_id)
    probe.assert_done_once(*after)
    assert len(probe.starts(tag)) == steps


@pytest.mark.parametrize("action", ["interrupt", long_case("rollback")])
def test_what_a_run_has_left_ends_with_a_cancel_before_its_end(probe, beats, action):
    """The cancel was accepted in time, and what the graph had left went on."""
    probe.cancel_before_its_end_is_written("nodes", beats, action)


def test_a_rollback_whose_child_is_killed_is_completed(cluster, probe):
    before = probe.start()
    probe.assert_done_once(*before)
    state = probe.client.threads.get_state(before[0])
    history = probe.client.threads.get_history(before[0], limit=100)
    thread_id, run_id, tag = probe.start(thread_id=before[0], seconds=1.0)
    probe.wait_for(tag, "s2")
    cluster.plan("P12", "kill")
    probe.client.runs.cancel(thread_id, run_id, action="rollback")
    assert probe.wait_until_over(thread_id, run_id) is None
    assert [line[0] for line in cluster.injected()] == ["P12"]
    assert probe.client.threads.get_state(thread_id) == state
    assert probe.client.threads.get_history(thread_id, limit=100) == history


def test_a_rolled_back_run_is_not_executed_by_a_repeated_create(cluster, probe):
    thread_id = probe.client.threads.create()["thread_id"]
    run_id = str(uuid.uuid4())
    given = {"tag": "once", "history": str(probe.history), "seconds": 5.0}
    body = {"assistant_id": "sync_probe", "input": given}
    url = f"{cluster.url}/threads/{thread_id}/runs"
    headers = {"Idempotency-Key": run_id}
    first = httpx.post(url, json=body, headers=headers).json()["run_id"]
    probe.wait_for("once", "s1")
    probe.client.runs.cancel(thread_id, first, action="rollback", wait=True)
    assert httpx.post(url, json=body, headers=headers).status_code == 404
    # A client cannot choose a run id that is derived from a key, not even the key's own client.
    assert httpx.post(url, json={**body, "run_id": first}).status_code == 422
    assert probe.starts("once") == ["s1"]


@pytest.mark.parametrize("seconds", [0, full_case(60)])
def test_a_worker_paused_beyond_its_lease_abandons_its_attempt(cluster, probe, seconds):
    thread_id, run_id, tag = probe.start(seconds=0.4)
    beat = probe.wait_for(tag, "s2")
    worker, _ = probe.worker_of(beat.pid)
    signal_tree(worker, signal.SIGSTOP)
    probe.assert_done_once(thread_id, run_id, tag)
    history = probe.client.threads.get_history(thread_id, limit=100)
    row = probe.row(run_id)
    events = event_log(cluster, run_id)
    pass_time(seconds)
    signal_tree(worker, signal.SIGCONT)
    zombie = next(e for e in probe.executions(tag) if e.pid == beat.pid)
    seen = len(zombie.beats)
    # The zombie may finish its current step; it detects the lost lease and does nothing more.
    told = (f"lost the lease on run {run_id}", f"abandoned the attempt of run {run_id}")
    wait_until(
        lambda: any(line in worker.text() for line in told), 5 * LEASE_SECONDS, "it to notice"
    )
    after = probe.start()
    probe.assert_done_once(*after)
    zombie = next(e for e in probe.executions(tag) if e.pid == beat.pid)
    assert [b.event for b in zombie.beats[seen:]] in ([], ["end"])
    assert probe.client.threads.get_history(thread_id, limit=100) == history
    assert probe.row(run_id) == row
    assert event_log(cluster, run_id) == events


def event_log(cluster, run_id):
    with redis.Redis.from_url(cluster.valkey.url) as bus:
        return bus.xrange(f"belay:events:{run_id}")


def test_an_exception_of_the_graph_is_not_retried(probe):
    thread_id, run_id, tag = probe.start(input={"fails": True})
    assert probe.wait_until_over(thread_id, run_id) == "error"
    assert probe.starts(tag) == ["s1", "s2", "s3"]
    assert probe.row(run_id)["attempts"] == 1
    assert probe.client.runs.join(thread_id, run_id)["__error__"]["error"] == "ValueError"


def test_runs_that_crash_every_child_are_given_up_and_the_others_continue(cluster, probe):
    """More of these runs than there are children, with ordinary runs queued behind them."""
    poisoned = [probe.start(input={"crashes": True}) for _ in range(12)]
    good = [probe.start(seconds=0.02) for _ in range(6)]
    for run in good:
        probe.assert_done_once(*run)
    for thread_id, run_id, tag in poisoned:
        assert probe.wait_until_over(thread_id, run_id) == "error"
        assert "died 3 times" in probe.client.runs.join(thread_id, run_id)["__error__"]["message"]
        assert probe.client.threads.get(thread_id)["status"] == "error"
        assert probe.starts(tag).count("s2") == 3


def _lives(process: psutil.Process) -> bool:
    """Return whether a process is alive. A zombie counts as dead."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
