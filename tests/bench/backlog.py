"""A backlog of 100,000 pending runs, on one thread and on 10,000: `make bench-backlog`.

Measured are the time of a claim, the number of messages in the broker while no child is free to
take them, and the time to cancel all runs, on a separate cluster with the real queries and
processes.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psycopg
import redis

from belay_server.db import run_claims as claim_rows
from belay_server.db.postgres.connection import connect
from belay_server.domain.assistants import system_assistant_id
from belay_server.domain.runs import Ending, RunStatus
from belay_server.services.runs.endings import end_run
from tests.cluster import Cluster
from tests.waiting import wait_until

RUNS = 100_000
CLAIMS = 2_000
CONNECTIONS = 8
WATCH_SECONDS = 45.0

_FILL = """
WITH threads AS (
    INSERT INTO thread (thread_id)
    SELECT gen_random_uuid() FROM generate_series(1, %(threads)s)
    RETURNING thread_id
), numbered AS (
    SELECT thread_id, row_number() OVER () - 1 AS n FROM threads
)
INSERT INTO run (
    run_id, thread_id, assistant_id, graph_id, queue, kwargs, multitask_strategy, next_ring_at)
SELECT gen_random_uuid(), t.thread_id, %(assistant_id)s, 'counter', 'runs',
    '{"input": {"count": 1}, "config": {"configurable": {}}}', 'enqueue', now()
FROM generate_series(0, %(runs)s - 1) AS g (n)
JOIN numbered t ON t.n = g.n %% %(threads)s
ORDER BY g.n
"""


def fill(url: str, threads: int) -> None:
    params = {
        "threads": threads,
        "runs": RUNS,
        "assistant_id": system_assistant_id("counter"),
    }
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute("TRUNCATE thread CASCADE")
        conn.execute(_FILL, params)
        conn.execute("VACUUM ANALYZE")


def claim_times(url: str) -> list[float]:
    """Claim a thread's head, end its run and claim the next, on several connections at once."""
    with psycopg.connect(url) as conn:
        heads = conn.execute(
            "SELECT DISTINCT ON (thread_id) run_id FROM run ORDER BY thread_id, seq LIMIT %s",
            (CLAIMS,),
        ).fetchall()
    waiting = [row[0] for row in heads]
    taken: list[float] = []
    lock = threading.Lock()

    def work(number: int) -> None:
        with connect(url, name=f"bench {number}") as conn:
            while True:
                with lock:
                    if len(taken) >= CLAIMS or not waiting:
                        return
                    run_id = waiting.pop()
                began = time.perf_counter()
                claimed = claim_rows.claim_run(
                    conn,
                    run_id,
                    owner=f"bench/{number}",
                    lease_seconds=600,
                    graph_ids=("counter",),
                )
                seconds = time.perf_counter() - began
                assert claimed is not None
                end = end_run(
                    conn, claimed.thread_id, claimed.claim, Ending(RunStatus.SUCCESS, values={})
                )
                assert end is not None
                with lock:
                    taken.append(seconds)
                    waiting.extend(run.run_id for run in end.next_runs)

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(work, range(CONNECTIONS)))
    return taken


def depth_while_nobody_takes(cluster: Cluster) -> tuple[int, int]:
    """Return the most messages in the broker and its memory in kB, with the only child busy."""
    busy = {"assistant_id": "nodes", "input": {"kind": "async_sleep"}}
    httpx.post(f"{cluster.url}/runs", json=busy, timeout=30).raise_for_status()
    with redis.Redis.from_url(cluster.valkey.url) as bus:
        before = bus.info("memory")["used_memory"]
        deepest = 0
        until = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < until:
            deepest = max(deepest, bus.llen("belay:runs"))
            time.sleep(0.2)
        return deepest, (bus.info("memory")["used_memory"] - before) // 1024


def cancel_all(cluster: Cluster) -> float:
    began = time.monotonic()
    answer = httpx.post(f"{cluster.url}/runs/cancel", json={"status": "all"}, timeout=600)
    assert answer.status_code == 204, answer.text
    seconds = time.monotonic() - began

    def left() -> int:
        with psycopg.connect(cluster.postgres.url) as conn:
            sql = "SELECT count(*) FROM run WHERE status IN ('pending', 'running')"
            row = conn.execute(sql).fetchone()
        assert row is not None
        count: int = row[0]
        return count

    wait_until(lambda: left() == 0, 60, "every run to be over")
    return seconds


def percentile(times: list[float], part: float) -> float:
    return sorted(times)[min(len(times) - 1, int(len(times) * part))]


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="belay-bench-", dir="/tmp"))
    folder.chmod(0o755)
    cluster = Cluster(folder / "cluster", workers=1, concurrency=1)
    cluster.start()
    worker = cluster.workers[0]
    print("| 100,000 pending runs on | claim p50 | p99 | deepest queue | Redis | cancel all |")
    print("|---|---|---|---|---|---|")
    try:
        for threads in (1, 10_000):
            worker.stop()
            fill(cluster.postgres.url, threads)
            times = claim_times(cluster.postgres.url)
            cluster.restart(worker)
            deepest, kilobytes = depth_while_nobody_takes(cluster)
            seconds = cancel_all(cluster)
            name = f"{threads:,} thread{'s' if threads > 1 else ''}"
            print(
                f"| {name} | {statistics.median(times) * 1000:.1f} ms "
                f"| {percentile(times, 0.99) * 1000:.1f} ms | {deepest:,} messages "
                f"| +{kilobytes:,} kB | {seconds:.1f} s |",
                flush=True,
            )
    finally:
        cluster.stop()


if __name__ == "__main__":
    main()
