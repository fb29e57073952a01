"""`make bench-cancel`: the time from the cancel request until each kind of node has stopped.

Measured at the node: its `finally`, its last heartbeat line, or the death of its process, on the
same monotonic clock as the request. One run at a time, 200 of each kind (`--count`). Also measured:
the replacement of a killed child, the start of the next run, a cancel on disconnect, a bulk
cancel, and the cancel of one run among 500 others on the event loop of a host.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psycopg
from langgraph_sdk import get_sync_client
from langgraph_sdk.client import SyncLangGraphClient

from tests.servers import LiveServer

#: kind → (how the stop is detected, limit in seconds at p99)
KINDS = {
    "async_sleep": ("finally", 0.1),
    "time_sleep": ("finally", 2.0),
    "spin": ("last beat", 2.0),
    "swallow_sync": ("last beat", 2.0),
    "swallow_async": ("last beat", 2.0),
    "block_loop": ("last beat", 2.0),
    "regex": ("death or answer", 2.0),
    "hold_gil": ("death or answer", 2.0),
    "wait_for_subprocess": ("last beat", 2.0),
    "sub_time_sleep": ("finally", 2.0),
    "sub_swallow_sync": ("last beat", 2.0),
    "fan_sync_beats": ("last beat", 2.0),
}


def lines(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(path: Path, name: str) -> list[str]:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for line in lines(path):
            if line[0] == name:
                return line
        time.sleep(0.002)
    raise RuntimeError(f"no '{name}' in {path}: {lines(path)[-3:]}")


class DeathWatch:
    """Records the moment a process dies, by its pidfd."""

    def __init__(self, pid: int) -> None:
        self.at: float | None = None
        self._fd = os.pidfd_open(pid)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        if select.select([self._fd], [], [], 30)[0]:
            self.at = time.monotonic()


def measure(
    client: SyncLangGraphClient, folder: Path, kind: str, number: int
) -> tuple[float, float]:
    """Return the seconds until the node stopped and until the response to `wait=1`."""
    shown, _ = KINDS[kind]
    path = folder / f"{kind}-{number}"
    thread_id = client.threads.create()["thread_id"]
    run = client.runs.create(thread_id, "nodes", input={"kind": kind, "beats": str(path)})
    begun = wait_for(path, "beat" if shown == "last beat" else "begin")
    time.sleep(0.03)  # let the node begin
    death = DeathWatch(int(begun[1])) if shown == "death or answer" else None
    sent = time.monotonic()
    client.runs.cancel(thread_id, run["run_id"], wait=True)
    answered = time.monotonic()
    if shown == "finally":
        stopped = float(wait_for(path, "finally")[2])
    elif shown == "last beat":
        stopped = float(lines(path)[-1][2])
    else:
        assert death is not None
        stopped = death.at if death.at is not None else answered
    assert client.runs.get(thread_id, run["run_id"])["status"] == "interrupted"
    return max(0.0, stopped - sent), answered - sent


def measure_replacement(server: LiveServer, count: int) -> list[float]:
    """Return the milliseconds from killing all children, which are idle, until there is another."""
    # Of the parent's children, which are the zygote and the guardian, the one that forks.
    zygote = max(server.worker_parent().children(), key=lambda child: len(child.children()))
    taken = []
    for _ in range(count):
        before = {child.pid for child in zygote.children()}
        begun = time.monotonic()
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        while not {child.pid for child in zygote.children()} - before:
            time.sleep(0.002)
        taken.append((time.monotonic() - begun) * 1000)
        time.sleep(0.1)
    return taken


def measure_succession(client: SyncLangGraphClient, folder: Path, count: int) -> list[float]:
    """Return the milliseconds from a run's last node to the first node of the next run."""
    taken = []
    for number in range(count):
        thread_id = client.threads.create()["thread_id"]
        paths = [folder / f"succession-{number}-{n}" for n in range(2)]
        for path in paths:
            given: dict[str, Any] = {"seconds": 0.05, "beats": str(path)}
            run = client.runs.create(thread_id, "steps", input=given)
        client.runs.join(thread_id, run["run_id"])
        ended = next(float(line[2]) for line in lines(paths[0]) if line[0] == "s4:end")
        started = next(float(line[2]) for line in lines(paths[1]) if line[0] == "s1:start")
        taken.append((started - ended) * 1000)
    return taken


def measure_disconnect(client: SyncLangGraphClient, server: LiveServer, count: int) -> list[float]:
    """Return the milliseconds from a client closing its socket until its run is `interrupted`."""
    taken = []
    for _ in range(count):
        thread_id = client.threads.create()["thread_id"]
        body = {"assistant_id": "steps", "input": {"seconds": 60}, "on_disconnect": "cancel"}
        with (
            httpx.Client(base_url=server.url) as leaving,
            leaving.stream("POST", f"/threads/{thread_id}/runs/stream", json=body) as answer,
        ):
            next(line for line in answer.iter_lines() if line.startswith("event: values"))
        left = time.monotonic()
        while client.runs.list(thread_id)[0]["status"] != "interrupted":
            time.sleep(0.002)
        taken.append((time.monotonic() - left) * 1000)
    return taken


def measure_bulk(client: SyncLangGraphClient, server: LiveServer, count: int) -> list[float]:
    """Return the milliseconds until the 204 of cancelling 1,000 runs in one call."""
    taken = []
    with psycopg.connect(server.database_url, autocommit=True) as database:
        for _ in range(count):
            thread_id = client.threads.create()["thread_id"]
            client.runs.create(thread_id, "steps", input={"seconds": 60})
            database.execute(_THOUSAND, (thread_id,))
            begun = time.monotonic()
            client.runs.cancel_many(status="all")
            taken.append((time.monotonic() - begun) * 1000)
            while client.threads.get(thread_id)["status"] == "busy":
                time.sleep(0.01)
    return taken


def measure_among_neighbours(folder: Path, count: int) -> list[float]:
    """Return the milliseconds until a run has stopped that shares a host with 500 others."""
    server = LiveServer(
        folder / "hosts",
        BELAY_ISOLATION="shared",
        BELAY_RUN_HOSTS="1",
        BELAY_SHARED_CONCURRENCY=str(_NEIGHBOURS + 100),
    ).start()
    try:
        with get_sync_client(url=server.url) as client:
            paths = [folder / f"neighbour-{number}" for number in range(_NEIGHBOURS)]
            for path in paths:
                given: dict[str, Any] = {"beats": str(path), "seconds": 600}
                client.runs.create(client.threads.create()["thread_id"], "steps", input=given)
            for path in paths:
                wait_for(path, "s1:start")
            stopped = [
                measure(client, folder, "async_sleep", -1 - number) for number in range(count)
            ]
            return [seconds * 1000 for seconds, _ in stopped]
    finally:
        server.stop()


_NEIGHBOURS = 500
_THOUSAND = """
INSERT INTO run (run_id, thread_id, assistant_id, graph_id, queue, metadata, kwargs,
    multitask_strategy, next_ring_at)
SELECT gen_random_uuid(), thread_id, assistant_id, graph_id, queue, metadata, kwargs,
    multitask_strategy, now() + interval '1 hour'
FROM run, generate_series(1, 999) WHERE thread_id = %s
"""


def percentile(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    options = parser.parse_args()
    missed = []
    with tempfile.TemporaryDirectory(prefix="belay-bench-", dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        server = LiveServer(folder / "data").start()
        try:
            with get_sync_client(url=server.url) as client:
                client.runs.wait(None, "counter", input={"count": 1})
                print(f"{os.cpu_count()} cores, {options.count} cancels of each kind, milliseconds")
                print(
                    f"{'node':<22}{'stopped p50':>12}{'p99':>8}{'answer p50':>12}{'p99':>8}  bound"
                )
                for kind in options.kinds:
                    missed += report(client, folder, kind, options.count)
                few = max(5, options.count // 10)
                missed += report_one(
                    "a killed child is replaced", measure_replacement(server, few), 100
                )
                missed += report_one(
                    "a queued run starts after the one before it",
                    measure_succession(client, folder, few),
                    50,
                )
                missed += report_one(
                    "a run is cancelled when its client leaves",
                    measure_disconnect(client, server, few),
                    1000,
                )
                missed += report_one(
                    "1,000 runs cancelled in one call", measure_bulk(client, server, 5), 2000
                )
        finally:
            server.stop()
        missed += report_one(
            f"an async node among {_NEIGHBOURS} others is stopped",
            measure_among_neighbours(folder, options.count),
            50,
        )
    for line in missed:
        print(line)
    return 1 if missed else 0


def report(client: SyncLangGraphClient, folder: Path, kind: str, count: int) -> list[str]:
    measured = [measure(client, folder, kind, number) for number in range(count)]
    stopped = [m[0] * 1000 for m in measured]
    answered = [m[1] * 1000 for m in measured]
    bound = KINDS[kind][1] * 1000
    p99 = percentile(stopped, 99)
    print(
        f"{kind:<22}{statistics.median(stopped):>12.0f}{p99:>8.0f}"
        f"{statistics.median(answered):>12.0f}{percentile(answered, 99):>8.0f}  {bound:.0f}",
        flush=True,
    )
    return [] if p99 <= bound else [f"{kind}: p99 {p99:.0f} ms is over {bound:.0f} ms"]


def report_one(what: str, taken: list[float], bound: float) -> list[str]:
    p99 = percentile(taken, 99)
    print(f"{what}: p50 {statistics.median(taken):.0f} ms, p99 {p99:.0f} ms, bound {bound:.0f}")
    return [] if p99 <= bound else [f"{what}: p99 {p99:.0f} ms is over {bound:.0f} ms"]


if __name__ == "__main__":
    sys.exit(main())
