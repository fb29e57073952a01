"""`"queues"` in langgraph.json: the runs of a graph go to the workers of its queue only.

Two workers as started in production, one per queue, and one web process, on separate servers.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from contextlib import suppress

import httpx
import psutil
import pytest
import redis
from langgraph_sdk import get_client, get_sync_client

from tests.acceptance.playing import new_thread, play, run_of, status_of, wait_for
from tests.conformance import watched
from tests.ports import free_port
from tests.servers import PROJECT
from tests.waiting import wait_until


class Deployment:
    """A web process, and workers that are started and stopped by name."""

    def __init__(self, database_url: str, redis_url: str, log) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self.redis_url = redis_url
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("BELAY_", "LANGGRAPH"))}
        environ.pop("BROKER_URL", None)
        self._env = {
            **environ,
            "DATABASE_URL": database_url,
            "REDIS_URL": redis_url,
            "BELAY_CONFIG": str(PROJECT),
            "BELAY_BIND": self.url.removeprefix("http://"),
            "BELAY_REDIS_PREFIX": "queues:",
            "BELAY_CONCURRENCY": "2",
            "BELAY_RERING_SECONDS": "0.5",
            "BELAY_DRAIN_GRACE_SECONDS": "1",
        }
        self._log = log
        self._processes: dict[str, subprocess.Popen] = {}

    def _start(self, name: str, *module: str) -> None:
        command = [sys.executable, "-m", *module]
        self._processes[name] = subprocess.Popen(
            command, env=self._env, stdout=self._log, stderr=self._log
        )

    def start_web(self) -> None:
        self._start(
            "web",
            "gunicorn",
            "-c",
            "python:belay_server.gunicorn_conf",
            "belay_server.factory:create_app()",
        )

    def start_worker(self, queue: str) -> None:
        options = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        self._start(
            queue,
            *("celery", "-A", "belay_workers", "--quiet", "worker", *options),
            *("-Q", queue, "-n", f"{queue}@%h"),
        )

    def is_up(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(f"{self.url}/ok", timeout=1):
            return True
        return False

    def pid(self, name: str) -> int:
        return self._processes[name].pid

    def stop(self, name: str) -> None:
        process = self._processes.pop(name)
        process.send_signal(signal.SIGTERM)
        process.wait(20)

    def stop_all(self) -> None:
        for name in list(self._processes):
            self.stop(name)


@pytest.fixture(scope="module")
def deployment(scratch, database_url, valkey_url):
    with (scratch / "queues.log").open("ab") as log:
        made = Deployment(database_url, valkey_url, log)
        try:
            made.start_web()
            made.start_worker("runs")
            made.start_worker("heavy")
            wait_until(made.is_up, 180, "the web process")
            yield made
        finally:
            made.stop_all()


@pytest.fixture
def web(deployment):
    with watched(httpx.Client(base_url=deployment.url, timeout=60)) as client:
        yield client


def worker_of(note: str) -> int:
    """Return the worker's pid, which the `heavy` graph writes at the start of its note."""
    return int(note.split(maxsplit=1)[0])


def test_runs_go_to_the_worker_of_their_graphs_queue(deployment, web, beats):
    def make():
        return watched(get_client(url=deployment.url))

    async def scene(client):
        heavy = [await client.runs.wait(None, "heavy", input={"count": n}) for n in range(4)]
        for n in range(4):
            await client.runs.wait(None, "steps", input={"tag": f"{n}-", "beats": str(beats)})
        return heavy

    heavy = play(make, scene)
    assert {worker_of(values["note"]) for values in heavy} == {deployment.pid("heavy")}
    zygotes = {psutil.Process(pid).ppid() for pid in beats.pids()}
    assert {psutil.Process(pid).ppid() for pid in zygotes} == {deployment.pid("runs")}


def test_runs_of_a_queue_without_a_worker_wait_and_delay_no_others(deployment, web):
    deployment.stop("heavy")
    thread_id = new_thread(web)
    run_id = run_of(web, thread_id, "heavy", {"count": 1})
    # Enough runs to use every child of the other worker twice.
    for _ in range(4):
        assert wait_for(web, new_thread(web), "counter", {"count": 1}) == {"count": 2}
    assert status_of(web, thread_id, run_id) == "pending"
    # The message is lost. The row has the queue for which the doorbell is rung again.
    with redis.Redis.from_url(deployment.redis_url) as client:
        client.flushdb()
    assert wait_for(web, new_thread(web), "counter", {"count": 1}) == {"count": 2}
    assert status_of(web, thread_id, run_id) == "pending"
    deployment.start_worker("heavy")
    with watched(get_sync_client(url=deployment.url)) as client:
        values = client.runs.join(thread_id, run_id)
    assert worker_of(values["note"]) == deployment.pid("heavy")


def test_belay_dev_serves_every_queue_of_the_project(server, sync_client):
    heavy = sync_client.runs.wait(None, "heavy", input={"count": 1})
    assert heavy["note"] == f"{server.worker_parent().pid} yes"
    assert sync_client.runs.wait(None, "counter", input={"count": 1}) == {"count": 2}
