"""Fixtures that insert rows into a real Postgres."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from psycopg.conninfo import make_conninfo

from belay_server.bus.cancel_flag import CancelFlags
from belay_server.bus.client import Keys, connect_redis
from belay_server.bus.event_log import EventLog
from belay_server.configuration.settings import Settings
from belay_server.db import assistants, runs, threads
from belay_server.db import run_claims as claim_rows
from belay_server.db.assistants import SystemAssistant
from belay_server.db.postgres.connection import connect
from belay_server.domain.assistants import system_assistant_id
from belay_server.domain.run_options import RunKwargs
from belay_server.doorbell import Doorbell
from belay_server.graphs.project.langgraph_json import read_project
from belay_server.graphs.registry import GraphRegistry
from belay_server.services.assistant_cache import AssistantCache
from belay_server.services.parts import RunParts
from tests.servers import PROJECT

LEASE = {"owner": "test/1", "lease_seconds": 30.0, "graph_ids": ["counter"]}


@pytest.fixture
def conn(database_url):
    with connect(database_url) as made:
        yield made


@pytest.fixture
def run_parts(database_url, valkey_url):
    """Yield the parts that create and cancel runs, on real servers but without a worker."""
    settings = Settings.from_environ(
        {"DATABASE_URL": database_url, "REDIS_URL": valkey_url, "BELAY_CONFIG": str(PROJECT)}
    )
    keys, client = Keys(f"{uuid.uuid4().hex}:"), connect_redis(settings)
    yield RunParts(
        settings=settings,
        graphs=GraphRegistry(read_project(PROJECT)),
        doorbell=Doorbell.of(settings),
        cancel_flags=CancelFlags(client, keys),
        event_log=EventLog(client, keys, ttl_seconds=60, max_events=100),
        assistant_cache=AssistantCache(),
        count_unstarted=lambda _status: None,
    )
    client.close()


@pytest.fixture
def many(database_url):
    """Yield a function that runs another on n connections at once and returns the results."""
    opened = []

    def run(n, function):
        while len(opened) < n:
            opened.append(connect(make_conninfo(database_url)))
        with ThreadPoolExecutor(n) as pool:
            return list(pool.map(function, opened[:n], range(n)))

    yield run
    for made in opened:
        made.close()


@pytest.fixture
def rows(conn):
    return Rows(conn)


class Rows:
    """Inserts threads and runs in the state that a test needs."""

    def __init__(self, conn) -> None:
        self.conn = conn
        assistants.put_system_assistants(conn, [SystemAssistant("counter", "counter")])

    def thread(self):
        thread_id = uuid.uuid4()
        threads.insert_thread(self.conn, thread_id, {})
        return thread_id

    def pending(self, thread_id=None, **changes):
        fields = {
            "run_id": uuid.uuid4(),
            "thread_id": thread_id or self.thread(),
            "assistant_id": system_assistant_id("counter"),
            "graph_id": "counter",
            "queue": "runs",
            "metadata": {},
            "kwargs": RunKwargs(config={"configurable": {}}),
            "thread_config": {"tags": ["of the run"]},
            "thread_configurable": {"model": "of the assistant"},
            "multitask_strategy": "enqueue",
            "temporary": False,
            "timeout_seconds": None,
            "after_seconds": 0.0,
        }
        return runs.insert_run(self.conn, runs.NewRun(**{**fields, **changes}), rering_seconds=5.0)

    def running(self, thread_id=None, **changes):
        run = self.pending(thread_id, **changes)
        claimed = claim_rows.claim_run(self.conn, run.run_id, **LEASE)
        assert claimed is not None
        return claimed

    def expire(self, run_id) -> None:
        self.conn.execute(
            "UPDATE run SET lease_expires_at = now() - interval '1 second' WHERE run_id = %s",
            (run_id,),
        )

    def status(self, run_id):
        run = runs.get_run(self.conn, run_id)
        return None if run is None else run.status
