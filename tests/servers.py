"""Start servers for the tests: `belay dev` as a user runs it, and bare Postgres and Valkey."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from belay_server.db.api_keys import insert_api_key
from belay_server.db.postgres.connection import connect
from belay_server.dev.embedded import (
    EmbeddedPostgres,
    EmbeddedValkey,
    Server,
    wait_until_ready,
)
from belay_server.dev.process_tree import die_with_parent
from belay_server.domain.api_keys import make_key
from belay_server.graphs.project.langgraph_json import read_project
from tests.ports import free_port
from tests.waiting import wait_until

PROJECT = Path(__file__).parent / "project" / "langgraph.json"
STORE_INDEX = read_project(PROJECT).store.index


#: Settings without which tests would have to wait too long, or could not know the end of the log.
FOR_TESTS = {
    "BELAY_ACCESS_LOG": "1",
    "BELAY_CRON_SHORTEST_SECONDS": "1",
    "BELAY_ISOLATION": os.environ.get("TEST_ISOLATION", "process"),
}


class LiveServer:
    """A `belay dev` process tree on a free port."""

    def __init__(
        self,
        data_dir: Path,
        *,
        config: Path | None = PROJECT,
        port: int | None = None,
        cwd: Path | None = None,
        concurrency: int = 8,
        **env: str,
    ):
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.data_dir = data_dir
        self.config = config
        self.cwd = cwd
        self.concurrency = concurrency
        self.env = env
        self.log = data_dir.parent / f"{data_dir.name}-{self.port}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *extra: str, seconds: float = 180.0) -> LiveServer:
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("BELAY_", "LANGGRAPH"))}
        for name in ("DATABASE_URL", "REDIS_URL", "BROKER_URL", "PORT"):
            environ.pop(name, None)
        command = [sys.executable, "-m", "belay_server", "dev", "--port", str(self.port)]
        command += ["--data-dir", str(self.data_dir), "--no-reload"]
        command += ["--concurrency", str(self.concurrency), *extra]
        if self.config is not None:
            command += ["--config", str(self.config)]
        # As root, Postgres runs as `nobody`. If it cannot reach this folder, its data is stored
        # elsewhere and would outlive the test.
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self.data_dir.chmod(0o711)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.cwd,
                env={**environ, **FOR_TESTS, **self.env},
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent(os.getpid(), signal.SIGTERM),
            )
        self.wait_until_up(seconds)
        return self

    def wait_until_up(self, seconds: float = 180.0) -> None:
        """Wait until the API responds."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process is not None
            if self.process.poll() is not None:
                raise RuntimeError(f"belay dev ended: {self.log.read_text()[-3000:]}")
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/ok", timeout=1):
                return
            time.sleep(0.05)
        raise RuntimeError(f"belay dev did not start: {self.log.read_text()[-3000:]}")

    def wait_for_log(self, words: str, seconds: float = 30.0) -> str:
        """Wait until the words are in the log. Return the log. A line can reach it after the
        response to the request that it is about, as it passes through the pipe of `belay dev`."""
        wait_until(lambda: words in self.log.read_text(), seconds, f"{words!r} in {self.log}")
        return self.log.read_text()

    def log_until_now(self) -> str:
        """Return the log with every line that the web process has written before this call, for
        tests of what is not in it. Applies to servers with BELAY_ACCESS_LOG."""
        mark = f"mark-{uuid.uuid4()}"
        request = urllib.request.Request(f"{self.url}/ok", headers={"x-request-id": mark})
        with urllib.request.urlopen(request, timeout=30):
            return self.wait_for_log(mark)

    def log_lines(self) -> list[str]:
        """Return the lines of the log, without a last one that is not complete yet."""
        return self.log.read_text().split("\n")[:-1]

    def tree(self) -> list[psutil.Process]:
        assert self.process is not None
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def find(self, *words: str) -> list[psutil.Process]:
        """Return the processes of the tree whose command line contains all the words."""
        found = []
        for process in self.tree():
            with suppress(psutil.Error):
                if all(word in " ".join(process.cmdline()) for word in words):
                    found.append(process)
        return found

    @property
    def database_url(self) -> str:
        """The URL of the server's database, for tests that read it."""
        if url := self.env.get("DATABASE_URL"):
            return url
        for process in self.find("bin/postgres", "-D"):
            for word in process.cmdline():
                if word.startswith("-cunix_socket_directories="):
                    return f"postgresql://postgres@/postgres?host={word.partition('=')[2]}"
        raise RuntimeError("this server has no embedded Postgres")

    def new_key(
        self, name: str, *, team: str = "default", scope: str = "all", days: float | None = None
    ) -> str:
        """Create an API key as `belay keys create` does, without a process. Return it."""
        new = make_key()
        seconds = None if days is None else days * 86_400
        with connect(self.database_url) as conn:
            insert_api_key(conn, new, name=name, team=team, scope=scope, seconds=seconds)
        return new.text

    def worker_parent(self) -> psutil.Process:
        """Return the worker's parent process: the one whose own parent is `belay dev`."""
        assert self.process is not None
        return next(p for p in self.find("celery") if p.ppid() == self.process.pid)

    def stop(self, number: signal.Signals = signal.SIGTERM, seconds: float = 30.0) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(seconds)


@contextmanager
def running(server: EmbeddedPostgres | EmbeddedValkey) -> Iterator[str]:
    """Run a bare server during the block. Yield its URL."""
    if isinstance(server, EmbeddedPostgres):
        server.initialise()
    spec: Server = server.server()
    process = subprocess.Popen(
        spec.command,
        env=dict(spec.environ),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=die_with_parent(os.getpid(), signal.SIGKILL),
        **spec.popen,
    )
    try:
        wait_until_ready(server, process)
        yield spec.url
    finally:
        process.send_signal(signal.SIGINT if isinstance(server, EmbeddedPostgres) else 15)
        process.wait(15)
        if isinstance(server, EmbeddedPostgres):
            server.clean_up()
