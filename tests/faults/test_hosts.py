"""Hosts are killed, stopped and cut off with many runs in hand: nothing is lost or done twice.

Each case has a graph of its own: the runs of a graph whose hosts have died twice do not share hosts
for a while.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
import pytest
from langgraph_sdk import get_sync_client

from belay_workers.supervision.processes import is_stopped
from tests.cluster import Cluster
from tests.faults.conftest import QUICK, Probe, mend, pass_time
from tests.long_forms import long_case
from tests.servers import PROJECT
from tests.waiting import wait_until

#: The moments in a host, from the doorbell's arrival to the announcement of the end.
POINTS = ("P3", "P4", "P5", "P7", "P8", "P9", "P10", "P11")
RUNS = {1: "one", 20: "twenty", 200: "many"}
#: A moment and a number of runs. The quick form has some of each.
CASES = [
    (point, runs)
    if (point, runs) in (("P4", 20), ("P8", 20), ("P10", 1))
    else long_case(point, runs)
    for point in POINTS
    for runs in RUNS
]
FAULTS = ("cut-before", "cut-after", "55P03", "40P01")
STATEMENTS = [
    (number, fault)
    if (number, fault) in ((1, "cut-after"), (4, "cut-before"))
    else long_case(number, fault)
    for number in range(1, 9)
    for fault in FAULTS
]
STEPS = ["s1", "s2", "s3", "s4"]


@pytest.fixture(scope="module")
def hosts(scratch):
    """Yield a cluster whose graphs share one host, and whose leases outlast every test."""
    folder = scratch / "host-faults"
    folder.mkdir(parents=True, exist_ok=True)
    project = os.path.relpath(PROJECT.parent, folder)
    names = [f"at-{point}-{runs}" for point in POINTS for runs in RUNS]
    names += [f"statement-{number}-{fault}" for number in range(1, 9) for fault in FAULTS]
    names += ["stopped", "worker", "beside"]
    graphs = dict.fromkeys(names, f"{project}/graphs/probe.py:probe")
    graphs |= dict.fromkeys(("exhausts", "leaves"), f"{project}/graphs/nodes.py:graph")
    config = folder / "langgraph.json"
    config.write_text(json.dumps({"dependencies": [project], "graphs": graphs}))
    settings = {
        **QUICK,
        "BELAY_LEASE_SECONDS": "600",
        "BELAY_ISOLATION": "shared",
        "BELAY_RUN_HOSTS": "1",
        "BELAY_SHARED_CONCURRENCY": "200",
    }
    made = Cluster(folder / "cluster", workers=1, config=config, **settings)
    try:
        yield made.start()
    finally:
        made.stop()


@pytest.fixture
def probe(hosts, tmp_path):
    mend(hosts)
    with get_sync_client(url=hosts.url) as client:
        yield Probe(hosts, client, tmp_path / "history")
    mend(hosts)


def start(probe, graph, runs, **options):
    return [probe.start(graph=graph, **options) for _ in range(runs)]


def assert_all_done_once(probe, started, *, killed=()):
    """Check that all runs succeeded, with each step once in their states, that no two attempts of a
    run were executed at the same time, and that no step was executed three times."""
    for run in started:
        probe.assert_done_once(*run)
    for _, _, tag in started:
        attempts = probe.executions(tag)
        for earlier, later in itertools.pairwise(sorted(attempts, key=lambda one: one.began)):
            assert earlier.ended <= later.began or earlier.pid in killed, attempts
        steps = Counter(probe.starts(tag))
        assert sorted(steps) == STEPS
        assert max(steps.values()) <= 1 + len(killed)


def host_of(probe, tag):
    return probe.wait_for(tag, "s1").pid


@pytest.mark.parametrize(("point", "runs"), CASES)
def test_a_host_killed_at_any_point_loses_nothing(hosts, probe, point, runs):
    started = start(probe, f"at-{point}-{runs}", runs - 1, seconds=0.05, durability="async")
    hosts.plan(point, "kill")
    started += start(probe, f"at-{point}-{runs}", 1, seconds=0.05, durability="async")
    wait_until(hosts.injected, 60, "the run to get there")
    pid = int(hosts.injected()[0][3])
    assert_all_done_once(probe, started, killed=[pid])


@pytest.mark.parametrize(("number", "fault"), STATEMENTS)
def test_statements_of_a_host_that_fail_are_done_once(hosts, probe, number, fault):
    """The connection is cut before or after a statement of many runs, or the statement fails."""
    graph = f"statement-{number}-{fault}"
    started = start(probe, graph, 1, seconds=0.02)
    host_of(probe, started[0][2])
    hosts.plan("statements", f"belay child {number} {fault}")
    started += start(probe, graph, 19, seconds=0.02)
    assert_all_done_once(probe, started)


@pytest.mark.parametrize("seconds", [1, long_case(30)])
def test_the_runs_of_a_stopped_host_go_on_with_it(probe, seconds):
    started = start(probe, "stopped", 20, seconds=0.2)
    pid = host_of(probe, started[-1][2])
    os.kill(pid, signal.SIGSTOP)
    pass_time(seconds)
    os.kill(pid, signal.SIGCONT)
    assert_all_done_once(probe, started)


@pytest.mark.long
def test_the_runs_of_a_host_that_is_stopped_during_a_step_go_on_with_it(probe):
    """The step does not count as one that blocks the event loop for more than 5 s. New runs do not
    wait for the host."""
    started = start(probe, "stopped", 19, seconds=0.2)
    started += start(probe, "stopped", 1, seconds=0.2, input={"stops": True})
    pid = probe.wait_for(started[-1][2], "s2").pid
    wait_until(lambda: is_stopped(pid), 30, "the stop")
    pass_time(10)
    for run in start(probe, "stopped", 5):
        probe.assert_done_once(*run)
    assert is_stopped(pid)
    os.kill(pid, signal.SIGCONT)
    assert_all_done_once(probe, started)


@contextmanager
def memory_limit(worker, most: int) -> Iterator[list[int]]:
    """Kill each process of a worker that has more than so many bytes, as the kernel does where
    memory is short. Yield the ids of those killed."""
    killed: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            for process in worker.children():
                with suppress(psutil.Error):
                    if process.memory_info().rss > most:
                        killed.append(process.pid)
                        process.kill()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield killed
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("action", ["interrupt", long_case("rollback")])
def test_what_a_run_has_left_ends_with_a_cancel_before_its_end(hosts, probe, beats, action):
    """The cancel was accepted in time, and what the graph had left went on."""
    beside = start(probe, "beside", 3, seconds=0.5)
    host_of(probe, beside[0][2])
    probe.cancel_before_its_end_is_written("leaves", beats, action)
    assert_all_done_once(probe, beside)


@pytest.mark.long
def test_runs_beside_one_that_exhausts_the_memory_succeed(hosts, probe):
    """That run ends as an error when its attempts are used up."""
    with memory_limit(hosts.workers[0], 600_000_000) as killed:
        started = start(probe, "beside", 100, seconds=0.5, durability="async")
        host_of(probe, started[0][2])
        thread_id = probe.client.threads.create()["thread_id"]
        input_ = {"kind": "exhaust_memory"}
        run_id = probe.client.runs.create(thread_id, "exhausts", input=input_)["run_id"]
        assert_all_done_once(probe, started, killed=killed)
        assert probe.wait_until_over(thread_id, run_id, 120) == "error"
    assert probe.row(run_id)["error"]["error"] == "MaxAttemptsExceeded"
    assert len(set(killed)) >= 3


@pytest.mark.long
def test_the_runs_of_a_killed_worker_go_on_in_another(make_cluster, tmp_path):
    shared = {"BELAY_ISOLATION": "shared", "BELAY_RUN_HOSTS": "1"}
    cluster = make_cluster(workers=2, **shared)
    with get_sync_client(url=cluster.url) as client:
        probe = Probe(cluster, client, tmp_path / "history")
        started = start(probe, "probe", 100, seconds=0.3)
        pids = {host_of(probe, started[0][2])}
        worker, _ = probe.worker_of(pids.pop())
        children = [child.pid for child in worker.children()]
        worker.kill()
        assert_all_done_once(probe, started, killed=children)
