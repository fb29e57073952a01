"""The monkey: injects a fault into a cluster every few seconds under load, then runs the checker.

`make faults` runs it for a given time and writes a report; `make test` runs it briefly. The seed
determines the faults; their times also depend on the clock.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psutil
import psycopg
import redis

from belay_server.configuration.settings import Settings
from belay_server.db.runs import Ringable
from belay_server.doorbell import Doorbell, hosted_queue
from tests.cluster import Cluster, Member
from tests.faults.history import ACTIVE, Checker, Fault, Verdict, read_beats
from tests.faults.load import Client
from tests.servers import PROJECT
from tests.waiting import wait_until

#: The relative frequency of each fault.
WEIGHTS = {
    "child killed": 40,
    "worker killed": 8,
    "worker stopped (SIGTERM)": 8,
    "worker paused": 3,
    "web killed": 7,
    "web stopped (SIGTERM)": 4,
    "redis killed": 4,
    "redis flushed": 6,
    "redis hangs": 3,
    "doorbells dropped": 5,
    "doorbells doubled": 5,
    "postgres stopped at once": 4,
    "postgres stopped fast": 3,
    "postgres hangs": 2,
    "postgres connections cut": 8,
    "postgres read-only": 3,
}
#: A process must end within this time after SIGTERM: the drain grace and what follows it.
_END_SECONDS = 40.0
#: After the last fault all runs must end within this time.
REST_SECONDS = 120.0


@dataclass(order=True)
class _Later:
    at: float
    do: Callable[[], None] = field(compare=False)


class Monkey:
    """Injects faults from the main thread, the only one that may start processes."""

    def __init__(
        self,
        cluster: Cluster,
        seed: int,
        clients: list[Client],
        history: Path,
        outages: tuple[float, ...],
    ) -> None:
        self.cluster = cluster
        self.rng = random.Random(seed)
        self.clients = clients
        self.history = history
        self.faults: list[Fault] = []
        #: Errors that no injected fault explains.
        self.findings: list[str] = []
        self._later: list[_Later] = []
        self._down: set[str] = set()
        #: The possible lengths of an outage of Postgres, in seconds.
        self.outages = outages

    def run(self, seconds: float, gap: float, weights: dict[str, int]) -> None:
        """Inject a fault about every `gap` seconds until `seconds` have passed, then repair all."""
        end = time.monotonic() + seconds
        kinds = list(weights)
        next_at = time.monotonic() + 1.0
        while time.monotonic() < end:
            self._do_due()
            if time.monotonic() >= next_at:
                kind = self.rng.choices(kinds, [weights[k] for k in kinds])[0]
                self._fault(kind)
                next_at = time.monotonic() + self.rng.uniform(0.3 * gap, 1.7 * gap)
            time.sleep(0.02)
        while self._later:
            self._do_due()
            time.sleep(0.02)
        self.cluster.wait_until_up()

    def _after(self, seconds: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._later, _Later(time.monotonic() + seconds, do))

    def _do_due(self) -> None:
        while self._later and self._later[0].at <= time.monotonic():
            heapq.heappop(self._later).do()

    def _fault(self, kind: str) -> None:
        actions: dict[str, Callable[[str], None]] = {
            "child killed": self._kill_child,
            "worker killed": lambda k: self._end_member(k, self.cluster.workers, signal.SIGKILL),
            "worker stopped (SIGTERM)": lambda k: self._end_member(
                k, self.cluster.workers, signal.SIGTERM
            ),
            "worker paused": self._pause_worker,
            "web killed": lambda k: self._end_member(k, self.cluster.webs, signal.SIGKILL),
            "web stopped (SIGTERM)": lambda k: self._end_member(
                k, self.cluster.webs, signal.SIGTERM
            ),
            "redis killed": self._kill_redis,
            "redis flushed": self._flush_redis,
            "redis hangs": lambda k: self._hang(k, self.cluster.valkey, 2.0, 8.0),
            "doorbells dropped": self._drop_doorbells,
            "doorbells doubled": self._double_doorbells,
            "postgres stopped at once": lambda k: self._stop_postgres(k, signal.SIGQUIT),
            "postgres stopped fast": lambda k: self._stop_postgres(k, signal.SIGINT),
            "postgres hangs": lambda k: self._hang(k, self.cluster.postgres, 2.0, 14.0),
            "postgres connections cut": self._cut_connections,
            "postgres read-only": self._read_only,
        }
        with suppress(psutil.Error, psycopg.OperationalError, redis.RedisError, ProcessLookupError):
            actions[kind](kind)

    def _note(self, kind: str, began: float, ended: float, pids: tuple[int, ...] = ()) -> None:
        self.faults.append(Fault(kind, began, ended, pids))

    def _up(self, members: list[Member]) -> list[Member]:
        return [m for m in members if m.name not in self._down]

    # -- processes -------------------------------------------------------------------------------

    def _busy_children(self) -> list[int]:
        """Return the children whose last beat is the start of a node."""
        doing: dict[int, str] = {}
        with self.history.open("rb") as file:
            file.seek(max(0, self.history.stat().st_size - 20_000))
            for line in file.read().splitlines()[1:]:
                beat = json.loads(line)
                doing[beat["pid"]] = beat["event"]
        return [pid for pid, event in doing.items() if event == "start" and psutil.pid_exists(pid)]

    def _kill_child(self, kind: str) -> None:
        children = [
            child.pid for worker in self._up(self.cluster.workers) for child in worker.children()
        ]
        busy = [pid for pid in self._busy_children() if pid in children]
        choose_from = busy if busy and self.rng.random() < 0.8 else children
        if choose_from:
            pid = self.rng.choice(choose_from)
            began = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            self._note(kind, began, began, (pid,))

    def _end_member(self, kind: str, members: list[Member], number: signal.Signals) -> None:
        up = self._up(members)
        if len(up) < 2:
            return  # another one must be left to take over
        member = self.rng.choice(up)
        pids = tuple(child.pid for child in member.children())
        began = time.monotonic()
        member.send(number)
        self._down.add(member.name)
        self._note(kind, began, began, pids if member in self.cluster.workers else (member.pid,))
        self._after(self.rng.uniform(0.2, 4.0), lambda: self._bring_back(member, began))

    def _bring_back(self, member: Member, ending_since: float) -> None:
        if member.is_running and time.monotonic() - ending_since > _END_SECONDS:
            self.findings.append(f"{member.name} did not end {_END_SECONDS} s after SIGTERM")
            member.kill()
        if member.is_running:  # still draining
            self._after(0.2, lambda: self._bring_back(member, ending_since))
            return
        if member.process is not None and member.process.returncode not in (0, -9):
            self.findings.append(f"{member.name} ended with {member.process.returncode}")
        member.start()
        self._count_when_ready(member)

    def _count_when_ready(self, member: Member) -> None:
        """Mark a member as up once it is ready; before, it takes over no run and drains nothing."""
        if self.cluster.is_ready(member):
            self._down.discard(member.name)
        else:
            self._after(0.5, lambda: self._count_when_ready(member))

    def _pause_worker(self, kind: str) -> None:
        """Pause a worker and its children for longer than a lease, then resume them."""
        up = self._up(self.cluster.workers)
        if len(up) < 2:
            return
        worker = self.rng.choice(up)
        processes = [worker.pid, *(child.pid for child in worker.children())]
        began = time.monotonic()
        for pid in processes:
            os.kill(pid, signal.SIGSTOP)
        self._down.add(worker.name)
        seconds = self.rng.uniform(11.0, 16.0)

        def resume() -> None:
            for pid in processes:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            self._note(kind, began, time.monotonic(), tuple(processes))
            self._down.discard(worker.name)

        self._after(seconds, resume)

    # -- Redis and the broker --------------------------------------------------------------------

    def _redis(self) -> redis.Redis:
        return redis.Redis.from_url(self.cluster.valkey.url, socket_timeout=2.0)

    def _kill_redis(self, kind: str) -> None:
        if self.cluster.valkey.name in self._down:
            return
        began = time.monotonic()
        self.cluster.valkey.kill()
        self._down.add(self.cluster.valkey.name)
        self._after(self.rng.uniform(0.2, 8.0), lambda: self._start_server(kind, began))

    def _start_server(self, kind: str, began: float) -> None:
        server = self.cluster.valkey if kind.startswith("redis") else self.cluster.postgres
        server.start()
        self._down.discard(server.name)
        self._note(kind, began, time.monotonic())

    def _flush_redis(self, kind: str) -> None:
        with self._redis() as client:
            client.flushall()
        self._note(kind, time.monotonic(), time.monotonic())

    def _hang(self, kind: str, member: Member, least: float, most: float) -> None:
        """Stop a server so that its connections stay open without responses."""
        if member.name in self._down:
            return
        processes = [member.pid, *(child.pid for child in member.children())]
        began = time.monotonic()
        for pid in processes:
            os.kill(pid, signal.SIGSTOP)
        self._down.add(member.name)

        def resume() -> None:
            for pid in processes:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            self._down.discard(member.name)
            self._note(kind, began, time.monotonic())

        self._after(self.rng.uniform(least, most), resume)

    def _drop_doorbells(self, kind: str) -> None:
        with self._redis() as client:
            client.delete("belay:runs", f"belay:{hosted_queue('runs')}")
        self._note(kind, time.monotonic(), time.monotonic())

    def _double_doorbells(self, kind: str) -> None:
        """Send doorbells for pending, running and ended runs, many times."""
        settings = Settings.from_environ(self.cluster.env)
        doorbell = Doorbell.of(settings)
        known = [p for client in self.clients for p in client.promises[-5:]]
        for promise in self.rng.sample(known, min(5, len(known))):
            for _ in range(self.rng.randint(2, 20)):
                doorbell.ring(Ringable(UUID(promise.run_id), "runs", "probe"))
        self._note(kind, time.monotonic(), time.monotonic())

    # -- Postgres --------------------------------------------------------------------------------

    def _stop_postgres(self, kind: str, number: signal.Signals) -> None:
        if self.cluster.postgres.name in self._down:
            return
        began = time.monotonic()
        self.cluster.postgres.shut_down(number)
        self._down.add(self.cluster.postgres.name)
        seconds = self.rng.choice(self.outages)
        self._after(seconds, lambda: self._start_server(kind, began))

    def _sql(self, sql: str) -> None:
        with psycopg.connect(
            self.cluster.postgres.url, autocommit=True, connect_timeout=2
        ) as connection:
            connection.execute("SET default_transaction_read_only = off")
            connection.execute(sql)

    def _cut_connections(self, kind: str) -> None:
        if self.cluster.postgres.name in self._down:
            return
        share = self.rng.choice((0.3, 1.0))
        self._sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            f"WHERE application_name LIKE 'belay%' AND random() < {share}"
        )
        self._note(kind, time.monotonic(), time.monotonic())

    def _read_only(self, kind: str) -> None:
        if self.cluster.postgres.name in self._down:
            return
        self._down.add(self.cluster.postgres.name)
        began = time.monotonic()
        self._sql("ALTER SYSTEM SET default_transaction_read_only = on")
        self._sql("SELECT pg_reload_conf()")

        def again() -> None:
            self._sql("ALTER SYSTEM RESET default_transaction_read_only")
            self._sql("SELECT pg_reload_conf()")
            self._down.discard(self.cluster.postgres.name)
            self._note(kind, began, time.monotonic())

        self._after(self.rng.uniform(1.0, 13.0), again)


@dataclass
class Report:
    """The injected faults and the results."""

    seed: int
    seconds: float
    rested_after: float
    kinds: Counter[str]
    faults: Counter[str]
    verdict: Verdict

    @property
    def runs(self) -> int:
        return sum(self.kinds.values())

    def text(self) -> str:
        verdict = self.verdict
        lines = [
            "# Fault report",
            "",
            f"Seed {self.seed}, {self.seconds / 60:.1f} minutes of faults; everything had come to "
            f"rest {self.rested_after:.1f} s after the last.",
            "",
            "| | |",
            "|---|---|",
            f"| runs accepted | {self.runs} |",
            f"| faults injected | {sum(self.faults.values())} |",
            f"| **runs lost** | **{len(verdict.lost)}** |",
            f"| **runs doubled** | **{len(verdict.doubled)}** |",
            f"| other promises broken | {len(verdict.broken)} |",
            f"| executions cut off and resumed | {verdict.executed_again} |",
            f"| steps repeated (the ones that were cut off) | {verdict.repeated_steps} |",
            f"| runs given up after the last attempt | {verdict.given_up} |",
            "",
            "| runs of kind | |",
            "|---|---|",
            *[f"| {kind} | {count} |" for kind, count in self.kinds.most_common()],
            "",
            "Recovery, in seconds: for a process, from the fault to the next step of each run it "
            "cut off; for a server, from its return to the next step of any run.",
            "",
            "| fault | injected | recoveries | p50 | p99 |",
            "|---|---|---|---|---|",
        ]
        for kind, count in self.faults.most_common():
            times = sorted(verdict.recoveries.get(kind, []))
            p50 = f"{statistics.median(times):.2f}" if times else "–"
            p99 = f"{times[min(len(times) - 1, int(len(times) * 0.99))]:.2f}" if times else "–"
            lines.append(f"| {kind} | {count} | {len(times)} | {p50} | {p99} |")
        for name in ("lost", "doubled", "broken"):
            found = getattr(verdict, name)
            if found:
                lines += ["", f"## {name}", "", *[f"- {entry}" for entry in found]]
        return "\n".join(lines) + "\n"


def play(
    folder: Path,
    *,
    seed: int,
    seconds: float,
    gap: float,
    clients: int,
    pause: float,
    weights: dict[str, int] = WEIGHTS,
    outages: tuple[float, ...] = (0.2, 1.0, 3.0, 12.0),
    workers: int = 3,
    concurrency: int = 4,
    **env: str,
) -> Report:
    """Start a cluster and callers, inject faults, wait until all runs have ended, and check."""
    cluster = Cluster(
        folder,
        webs=2,
        workers=workers,
        concurrency=concurrency,
        config=PROJECT,
        connections=300,
        pgbouncer=0,
        **env,
    )
    history = folder / "history"
    history.touch()
    history.chmod(0o666)
    rng = random.Random(seed)
    shared = [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(4)]
    stop = threading.Event()
    callers = [
        Client(number, seed, cluster.urls, str(history), shared, stop, pause)
        for number in range(1, clients + 1)
    ]
    try:
        cluster.start()
        for thread_id in shared:
            httpx.post(f"{cluster.url}/threads", json={"thread_id": thread_id}).raise_for_status()
        for caller in callers:
            caller.runner.start()
        monkey = Monkey(cluster, seed, callers, history, outages)
        began = time.monotonic()
        monkey.run(seconds, gap, weights)
        ended = time.monotonic()
        stop.set()
        for caller in callers:
            caller.runner.join(REST_SECONDS)
        rested = _wait_for_rest(cluster) - ended
        promises = [promise for caller in callers for promise in caller.promises]
        runs, threads = _ask_for_all(cluster.url, promises)
        verdict = Checker(promises, read_beats(history), monkey.faults, runs, threads).check()
        verdict.broken += monkey.findings
        for caller in callers:
            if caller.runner.is_alive():
                verdict.lost.append(f"{caller.runner.name} is still waiting for an answer")
            if caller.failure is not None:
                verdict.broken.append(f"{caller.runner.name}: {caller.failure!r}")
        return Report(
            seed,
            ended - began,
            rested,
            Counter(promise.kind for promise in promises),
            Counter(fault.kind for fault in monkey.faults),
            verdict,
        )
    finally:
        stop.set()
        cluster.stop()


def _wait_for_rest(cluster: Cluster) -> float:
    def at_rest() -> bool:
        with psycopg.connect(cluster.postgres.url) as conn:
            row = conn.execute(
                "SELECT count(*) FROM run WHERE status = ANY(%s)", (list(ACTIVE),)
            ).fetchone()
        return row is not None and row[0] == 0

    wait_until(at_rest, REST_SECONDS, "every run to end")
    return time.monotonic()


def _ask_for_all(url: str, promises: list[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the API shows of every run and thread at the end."""
    runs: dict[str, Any] = {}
    threads: dict[str, Any] = {}
    with httpx.Client(base_url=url, timeout=30) as client:
        for promise in promises:
            if promise.thread_id is None:
                continue
            answer = client.get(f"/threads/{promise.thread_id}/runs/{promise.run_id}")
            runs[promise.run_id] = answer.json() if answer.status_code == 200 else None
            if promise.thread_id not in threads:
                thread = client.get(f"/threads/{promise.thread_id}").json()
                state = client.get(f"/threads/{promise.thread_id}/state").json()
                threads[promise.thread_id] = (thread["status"], state["values"].get("done", []))
    return runs, threads


def main() -> int:
    parser = argparse.ArgumentParser(description="The long form of the fault suite.")
    parser.add_argument("--seconds", type=float, default=1500.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--gap", type=float, default=3.5, help="seconds between faults")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--report", type=Path, default=Path("fault-report.md"))
    parser.add_argument("--keep", action="store_true", help="keep the logs and the history")
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="belay-faults-", dir="/tmp"))
    folder.chmod(0o755)
    print(f"seed {asked.seed}, logs in {folder}", flush=True)
    report = play(
        folder / "cluster",
        seed=asked.seed,
        seconds=asked.seconds,
        gap=asked.gap,
        clients=asked.clients,
        pause=0.8,
    )
    asked.report.write_text(report.text())
    print(report.text())
    return 0 if report.verdict.holds else 1


if __name__ == "__main__":
    sys.exit(main())
