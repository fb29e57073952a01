"""Clusters for fault injection, and a probe that records what its nodes execute."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from langgraph_sdk import get_sync_client

from tests.acceptance.runs.test_cancel_nodes import assert_silent
from tests.cluster import Cluster
from tests.conftest import Beats
from tests.faults.history import Beat, Execution, executions, read_beats
from tests.waiting import wait_until

#: Short times, so that a lease expires within seconds; roughly in the ratio of the defaults.
QUICK = {
    "BELAY_LEASE_SECONDS": "3",
    "BELAY_LEASE_RENEWAL_SECONDS": "0.5",
    "BELAY_RERING_SECONDS": "2",
    "BELAY_SWEEP_SECONDS": "0.2",
    "BELAY_LIVENESS_SECONDS": "0",
    "BELAY_DRAIN_GRACE_SECONDS": "1",
    "BELAY_WEBHOOK_ALLOW_PRIVATE": "1",
}
LEASE_SECONDS = 3.0


@pytest.fixture(scope="package")
def package_cluster(scratch) -> Iterator[Cluster]:
    made = Cluster(scratch / "cluster", webs=2, workers=2, concurrency=3, **QUICK)
    try:
        yield made.start()
    finally:
        made.stop()


@pytest.fixture
def cluster(package_cluster) -> Iterator[Cluster]:
    """Yield the shared cluster, repaired before and after every test."""
    mend(package_cluster)
    yield package_cluster
    mend(package_cluster)


def mend(cluster: Cluster) -> None:
    cluster.clear_plans()
    for server in (cluster.postgres, cluster.valkey):
        if not server.is_running:
            server.start()
    down = [m for m in (*cluster.webs, *cluster.workers) if not m.is_running]
    for member in down:
        member.start()
    if down:
        cluster.wait_until_up()


@pytest.fixture
def make_cluster(scratch, tmp_path):
    """Yield a function that starts a separate cluster with its own settings."""
    made: list[Cluster] = []

    def make(**options: Any) -> Cluster:
        cluster = Cluster(scratch / f"{tmp_path.name}-{len(made)}", **{**QUICK, **options})
        made.append(cluster)
        return cluster.start()

    yield make
    for cluster in made:
        cluster.stop()


@pytest.fixture
def client(cluster):
    with get_sync_client(url=cluster.url) as made:
        yield made


@pytest.fixture
def probe(cluster, client, tmp_path):
    return Probe(cluster, client, tmp_path / "history")


class Probe:
    """Starts runs of the probe graph, and reads what their nodes recorded."""

    def __init__(self, cluster: Cluster, client: Any, history: Path) -> None:
        self.cluster = cluster
        self.client = client
        self.history = history
        self.started = 0

    def start(self, *, thread_id: str | None = None, seconds: float = 0.0, **options: Any):
        """Start a run and return its thread's id, its own id and its tag."""
        self.started += 1
        tag = f"r{self.started}"
        if thread_id is None:
            thread_id = self.client.threads.create()["thread_id"]
        given = {"tag": tag, "history": str(self.history), "seconds": seconds}
        graph = options.pop("graph", "sync_probe")
        given |= options.pop("input", {})
        options = {"durability": "sync", **options}
        run = self.client.runs.create(thread_id, graph, input=given, **options)
        return thread_id, run["run_id"], tag

    def cancel_before_its_end_is_written(self, graph: str, beats: Beats, action: str) -> None:
        """Start a run that leaves a task, and cancel it when its graph has ended. Check that
        nothing is executed after the response."""
        cluster, runs = self.cluster, self.client.runs
        cluster.plan("P9", "hold")
        thread_id = self.client.threads.create()["thread_id"]
        input_ = {"kind": "leave_beats", "beats": str(beats)}
        run_id = runs.create(thread_id, graph, input=input_)["run_id"]
        wait_until(cluster.injected, 60, "its graph to end")
        runs.cancel(thread_id, run_id, action=action)
        (cluster.faults / "release").touch()
        self.wait_until_over(thread_id, run_id)
        assert_silent(beats)
        assert beats.names()[:2] == ["begin", "beat"]
        statuses = [run["status"] for run in runs.list(thread_id)]
        assert statuses == (["interrupted"] if action == "interrupt" else [])

    def beats(self, tag: str) -> list[Beat]:
        return [beat for beat in read_beats(self.history) if beat.tag == tag]

    def executions(self, tag: str) -> list[Execution]:
        return executions(self.beats(tag)).get(tag, [])

    def starts(self, tag: str) -> list[str]:
        """Return the names of the nodes that were started, in order."""
        return [beat.node for beat in self.beats(tag) if beat.event == "start"]

    def wait_for(self, tag: str, node: str, event: str = "start", seconds: float = 30.0) -> Beat:
        def found() -> Beat | None:
            beats = [b for b in self.beats(tag) if (b.node, b.event) == (node, event)]
            return beats[0] if beats else None

        return wait_until(found, seconds, f"{tag} {node} {event}")

    def worker_of(self, pid: int):
        """Return the worker that has this child, and another worker."""
        for worker in self.cluster.workers:
            if pid in [child.pid for child in worker.children()]:
                other = next(w for w in self.cluster.workers if w is not worker)
                return worker, other
        raise AssertionError(f"no worker has a child {pid}")

    def status(self, thread_id: str, run_id: str) -> str | None:
        url = f"{self.cluster.url}/threads/{thread_id}/runs/{run_id}"
        answer = httpx.get(url, timeout=30)
        return answer.json()["status"] if answer.status_code == 200 else None

    def wait_until_over(self, thread_id: str, run_id: str, seconds: float = 40.0) -> str | None:
        def over() -> bool:
            try:
                return self.status(thread_id, run_id) not in ("pending", "running")
            except (httpx.TransportError, KeyError):
                return False

        wait_until(over, seconds, "the end of the run")
        return self.status(thread_id, run_id)

    def assert_done_once(self, thread_id: str, run_id: str, tag: str, *, last: bool = True) -> None:
        """Check that the run succeeded and its state has each step once, in order. The thread must
        be idle if the run was its last."""
        assert self.wait_until_over(thread_id, run_id) == "success"
        done = self.client.threads.get_state(thread_id)["values"]["done"]
        assert [entry for entry in done if entry.startswith(f"{tag}:")] == [
            f"{tag}:{step}" for step in ("s1", "s2", "s3", "s4")
        ]
        assert not last or self.client.threads.get(thread_id)["status"] == "idle"

    def row(self, run_id: str) -> dict[str, Any]:
        """Return the run's row, which has columns that the API does not show."""
        with psycopg.connect(self.cluster.postgres.url, row_factory=psycopg.rows.dict_row) as conn:
            row = conn.execute("SELECT * FROM run WHERE run_id = %s", (run_id,)).fetchone()
        assert row is not None
        return row


def signal_tree(member, number: signal.Signals) -> None:
    """Send a signal to a process and its children, as when a whole machine stops or resumes."""
    for pid in [member.pid, *(child.pid for child in member.children())]:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def pass_time(seconds: float) -> None:
    """Let time pass: the length of the outage is part of the fault."""
    until = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() >= until, seconds + 5)
