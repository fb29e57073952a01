"""Runs that share a host: each is stopped by itself, and its neighbours go on."""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from contextlib import suppress

import httpx
import pytest
from langgraph_sdk import get_sync_client

from tests.acceptance.runs.test_cancel_nodes import assert_silent
from tests.conformance import watched
from tests.conftest import Beats
from tests.long_forms import long_case
from tests.servers import PROJECT
from tests.waiting import wait_until

#: They end when asked to, or what they leave is ended.
COOPERATIVE = [
    *("async_sleep", "async_beats", "chain_timers", "restart_tasks", "sub_async_beats"),
    *("fan_async_beats", "drop_generator", "beating_subprocess", "beating_fork"),
    "escape_context",
]
#: The host freezes or interrupts them.
STUBBORN = ["swallow_async", "block_loop", "fan_swallow_async"]
#: Their host is killed: they are on threads, or hold the GIL.
FATAL = [
    *("hold_gil", "swallow_sync", "start_raw_thread", "spin", "leave_daemon"),
    "wait_for_subprocess",
]
ALL = COOPERATIVE + STUBBORN + FATAL
QUICK = [
    "escape_context",
    "async_beats",
    "beating_subprocess",
    "beating_fork",
    "swallow_async",
    "block_loop",
    "swallow_sync",
]
#: Each is a graph of its own, which no other test has isolated.
BAD = ["block_loop", "swallow_async", "hold_gil", "restart_tasks"]
KINDS = [kind if kind in QUICK else long_case(kind) for kind in ALL]
NEIGHBOURS = 5


@pytest.fixture(scope="module")
def hosts(make_server, tmp_path_factory):
    """A server whose graphs share one host. Each kind of node is a graph of its own, as a graph
    whose run had to be killed does not share hosts any more."""
    folder = tmp_path_factory.mktemp("hosts")
    project = os.path.relpath(PROJECT.parent, folder)
    graphs = dict.fromkeys(ALL, f"{project}/graphs/nodes.py:graph")
    graphs |= {
        "isolated": f"{project}/graphs/nodes.py:graph",
        "blocks": f"{project}/graphs/nodes.py:graph",
        "hold_lock": f"{project}/graphs/nodes.py:graph",
        "share_call": f"{project}/graphs/nodes.py:graph",
        "break_log": f"{project}/graphs/nodes.py:graph",
        "attack_process": f"{project}/graphs/nodes.py:graph",
        "steps": f"{project}/graphs/steps.py:steps",
        "alone": f"{project}/graphs/steps.py:sync_steps",
        "hostile": f"{project}/graphs/hostile.py:graph_async",
        "leaves": f"{project}/graphs/simple.py:leaves_async",
        **{f"beside_many_{kind}": f"{project}/graphs/nodes.py:graph" for kind in BAD},
    }
    config = folder / "langgraph.json"
    isolation = {"steps": "auto", "alone": "auto"}  # asynchronous and synchronous nodes
    document = {"dependencies": [project], "graphs": graphs, "isolation": isolation}
    config.write_text(json.dumps(document))
    settings = {"BELAY_ISOLATION": "shared", "BELAY_RUN_HOSTS": "1"}
    live = make_server("hosts", config=config, **settings).start()
    yield live
    live.stop()


@pytest.fixture
def client(hosts):
    with watched(get_sync_client(url=hosts.url)) as client:
        yield client


def start(client, graph, input_):
    thread_id = client.threads.create()["thread_id"]
    return thread_id, client.runs.create(thread_id, graph, input=input_)["run_id"]


def start_neighbours(client, tmp_path, *, seconds=0.4, count=NEIGHBOURS):
    """Start runs of four steps. Return them with the files of their beats."""
    found = []
    for number in range(count):
        path = tmp_path / f"neighbour{number}"
        found.append((*start(client, "steps", {"seconds": seconds, "beats": str(path)}), path))
    for *_, path in found:
        deadline = time.monotonic() + 60
        while not path.exists():
            assert time.monotonic() < deadline, "a neighbour has not started"
            time.sleep(0.02)
    return found


def assert_unharmed(client, neighbours, *, repeats: int):
    """Check that neighbours ended as they do alone. Steps may have been repeated so many times."""
    for thread_id, run_id, path in neighbours:
        assert client.runs.join(thread_id, run_id)["steps"] == ["s1", "s2", "s3", "s4"]
        assert client.runs.get(thread_id, run_id)["status"] == "success"
        starts = [line.split()[0] for line in path.read_text().splitlines() if ":start" in line]
        assert sorted(set(starts)) == ["s1:start", "s2:start", "s3:start", "s4:start"]
        # What was not stored yet when a host was killed is repeated, such as the last two steps.
        assert max(Counter(starts).values()) <= 1 + repeats


@pytest.mark.parametrize("action", ["interrupt", long_case("rollback")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_stopped_and_its_neighbours_go_on(client, beats, tmp_path, kind, action):
    neighbours = start_neighbours(client, tmp_path)
    input_ = {"kind": kind, "beats": str(beats)}
    thread_id, run_id = start(client, kind, input_)
    beats.wait_for({"async_sleep": "asleep", "drop_generator": "begin"}.get(kind, "beat"))
    client.runs.cancel(thread_id, run_id, wait=True, action=action)
    assert_silent(beats)
    statuses = [run["status"] for run in client.runs.list(thread_id)]
    assert statuses == (["interrupted"] if action == "interrupt" else [])
    assert_unharmed(client, neighbours, repeats=1)


def test_the_runs_share_a_process_and_others_do_not(client, tmp_path):
    paths = [tmp_path / str(number) for number in range(4)]
    runs = [start(client, "steps", {"seconds": 0.05, "beats": str(path)}) for path in paths]
    runs.append(start(client, "alone", {"seconds": 0.05, "beats": str(tmp_path / "alone")}))
    for thread_id, run_id in runs:
        client.runs.join(thread_id, run_id)
    pids = [{line.split()[1] for line in path.read_text().splitlines()} for path in paths]
    assert len(set.union(*pids)) == 1
    alone = {line.split()[1] for line in (tmp_path / "alone").read_text().splitlines()}
    assert alone.isdisjoint(set.union(*pids))


def placement_of(hosts, client, graph):
    assistant_id = client.assistants.search(graph_id=graph)[0]["assistant_id"]
    answer = httpx.get(f"{hosts.url}/assistants/{assistant_id}", timeout=30)
    return answer.headers["x-belay-placement"]


def test_the_api_shows_where_runs_are_executed_and_why(hosts, client, tmp_path):
    steps, alone = (placement_of(hosts, client, graph) for graph in ("steps", "alone"))
    assert steps == 'shared; reason="all nodes are asynchronous"'
    assert alone == 'process; reason="the node s1 is synchronous"'

    def reported():
        path = tmp_path / f"beats{time.monotonic()}"
        thread_id, run_id = start(client, "isolated", {"kind": "swallow_sync", "beats": str(path)})
        wait_until(path.exists, 30, "the run")
        client.runs.cancel(thread_id, run_id, wait=True)
        found = placement_of(hosts, client, "isolated")
        return found if "isolated-by" in found else None

    found = wait_until(reported, 60, "the report")  # a worn host takes no run
    assert re.search(r'; isolated-by="[^"]+: a run did not stop when asked \(cancel\)"$', found)


def test_an_error_of_a_run_is_its_own(client, tmp_path):
    neighbours = start_neighbours(client, tmp_path)
    thread_id, run_id = start(client, "hostile", {"message": "no"})
    client.runs.join(thread_id, run_id)
    assert client.runs.get(thread_id, run_id)["status"] == "error"
    assert_unharmed(client, neighbours, repeats=0)


def test_a_run_that_waits_for_what_a_stopped_one_has_started_is_repeated(client, tmp_path):
    runs = []
    for name, seconds in (("first", 60), ("second", 0)):
        beats = Beats(tmp_path / name)
        input_ = {"kind": "share_call", "beats": str(beats), "seconds": seconds}
        runs.append((*start(client, "share_call", input_), beats))
        beats.wait_for("waiting")
    (thread_id, run_id, _), (other_thread, other_run, beats) = runs
    client.runs.cancel(thread_id, run_id, wait=True)
    client.runs.join(other_thread, other_run)
    assert client.runs.get(thread_id, run_id)["status"] == "interrupted"
    assert client.runs.get(other_thread, other_run)["status"] == "success"
    assert beats.names() == ["begin", "waiting", "waiting", "shared"]


def test_stops_of_others_are_not_attempts_of_a_run_that_waits_for_them(client, tmp_path):
    """Runs that wait for one another in turn end well however often the first one is stopped."""
    waiting = Beats(tmp_path / "waiting")
    found = start(client, "share_call", {"kind": "wait_for_call", "beats": str(waiting)})
    for number in range(5):  # more than a run has attempts
        beats = Beats(tmp_path / str(number))
        input_ = {"kind": "share_call", "beats": str(beats), "seconds": 60}
        first = start(client, "share_call", input_)
        wait_until(lambda n=number: waiting.names().count("waiting") > n, 30, "the wait")
        client.runs.cancel(*first, wait=True)
    last = {"kind": "share_call", "beats": str(tmp_path / "last"), "seconds": 0.1}
    start(client, "share_call", last)
    client.runs.join(*found)
    assert client.runs.get(*found)["status"] == "success"
    assert waiting.names() == ["begin", *["waiting"] * 6, "shared"]


def test_a_run_cannot_break_the_log_of_its_host(client):
    for _ in range(2):
        found = start(client, "break_log", {"kind": "break_log"})
        client.runs.join(*found)
        assert client.runs.get(*found)["status"] == "success"
    thread_id, run_id = start(client, "hostile", {"message": "its own error"})
    client.runs.join(thread_id, run_id)
    assert client.runs.get(thread_id, run_id)["status"] == "error"
    assert "its own error" in str(client.threads.get_state(thread_id)["tasks"])


def test_a_run_cannot_end_its_host_nor_its_neighbours_tasks(client, beats, tmp_path):
    neighbours = start_neighbours(client, tmp_path)
    input_ = {"kind": "attack_process", "beats": str(beats)}
    thread_id, run_id = start(client, "attack_process", input_)
    client.runs.join(thread_id, run_id)
    assert client.runs.get(thread_id, run_id)["status"] == "error"  # it has cancelled itself, too
    assert beats.names() == ["begin", "beat"]
    assert_unharmed(client, neighbours, repeats=0)


def test_all_are_stopped_by_one_call(client, tmp_path):
    neighbours = start_neighbours(client, tmp_path, seconds=60)
    client.runs.cancel_many(status="running")
    for thread_id, run_id, _path in neighbours:
        client.runs.join(thread_id, run_id)
        assert client.runs.get(thread_id, run_id)["status"] == "interrupted"


def test_the_states_of_many_runs_that_stop_at_once_are_read_on_demand(client, tmp_path):
    """Each is what it would be if the run had been stopped alone."""

    def stopped(count):
        runs = start_neighbours(client, tmp_path, seconds=60, count=count)
        client.runs.cancel_many(status="running")
        found = []
        for thread_id, run_id, path in runs:
            path.unlink()
            values = client.runs.join(thread_id, run_id)
            thread, state = client.threads.get(thread_id), client.threads.get_state(thread_id)
            for one in (values, thread["values"], state["values"]):
                assert one.pop("beats") == str(path)
            states = (values, thread["values"], state["values"])
            found.append((states, thread["status"], state["next"]))
        return found

    [alone] = stopped(1)
    assert alone[1:] == ("interrupted", ["s1"])
    assert stopped(25) == [alone] * 25


def test_a_killed_host_loses_nothing(client, tmp_path):
    neighbours = start_neighbours(client, tmp_path)
    pid = int(neighbours[0][2].read_text().split()[1])
    os.kill(pid, 9)
    assert_unharmed(client, neighbours, repeats=1)


@pytest.mark.long
def test_a_lock_of_a_frozen_run_does_not_hold_up_its_neighbours(client, beats, tmp_path):
    """The host of a frozen run is replaced, and with it the lock."""
    holder = {"kind": "hold_lock", "beats": str(beats), "seconds": 1}
    thread_id, run_id = start(client, "hold_lock", holder)
    beats.wait_for("beat")
    waits = {"kind": "hold_lock", "beats": str(tmp_path / "waits")}
    waiting = [start(client, "hold_lock", waits) for _ in range(3)]
    client.runs.cancel(thread_id, run_id, wait=True)
    for thread_id, run_id in waiting:
        client.runs.join(thread_id, run_id)
        assert client.runs.get(thread_id, run_id)["status"] == "success"


@pytest.mark.long
def test_a_run_that_blocks_its_host_does_not_hold_up_its_neighbours(client, beats, tmp_path):
    """Nobody has cancelled it. It goes on in a process of its own."""
    neighbours = start_neighbours(client, tmp_path)
    thread_id, run_id = start(client, "blocks", {"kind": "block_loop", "beats": str(beats)})
    beats.wait_for("beat")
    assert_unharmed(client, neighbours, repeats=1)
    beats.wait_for("beat", count=2)
    assert len(beats.pids()) == 2
    client.runs.cancel(thread_id, run_id, wait=True)
    assert client.runs.get(thread_id, run_id)["status"] == "interrupted"


@pytest.mark.long
def test_bad_neighbours_harm_none_of_a_hundred_runs(client, tmp_path):
    """One blocks the event loop, one cannot be asked to stop, one holds the GIL, one leaves tasks,
    one calls `sys.exit`, and at last their host is killed, as for want of memory."""
    neighbours = start_neighbours(client, tmp_path, seconds=5, count=100)
    for kind in BAD:
        beats = Beats(tmp_path / f"bad_{kind}")
        thread_id, run_id = start(
            client, f"beside_many_{kind}", {"kind": kind, "beats": str(beats)}
        )
        beats.wait_for("beat", seconds=60)
        client.runs.cancel(thread_id, run_id, wait=True)
        assert_silent(beats)
        assert client.runs.get(thread_id, run_id)["status"] == "interrupted"
    thread_id, run_id = start(client, "leaves", {"count": 1})
    client.runs.join(thread_id, run_id)
    assert client.runs.get(thread_id, run_id)["status"] == "error"
    last = max(neighbours, key=lambda one: one[2].stat().st_mtime)
    with suppress(ProcessLookupError):
        os.kill(int(last[2].read_text().splitlines()[-1].split()[1]), 9)
    assert_unharmed(client, neighbours, repeats=len(BAD) + 1)
