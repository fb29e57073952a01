"""Inject faults into the processes under test at named moments.

Python imports this module at their start if this folder is on PYTHONPATH. Nothing in `app` or
`workers` refers to it.

A test writes files into the folder FAULTS_DIR and starts runs:

    P0 … P12        one line per fault, taken by the first process that reaches that point:
                        kill | segv | exit | stop | hold
                    `hold` waits until the file `release` exists
    statements      one line `<connection> <n> <fault>`: the n-th statement that a process executes
                    on connections with that application_name, counted from now:
                        cut-before   the backend is terminated, then the statement is sent
                        cut-after    the statement is executed, then its result is lost
                        40001 | 40P01 | 55P03   the server raises this error instead
    stall           the consumer's event loop stops polling the broker

Injected faults are appended to `log`. FAULT_CLOCK_SKEW shifts this process's clock, in seconds.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import signal
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ["FAULTS_DIR"]) if os.environ.get("FAULTS_DIR") else None


def take_line(name: str) -> str | None:
    """Remove and return the first line of a plan; only one process gets each line."""
    assert FOLDER is not None
    try:
        fd = os.open(FOLDER / name, os.O_RDWR)
    except FileNotFoundError:
        return None
    with os.fdopen(fd, "r+") as plan:
        fcntl.flock(plan, fcntl.LOCK_EX)
        first, _, rest = plan.read().partition("\n")
        plan.seek(0)
        plan.write(rest)
        plan.truncate()
    return first.strip() or None


def note(*words: object) -> None:
    assert FOLDER is not None
    line = " ".join([*map(str, words), str(os.getpid()), f"{time.monotonic():.6f}"]) + "\n"
    fd = os.open(FOLDER / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.write(fd, line.encode())
    os.close(fd)


def reached(point, run_id) -> None:
    assert FOLDER is not None
    fault = take_line(str(point))
    if fault is None:
        return
    note(point, run_id, fault)
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "segv":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif fault == "exit":
        os._exit(1)
    elif fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "hold":
        while not (FOLDER / "release").exists():
            time.sleep(0.005)
    else:
        raise ValueError(f"no such fault: {fault}")


class Statements:
    """Counts the statements of each kind of connection in this process."""

    def __init__(self) -> None:
        self.armed: str | None = None
        self.counts: dict[str, int] = {}

    def fault_of(self, connection) -> str | None:
        assert FOLDER is not None
        path = FOLDER / "statements"
        try:
            plan = path.read_text()
        except FileNotFoundError:
            return None
        if not plan.strip():
            return None
        if plan != self.armed:
            self.armed, self.counts = plan, {}
        name = connection.info.parameter_status("application_name") or ""
        wanted, number, fault = plan.rsplit(maxsplit=2)
        if name != wanted:
            return None
        self.counts[name] = self.counts.get(name, 0) + 1
        if self.counts[name] != int(number) or take_line("statements") is None:
            return None
        return fault


def patch_psycopg() -> None:
    import psycopg

    statements = Statements()
    execute = psycopg.Cursor.execute

    def faulty(self, query, params=None, **options):
        connection = self.connection
        fault = statements.fault_of(connection)
        if fault is None:
            return execute(self, query, params, **options)
        text = query if isinstance(query, str) else repr(query)
        note("statement", fault, text.split()[0:3])
        if fault in ("40001", "40P01", "55P03"):
            raising = f"DO $$ BEGIN RAISE EXCEPTION 'injected' USING ERRCODE = '{fault}'; END $$"
            return execute(self, raising)
        if fault == "cut-after":
            execute(self, query, params, **options)
            connection.close()
            raise psycopg.OperationalError("injected: the answer was lost")
        terminate(connection)
        return execute(self, query, params, **options)

    def terminate(connection) -> None:
        url = os.environ["DATABASE_URL"]
        pid = connection.info.backend_pid
        with psycopg.connect(url, autocommit=True) as other:
            other.execute("SELECT pg_terminate_backend(%s, 2000)", (pid,))

    psycopg.Cursor.execute = faulty


def patch_kombu() -> None:
    from kombu.transport import redis

    on_poll_start = redis.MultiChannelPoller.on_poll_start

    def stalling(self) -> None:
        assert FOLDER is not None
        if (FOLDER / "stall").exists():
            for _, redis_client, _ in list(self._chan_to_sock):
                if redis_client.connection is not None:
                    redis_client.connection.disconnect()
            return
        on_poll_start(self)

    redis.MultiChannelPoller.on_poll_start = stalling


def patch_fault_points() -> None:
    from belay_server.runtime import fault_points

    fault_points.reached = reached


def patch_clock(skew: float) -> None:
    real, real_ns = time.time, time.time_ns
    time.time = lambda: real() + skew
    time.time_ns = lambda: real_ns() + int(skew * 1e9)


class AfterImport:
    """Applies a patch after its module has been imported, so that nothing is imported early."""

    def __init__(self) -> None:
        self.patches = {
            "belay_server.runtime.fault_points": patch_fault_points,
            "belay_server.db.postgres.connection": patch_psycopg,
            "belay_workers.background.liveness": patch_kombu,
        }

    def find_spec(self, name, path=None, target=None):
        patch = self.patches.pop(name, None)
        if patch is None:
            return None
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_patch(module) -> None:
            execute(module)
            sys.modules[name] = module
            setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], module)
            patch()

        spec.loader.exec_module = execute_and_patch
        return spec


if FOLDER is not None:
    sys.meta_path.insert(0, AfterImport())
if os.environ.get("FAULT_CLOCK_SKEW"):
    patch_clock(float(os.environ["FAULT_CLOCK_SKEW"]))
