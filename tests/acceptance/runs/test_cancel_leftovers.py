"""What a cancelled run leaves behind does not disturb the next one, in the only child process of a
server whose grace period suffices on a busy machine."""

from __future__ import annotations

import time

import pytest
from langgraph_sdk import get_sync_client

from tests.acceptance.runs.test_cancel_nodes import assert_silent, start
from tests.conformance import watched
from tests.conftest import Beats
from tests.processes import is_gone
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def patient_client(patient):
    with watched(get_sync_client(url=patient.url)) as client:
        yield client


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


def test_a_copy_of_the_process_ends_when_its_code_returns(patient_client, beats):
    """It would go on with the run, on the connections of the process that was copied."""
    input_ = {"kind": "return_from_a_copy", "beats": str(beats)}
    patient_client.runs.wait(None, "nodes", input=input_)
    wait_until(lambda: beats.names().count("forked") == 2)
    wait_until(lambda: sum(not is_gone(pid) for pid in beats.pids()) == 1)
    assert beats.names().count("returned") == 1


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
