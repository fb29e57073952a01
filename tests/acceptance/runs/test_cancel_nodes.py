"""A cancel stops every kind of node. This is verified in the node, not through the API."""

from __future__ import annotations

import time

import psutil
import pytest

from tests.long_forms import long_case

ASKED = ["async_sleep", "async_beats", "time_sleep", "sync_beats", "timer_beats", "spin", "regex"]
KILLED = ["swallow_sync", "swallow_async", "block_loop", "hold_gil"]
#: They end when asked to, but leave something that goes on.
LEAVING = ["chain_timers", "restart_tasks", "start_raw_thread"]
SUBPROCESS = ["wait_for_subprocess", "beating_subprocess", "leave_daemon"]
INSIDE = ["sub_async_beats", "sub_spin", "sub_swallow_sync", "fan_async_beats", "fan_sync_beats"]
_BEATING_WHILE_STOPPED_SECONDS = 0.3


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def start(client, kind, beats):
    thread = client.threads.create()
    run = client.runs.create(
        thread["thread_id"], "nodes", input={"kind": kind, "beats": str(beats)}
    )
    words = ("beats", "spin", "swallow", "block", "hold", "subprocess", "daemon", *LEAVING)
    if any(word in kind for word in words):
        beats.wait_for("beat")
    else:
        beats.wait_for("begin")
    return thread["thread_id"], run["run_id"]


def assert_silent(beats) -> None:
    """Check that the node writes no more beats after the response."""
    before = beats.lines()
    time.sleep(_BEATING_WHILE_STOPPED_SECONDS)  # nothing may happen meanwhile
    assert before == beats.lines()


@pytest.mark.parametrize("action", ["interrupt", long_case("rollback")])
@pytest.mark.parametrize("kind", ASKED + KILLED + LEAVING + SUBPROCESS + INSIDE)
def test_a_node_does_nothing_after_the_response_to_its_cancel(sync_client, beats, kind, action):
    thread_id, run_id = start(sync_client, kind, beats)
    sync_client.runs.cancel(thread_id, run_id, wait=True, action=action)
    assert_silent(beats)
    statuses = [run["status"] for run in sync_client.runs.list(thread_id)]
    assert statuses == (["interrupted"] if action == "interrupt" else [])
    assert sync_client.threads.get(thread_id)["status"] in ("interrupted", "idle")


@pytest.mark.parametrize("kind", ["swallow_sync", "swallow_async", "block_loop", "hold_gil"])
def test_a_child_that_does_not_stop_is_killed(sync_client, beats, kind):
    thread_id, run_id = start(sync_client, kind, beats)
    child = next(iter(beats.pids()))
    sync_client.runs.cancel(thread_id, run_id, wait=True)
    assert not alive(child)


def test_a_generator_of_a_cancelled_run_is_closed_before_the_response(sync_client, beats):
    thread_id, run_id = start(sync_client, "drop_generator", beats)
    assert "closed" not in beats.names()
    sync_client.runs.cancel(thread_id, run_id, wait=True)
    assert "closed" in beats.names()


def test_a_subprocess_of_a_node_is_killed_with_it(sync_client, beats):
    thread_id, run_id = start(sync_client, "leave_daemon", beats)
    pids = {int(line.split()[1]) for line in beats.lines() if line.startswith("beat ")}
    assert pids
    sync_client.runs.cancel(thread_id, run_id, wait=True)
    assert [pid for pid in pids if alive(pid)] == []


def test_other_runs_of_the_worker_are_not_affected(sync_client, beats, tmp_path):
    others = []
    for number in range(3):
        thread = sync_client.threads.create()
        path = tmp_path / f"other{number}"
        run = sync_client.runs.create(
            thread["thread_id"], "sync_steps", input={"seconds": 0.4, "beats": str(path)}
        )
        others.append((thread["thread_id"], run["run_id"], path))
    thread_id, run_id = start(sync_client, "swallow_sync", beats)
    sync_client.runs.cancel(thread_id, run_id, wait=True)
    for thread_id, run_id, path in others:
        values = sync_client.runs.join(thread_id, run_id)
        assert values["steps"] == ["s1", "s2", "s3", "s4"]
        starts = [line.split()[0] for line in path.read_text().splitlines() if ":start" in line]
        assert starts == ["s1:start", "s2:start", "s3:start", "s4:start"]
