"""Redis is killed, emptied, hangs, is full or read-only: work is delayed, and nothing is lost."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager

import httpx
import pytest
import redis
from langgraph_sdk import get_sync_client

from tests.faults.conftest import Probe, pass_time, signal_tree
from tests.long_forms import full_case, long_case
from tests.waiting import wait_until


@contextmanager
def trouble(cluster, kind: str):
    """Put Redis into one kind of failure until the context exits."""
    if kind == "killed":
        cluster.valkey.kill()
        yield
        cluster.valkey.start()
    elif kind == "hangs":
        signal_tree(cluster.valkey, signal.SIGSTOP)
        yield
        signal_tree(cluster.valkey, signal.SIGCONT)
    elif kind == "emptied":
        with bus(cluster) as client:
            client.flushall()
        yield
        with bus(cluster) as client:
            client.flushall()
    elif kind == "full":
        with bus(cluster) as client:
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", "1")
        try:
            yield
        finally:
            with bus(cluster) as client:
                client.config_set("maxmemory", "0")
    elif kind == "read-only":
        with bus(cluster) as client:
            client.replicaof("127.0.0.1", 1)
        try:
            yield
        finally:
            with bus(cluster) as client:
                client.replicaof("NO", "ONE")


def bus(cluster) -> redis.Redis:
    return redis.Redis.from_url(cluster.valkey.url, socket_timeout=5)


@pytest.mark.parametrize(
    "kind", ["killed", *map(long_case, ("emptied", "hangs", "full", "read-only"))]
)
def test_runs_joins_and_streams_end_correctly_despite_an_outage(cluster, probe, kind):
    """Runs accepted before continue and end; those accepted meanwhile start when Redis is back."""
    running = probe.start(seconds=0.6, stream_resumable=True)
    probe.wait_for(running[2], "s1")
    answers: dict[str, object] = {}

    def wait() -> None:
        url = f"{cluster.url}/threads/{running[0]}/runs/{running[1]}/join"
        answers["join"] = httpx.get(url, timeout=60).json()["done"]

    def stream() -> None:
        url = f"{cluster.url}/threads/{running[0]}/runs/{running[1]}/stream"
        with httpx.stream("GET", url, timeout=60, headers={"Last-Event-ID": "0"}) as answer:
            answers["stream"] = [line for line in answer.iter_lines() if line.startswith("id: ")]

    listeners = [threading.Thread(target=listen) for listen in (wait, stream)]
    for listener in listeners:
        listener.start()
    with trouble(cluster, kind):
        accepted = probe.start(seconds=0.02)
        probe.wait_for(running[2], "s4", "end")
        assert probe.wait_until_over(running[0], running[1]) == "success"
        for listener in listeners:
            listener.join(20)
        assert not any(listener.is_alive() for listener in listeners)
    probe.assert_done_once(*running)
    assert probe.row(running[1])["attempts"] == 1
    assert answers["join"] == [f"{running[2]}:s{n}" for n in (1, 2, 3, 4)]
    assert len(set(answers["stream"])) == len(answers["stream"])
    # Every worker consumes again without help.
    probe.assert_done_once(*accepted)
    assert all(worker.is_running for worker in cluster.workers)
    seen = set()

    def all_workers_consume() -> bool:
        run = probe.start()
        probe.assert_done_once(*run)
        seen.add(probe.worker_of(probe.beats(run[2])[0].pid)[0].name)
        return len(seen) == len(cluster.workers)

    wait_until(all_workers_consume, 30, "every worker to take runs again")


def lines_of(cluster, run, last_event_id="-1"):
    """Return the lines of a run's stream, from after an event to the end."""
    url = f"{cluster.url}/threads/{run[0]}/runs/{run[1]}/stream"
    headers = {"Last-Event-ID": last_event_id}
    with httpx.stream("GET", url, timeout=60, headers=headers) as answer:
        assert answer.status_code == 200
        return list(answer.iter_lines())


def assert_whole_or_marked(lines):
    """Check that a stream has the updates of all four steps, or says that events are missing."""
    assert lines.count("event: updates") == 4 or ": gap" in lines, lines


@pytest.mark.parametrize("last_step", ["s4", long_case("s2")])
def test_a_resumable_stream_misses_no_event_unnoticed(cluster, probe, last_step):
    """Redis is killed, and is back at once or only after the end."""
    options = {"seconds": 0.4, "stream_resumable": True, "stream_mode": ["updates", "values"]}
    run = probe.start(**options)
    probe.wait_for(run[2], "s3")
    cluster.valkey.kill()
    cluster.valkey.start()
    assert_whole_or_marked(lines_of(cluster, run))
    run = probe.start(**options)
    probe.wait_for(run[2], last_step)
    with trouble(cluster, "killed"):
        assert probe.wait_until_over(run[0], run[1]) == "success"
        assert ": gap" in lines_of(cluster, run)
        assert ": gap" in lines_of(cluster, run, "1-1")
    assert_whole_or_marked(lines_of(cluster, run))


def test_a_stream_whose_log_redis_has_lost_says_so(cluster, probe):
    run = probe.start(seconds=0.01, stream_resumable=True, stream_mode=["updates"])
    assert probe.wait_until_over(run[0], run[1]) == "success"
    wait_until(lambda: lines_of(cluster, run).count("event: updates") == 4, 10, "the whole log")
    assert ": gap" not in lines_of(cluster, run)
    with bus(cluster) as client:
        client.flushall()
    assert ": gap" in lines_of(cluster, run)


@pytest.mark.parametrize(
    ("kind", "action"),
    [
        ("killed", "interrupt"),
        ("hangs", "rollback"),
        ("full", "interrupt"),
        full_case("killed", "rollback"),
        full_case("hangs", "interrupt"),
        full_case("full", "rollback"),
    ],
)
def test_a_cancel_accepted_during_an_outage_takes_effect(cluster, probe, kind, action):
    thread_id, run_id, tag = probe.start(seconds=20, graph="probe")
    probe.wait_for(tag, "s1")
    with trouble(cluster, kind):
        url = f"{cluster.url}/threads/{thread_id}/runs/{run_id}/cancel"
        answer = httpx.post(url, params={"action": action}, timeout=30)
        assert answer.status_code == 202
        expected = "interrupted" if action == "interrupt" else None
        assert probe.wait_until_over(thread_id, run_id) == expected
    assert probe.starts(tag) == ["s1"]


@pytest.mark.parametrize("kind", ["killed", full_case("full")])
@pytest.mark.parametrize("seconds", [0, full_case(60)])
def test_runs_created_during_an_outage_start_when_redis_is_back(cluster, probe, kind, seconds):
    with trouble(cluster, kind):
        runs = [probe.start() for _ in range(20)]
        pass_time(seconds)
        assert {probe.status(run[0], run[1]) for run in runs} <= {"pending", "running", "success"}
    for run in runs:
        probe.assert_done_once(*run)
        assert probe.starts(run[2]) == ["s1", "s2", "s3", "s4"]


@pytest.mark.long
def test_a_worker_stopped_while_redis_is_unavailable_drains_and_exits(cluster, probe):
    thread_id, run_id, tag = probe.start(seconds=0.5)
    beat = probe.wait_for(tag, "s1")
    worker, other = probe.worker_of(beat.pid)
    with trouble(cluster, "killed"):
        assert worker.stop() == 0
        # Its run has finished within the grace period, or was put back.
        assert probe.status(thread_id, run_id) in ("success", "pending", "running")
    probe.assert_done_once(thread_id, run_id, tag)
    assert probe.row(run_id)["attempts"] == 1
    assert other.is_running


@pytest.mark.long
@pytest.mark.parametrize("away", [False, full_case(True)])
def test_a_worker_that_has_stopped_consuming_exits_to_be_restarted(make_cluster, tmp_path, away):
    """The process, its supervisor and its sweeper work, but no message arrives. A busy worker, or
    one whose broker was unavailable, does not exit."""
    cluster = make_cluster(workers=1, concurrency=1, BELAY_LIVENESS_SECONDS="0.8")
    worker = cluster.workers[0]
    with get_sync_client(url=cluster.url) as client:
        probe = Probe(cluster, client, tmp_path / "history")
        probe.assert_done_once(*probe.start(seconds=0.5))  # the only child is busy
        if away:
            with trouble(cluster, "killed"):
                wait_until(lambda: worker.text().count("ping not sent") >= 2, 30, "missed pings")
        probe.assert_done_once(*probe.start())
        assert "does not consume" not in worker.text()
        (cluster.faults / "stall").touch()
        wait_until(lambda: "did not arrive" in worker.text(), 20, "the stall to be noticed")
        waiting = probe.start()
        wait_until(lambda: not worker.is_running, 30, "the worker to end itself")
        assert worker.process.returncode == 75
        assert "does not consume any more" in worker.text()
        assert probe.status(waiting[0], waiting[1]) == "pending"
        (cluster.faults / "stall").unlink()
        cluster.restart(worker)
        probe.assert_done_once(*waiting)
