"""Run a Belay installation as an operator does: several web processes and workers.

They share one Postgres and one Valkey. Each process can be killed, stopped and started separately.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from belay_server.db.migrate import migrate
from belay_server.dev.embedded import EmbeddedPostgres, EmbeddedValkey, wait_until_ready
from belay_server.dev.process_tree import die_with_parent
from tests.pgbouncer import configuration, find_pgbouncer
from tests.ports import accepts, free_port
from tests.servers import FOR_TESTS, PROJECT, STORE_INDEX
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[1]
INJECTION = Path(__file__).parent / "faults" / "injection"


class Member:
    """One process of the cluster. Start it from the main thread."""

    def __init__(self, name: str, command: list[str], env: dict[str, str], log: Path, **popen: Any):
        self.name = name
        self.command = command
        self.env = env
        self.log = log
        self.popen = popen
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
                preexec_fn=die_with_parent(os.getpid(), signal.SIGKILL),
                **self.popen,
            )
        self.starts += 1

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def send(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def children(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """Kill the process with SIGKILL and reap it."""
        self.send(signal.SIGKILL)
        assert self.process is not None
        self.process.wait(10)

    def stop(self, seconds: float = 30.0) -> int:
        """Send SIGTERM, and SIGKILL after `seconds`, as a platform does. Return the exit code."""
        assert self.process is not None
        self.send(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return self.process.returncode

    def text(self) -> str:
        return self.log.read_text(errors="replace")


class Postgres(Member):
    def __init__(self, folder: Path, *, connections: int = 300) -> None:
        # Without fsync a killed server still loses nothing, because the machine keeps running.
        # Commits are synchronous.
        self.server = EmbeddedPostgres(folder, durable=True, connections=connections)
        self.server.initialise()
        spec = self.server.server()
        super().__init__(
            "postgres",
            [*spec.command, "-cfsync=off", "-cfull_page_writes=off"],
            dict(spec.environ),
            folder / "postgres.log",
            **spec.popen,
        )
        self.url = spec.url

    def start(self) -> None:
        self.server.initialise()
        super().start()
        assert self.process is not None
        wait_until_ready(self.server, self.process)

    def shut_down(self, number: signal.Signals) -> None:
        """Shut down with SIGINT (fast), SIGQUIT (immediate) or SIGKILL (a crash)."""
        self.send(number)
        assert self.process is not None
        self.process.wait(20)
        # It can start again only after the killed postmaster's backends have ended.
        wait_until(lambda: not self._backends(), 20, "the backends to end")

    def _backends(self) -> list[psutil.Process]:
        folder = str(self.server.data)
        found = []
        for process in psutil.process_iter(["cwd", "name", "status"]):
            ours = process.info["name"] == "postgres" and process.info["cwd"] == folder
            if ours and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found


class PgBouncerMissing(Exception):
    """There is no PgBouncer on this machine, and its package cannot be downloaded."""


class PgBouncer(Member):
    """PgBouncer in transaction mode, in front of a Postgres."""

    def __init__(self, folder: Path, postgres: Postgres, *, pool_size: int) -> None:
        found = find_pgbouncer(folder)
        if found is None:
            raise PgBouncerMissing("PgBouncer is not installed, and cannot be downloaded")
        program, variables = found
        self.port = free_port()
        spec = postgres.server.server()
        sockets = postgres.url.partition("host=")[2]
        ini = folder / "pgbouncer.ini"
        ini.write_text(configuration(self.port, socket_folder=sockets, pool_size=pool_size))
        command = [program, "--quiet", str(ini)]
        super().__init__("pgbouncer", command, variables, folder / "pgbouncer.log", **spec.popen)
        self.url = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        super().start()
        wait_until(lambda: accepts(self.port), 30, "PgBouncer")


class Valkey(Member):
    def __init__(self, folder: Path) -> None:
        self.server = EmbeddedValkey(folder)
        spec = self.server.server()
        super().__init__(
            "valkey", spec.command, dict(spec.environ), folder / "valkey.log", **spec.popen
        )
        self.url = spec.url

    def start(self) -> None:
        super().start()
        assert self.process is not None
        wait_until_ready(self.server, self.process)


class Cluster:
    """Web processes and workers that inject the faults planned in the folder `faults`."""

    def __init__(
        self,
        folder: Path,
        *,
        webs: int = 1,
        workers: int = 2,
        concurrency: int = 3,
        config: Path = PROJECT,
        connections: int = 300,
        pgbouncer: int = 0,
        **env: str,
    ) -> None:
        """Postgres allows `connections`. With `pgbouncer`, PgBouncer is in front of it, with that
        many of them; the processes of Belay know no other address."""
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        self.folder = folder
        self.faults = folder / "faults"
        self.faults.mkdir(exist_ok=True)
        self.postgres = Postgres(folder, connections=connections)
        self.pgbouncer: PgBouncer | None = None
        if pgbouncer:
            self.pgbouncer = PgBouncer(folder, self.postgres, pool_size=pgbouncer)
            env = {"BELAY_PGBOUNCER": "1", **env}
        self.valkey = Valkey(folder)
        kept = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("BELAY_", "LANGGRAPH")) and k not in ("BROKER_URL", "PORT")
        }
        self.env = {
            **kept,
            **FOR_TESTS,
            "PYTHONPATH": str(INJECTION),
            "PYTHONUNBUFFERED": "1",
            "FAULTS_DIR": str(self.faults),
            "DATABASE_URL": (self.pgbouncer or self.postgres).url,
            "REDIS_URL": self.valkey.url,
            "BELAY_CONFIG": str(config),
            "BELAY_CONCURRENCY": str(concurrency),
            **env,
        }
        self.webs: list[Member] = []
        self.workers: list[Member] = []
        self.urls: list[str] = []
        for _ in range(webs):
            self._add_web()
        for _ in range(workers):
            self.add_worker()

    def _add_web(self) -> None:
        port = free_port()
        self.urls.append(f"http://127.0.0.1:{port}")
        number = len(self.webs) + 1
        command = [sys.executable, "-m", "gunicorn", "-c", "python:belay_server.gunicorn_conf"]
        command += ["belay_server.factory:create_app()"]
        env = {**self.env, "BELAY_BIND": f"127.0.0.1:{port}"}
        log = self.folder / f"web{number}.log"
        self.webs.append(Member(f"web{number}", command, env, log, cwd=ROOT))

    def add_worker(self, **env: str) -> Member:
        """Add another worker without starting it."""
        number = len(self.workers) + 1
        command = [sys.executable, "-m", "celery", "-A", "belay_workers", "--quiet", "worker"]
        command += ["-n", f"worker{number}@%h", "-Q", "runs,heavy,parents", "--loglevel=INFO"]
        command += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        log = self.folder / f"worker{number}.log"
        member = Member(f"worker{number}", command, {**self.env, **env}, log, cwd=ROOT)
        self.workers.append(member)
        return member

    @property
    def members(self) -> list[Member]:
        between = [] if self.pgbouncer is None else [self.pgbouncer]
        return [*self.webs, *self.workers, *between, self.postgres, self.valkey]

    @property
    def url(self) -> str:
        return self.urls[0]

    def start(self) -> Cluster:
        self.postgres.start()
        if self.pgbouncer is not None:
            self.pgbouncer.start()
        self.valkey.start()
        migrate(self.postgres.url, store_index=STORE_INDEX)
        for member in [*self.webs, *self.workers]:
            member.start()
        self.wait_until_up()
        return self

    def wait_until_up(self, seconds: float = 180.0) -> None:
        """Wait until every web process responds and every worker accepts runs."""
        wait_until(lambda: all(map(self._answers, self.urls)), seconds, "the web processes")
        for worker in self.workers:
            wait_until(partial(is_ready, worker), seconds, f"{worker.name} to be ready")

    def is_ready(self, member: Member) -> bool:
        """Return whether a worker accepts runs, or a web process responds."""
        if member in self.webs:
            return self._answers(self.urls[self.webs.index(member)])
        return is_ready(member)

    def _answers(self, url: str) -> bool:
        try:
            with urllib.request.urlopen(f"{url}/ok", timeout=1):
                return True
        except OSError:
            return False

    def restart(self, member: Member) -> None:
        """Start a process that has ended, and wait until all are ready."""
        member.start()
        self.wait_until_up()

    def plan(self, name: str, *faults: str) -> None:
        """Plan faults at a fault point or a statement."""
        path = self.faults / f".{name}"
        path.write_text("\n".join(faults) + "\n")
        path.chmod(0o666)
        path.rename(self.faults / name)

    def clear_plans(self) -> None:
        for path in self.faults.iterdir():
            path.unlink()

    def injected(self) -> list[list[str]]:
        """Return the lines of the injection's log: point, run id, fault, pid, clock."""
        log = self.faults / "log"
        return [line.split() for line in log.read_text().splitlines()] if log.exists() else []

    def stop(self) -> None:
        for member in [*self.webs, *self.workers]:
            if member.is_running:
                member.send(signal.SIGCONT)
                member.send(signal.SIGTERM)
        deadline = time.monotonic() + 20
        for member in [*self.webs, *self.workers]:
            if member.process is not None:
                with suppress(subprocess.TimeoutExpired):
                    member.process.wait(max(0.1, deadline - time.monotonic()))
        for member in reversed(self.members):
            if member.is_running:
                member.send(signal.SIGCONT)
                member.kill()
        self.postgres.server.clean_up()


def is_ready(worker: Member) -> bool:
    """Return whether the worker has logged that it is ready since its last start."""
    return worker.text().count("this worker is ") >= worker.starts
