"""What a node has started ends with its run, whichever process ends or is killed."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

import httpx
import psutil
import pytest

from tests.conftest import Beats
from tests.faults.conftest import mend
from tests.long_forms import long_case
from tests.processes import is_gone
from tests.waiting import wait_until

DAEMONS = ("wait_for_subprocess", "leave_daemon")


@pytest.fixture(autouse=True)
def nothing_left(cluster):
    """Cancel all runs, so that none takes a slot from the following tests."""
    yield
    mend(cluster)
    url = f"{cluster.url}/runs/cancel"
    wait_until(
        lambda: httpx.post(url, json={"status": "all"}, timeout=60).status_code == 404,
        60,
        "nothing to be left to cancel",
    )


def start(client, kind, beats, **given):
    thread_id = client.threads.create()["thread_id"]
    run = client.runs.create(
        thread_id, "nodes", input={"kind": kind, "beats": str(beats), **given}, durability="sync"
    )
    return thread_id, run["run_id"]


def child_of(cluster, pid: int) -> tuple:
    """Return the worker and the child above a process that a node has started."""
    above = {process.pid for process in psutil.Process(pid).parents()}
    for worker in cluster.workers:
        for child in zygote_of(worker).children():
            if child.pid in above:
                return worker, child
    raise AssertionError(f"{pid} is below no worker")


def guardian_and_zygote(worker) -> tuple[psutil.Process, psutil.Process]:
    """Return the two processes that a worker's parent has started itself. The guardian leads a
    session."""

    def found():
        children = psutil.Process(worker.pid).children()
        with suppress(ProcessLookupError):  # one has just been killed
            leads = {child: os.getsid(child.pid) == child.pid for child in children}
            if sorted(leads.values()) == [False, True]:
                return sorted(leads, key=leads.get, reverse=True)
        return None

    guardian, zygote = wait_until(found, 30, "a worker that has started")
    return guardian, zygote


def zygote_of(worker) -> psutil.Process:
    return guardian_and_zygote(worker)[1]


def started_by_nodes(beats) -> set[int]:
    """Return the pids of processes that wrote beats; the child itself writes only `begin`."""
    words = [line.split() for line in beats.lines()]
    return {int(pid) for name, pid, *_ in words if name in ("beat", "pooled")}


def daemon_of(beats) -> int:
    beats.wait_for("beat", 3)
    [daemon] = started_by_nodes(beats)
    return daemon


@pytest.mark.parametrize("kind", DAEMONS)
def test_a_subprocess_ends_with_a_child_that_was_killed_from_outside(
    cluster, client, probe, beats, kind
):
    thread_id, run_id = start(client, kind, beats)
    first = daemon_of(beats)
    _, child = child_of(cluster, first)
    os.kill(child.pid, signal.SIGKILL)
    # Attempt 2 starts only after the processes that attempt 1 had started are gone.
    wait_until(lambda: len(started_by_nodes(beats)) > 1, 30, "another attempt")
    assert is_gone(first)
    client.runs.cancel(thread_id, run_id, wait=True)
    left = [pid for pid in started_by_nodes(beats) if not is_gone(pid)]
    assert left == []


@pytest.mark.parametrize("kind", DAEMONS)
def test_a_subprocess_has_ended_when_the_cancel_of_a_killed_child_has(
    cluster, client, probe, beats, kind
):
    thread_id, run_id = start(client, kind, beats)
    daemon = daemon_of(beats)
    worker, child = child_of(cluster, daemon)
    worker.send(signal.SIGSTOP)
    try:
        client.runs.cancel(thread_id, run_id)
        os.kill(child.pid, signal.SIGKILL)
    finally:
        worker.send(signal.SIGCONT)
    assert probe.wait_until_over(thread_id, run_id) == "interrupted"
    assert is_gone(daemon)


@pytest.mark.parametrize("kind", [DAEMONS[0], *map(long_case, (*DAEMONS[1:], "use_pool"))])
def test_a_subprocess_ends_with_a_killed_worker(cluster, client, beats, kind):
    thread_id, run_id = start(client, kind, beats)
    word = "pooled" if kind == "use_pool" else "beat"
    beats.wait_for(word, 3)
    started = started_by_nodes(beats)
    worker, _ = child_of(cluster, next(iter(started)))
    everybody = {child.pid for child in worker.children()}
    worker.kill()
    wait_until(lambda: all(map(is_gone, started | everybody)), 20, "all of it to end")
    client.runs.cancel(thread_id, run_id, wait=True)


def test_the_guardian_is_replaced_when_it_is_killed(cluster, client, beats):
    worker = cluster.workers[0]

    first, _ = guardian_and_zygote(worker)
    first.kill()
    wait_until(lambda: guardian_and_zygote(worker)[0] != first, 20, "another guardian")
    start(client, "leave_daemon", beats)
    daemon = daemon_of(beats)
    owner, _ = child_of(cluster, daemon)
    owner.kill()
    wait_until(lambda: is_gone(daemon), 20, "the daemon to end")


def test_a_zygote_that_is_killed_is_replaced(cluster, client, probe, beats):
    thread_id, run_id = start(client, "leave_daemon", beats)
    daemon = daemon_of(beats)
    worker, child = child_of(cluster, daemon)
    zygote = zygote_of(worker)
    zygote.kill()
    wait_until(lambda: len(started_by_nodes(beats)) > 1, 30, "another attempt")
    assert is_gone(daemon)
    assert is_gone(child.pid)
    client.runs.cancel(thread_id, run_id, wait=True)
    wait_until(lambda: zygote_of(worker) != zygote, 20, "another zygote")
    for _ in range(8):  # this worker executes some of them
        probe.assert_done_once(*probe.start())
    wait_until(zygote_of(worker).children, 20, "children of the new zygote")


def test_a_daemon_ends_with_a_successful_run(cluster, client, beats):
    thread_id, run_id = start(client, "leave_daemon", beats, seconds=0.5)
    client.runs.join(thread_id, run_id)
    assert client.runs.get(thread_id, run_id)["status"] == "success"
    assert started_by_nodes(beats)
    assert all(map(is_gone, started_by_nodes(beats)))


@pytest.mark.long
def test_a_subprocess_outlives_its_run_if_so_configured(make_cluster, tmp_path, beats):
    from langgraph_sdk import get_sync_client

    kept = make_cluster(workers=1, concurrency=1, BELAY_KEEP_SUBPROCESSES="1")
    with get_sync_client(url=kept.url) as client:
        thread_id, run_id = start(client, "leave_daemon", beats, seconds=0.5)
        client.runs.join(thread_id, run_id)
        [daemon] = started_by_nodes(beats)
        assert not is_gone(daemon)
        # It is no part of the next run: a cancel does not wait for it and then kill the child.
        next_beats = Beats(tmp_path / "next")
        thread_id, run_id = start(client, "async_sleep", next_beats)
        next_beats.wait_for("begin")
        client.runs.cancel(thread_id, run_id, wait=True)
        assert not is_gone(daemon)
        [child] = next_beats.pids()
        assert psutil.pid_exists(child)
    kept.stop()
    assert is_gone(daemon)


@pytest.mark.parametrize("method", ["fork", long_case("spawn"), long_case("forkserver")])
def test_a_node_may_use_multiprocessing(client, beats, method):
    input_ = {"kind": "use_pool", "beats": str(beats), "seconds": 0.2, "method": method}
    values = client.runs.wait(None, "nodes", input=input_)
    assert len(values["pids"]) == 2
    wait_until(lambda: all(map(is_gone, started_by_nodes(beats))), 10, "the pool to end")


def test_a_multiprocessing_pool_ends_with_a_cancel(client, beats):
    thread_id, run_id = start(client, "use_pool", beats)
    beats.wait_for("pooled", 4)
    client.runs.cancel(thread_id, run_id, wait=True)
    assert all(map(is_gone, started_by_nodes(beats)))
    assert client.runs.get(thread_id, run_id)["status"] == "interrupted"


def test_a_node_that_closes_every_descriptor_fails_only_its_run(cluster, client, probe, beats):
    thread_id, run_id = start(client, "close_descriptors", beats)
    probe.wait_until_over(thread_id, run_id, seconds=60)
    assert client.runs.get(thread_id, run_id)["status"] == "error"
    assert client.runs.wait(None, "counter", input={"count": 1}) == {"count": 2}
