"""A cancel stops every kind of node. This is verified in the node, not through the API."""

from __future__ import annotations

import time

import psutil
import pytest
from langgraph_sdk import get_sync_client

from tests.conformance import watched
from tests.conftest import Beats
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


@pytest.fixture(scope="module")
def patient_client(make_server):
    """Yield a client of a server whose grace period suffices on a busy machine."""
    live = make_server("patient", BELAY_CANCEL_GRACE_MS="20000").start("--concurrency", "1")
    with watched(get_sync_client(url=live.url)) as client:
        yield client
    live.stop()


@pytest.mark.parametrize("kind", ["time_sleep", "async_sleep"])
def test_a_sleeping_node_gets_an_exception_and_its_finally_runs(patient_client, beats, kind):
    thread_id, run_id = start(patient_client, kind, beats)
    beats.wait_for("asleep")
    patient_client.runs.cancel(thread_id, run_id, wait=True)
    assert "finally" in beats.names()


def test_an_idle_thread_of_an_earlier_run_does_not_delay_a_cancel(patient_client, beats, tmp_path):
    """The only child would be killed after its grace, if the thread counted as the run's work."""
    input_ = {"kind": "use_thread_pool", "beats": str(tmp_path / "first")}
    patient_client.runs.wait(None, "nodes", input=input_)
    thread_id, run_id = start(patient_client, "async_sleep", beats)
    patient_client.runs.cancel(thread_id, run_id, wait=True)
    input_["beats"] = str(tmp_path / "third")
    patient_client.runs.wait(None, "nodes", input=input_)
    assert Beats(tmp_path / "third").pids() == beats.pids()


@pytest.mark.parametrize("kind", ["beating_subprocess", "leave_daemon"])
def test_a_subprocess_is_killed_without_its_child(patient_client, beats, tmp_path, kind):
    """Also while a thread of asyncio's waits for it. The child would be killed after its grace."""
    pids = []
    for name in ("before", "after"):
        input_ = {"kind": "use_thread_pool", "beats": str(tmp_path / name)}
        patient_client.runs.wait(None, "nodes", input=input_)
        pids.append(Beats(tmp_path / name).pids())
        if name == "before":
            thread_id, run_id = start(patient_client, kind, beats)
            patient_client.runs.cancel(thread_id, run_id, wait=True)
            assert_silent(beats)
    assert pids[0] == pids[1]


@pytest.mark.parametrize("kind", ["lower_limits", "shut_down_executor"])
def test_a_run_does_not_leave_the_next_one_less_than_it_needs(patient_client, beats, kind):
    """The server has one child: the next run would be executed in the same process."""
    input_ = {"kind": kind, "beats": str(beats)}
    patient_client.runs.wait(None, "nodes", input=input_, raise_error=False)
    assert "left" in beats.names()
    steps = patient_client.runs.wait(None, "sync_steps", input={"seconds": 0})
    assert steps["steps"] == ["s1", "s2", "s3", "s4"]
    thread_id, run_id = start(patient_client, "time_sleep", beats)
    beats.wait_for("asleep")
    patient_client.runs.cancel(thread_id, run_id, wait=True)
    assert "finally" in beats.names()


def test_a_cancel_during_an_import_does_not_break_the_next_one(patient_client, beats):
    """The package would be left without the modules that it had imported."""
    thread_id = patient_client.threads.create()["thread_id"]
    input_ = {"kind": "import_slowly", "beats": str(beats), "seconds": 60}
    run = patient_client.runs.create(thread_id, "nodes", input=input_)
    beats.wait_for("importing")
    time.sleep(0.1)  # let it begin; without this, the test would pass for another reason
    patient_client.runs.cancel(thread_id, run["run_id"], wait=True)
    again = patient_client.runs.wait(None, "nodes", input={**input_, "seconds": 0})
    assert again["method"] == "whole"


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
