"""Belay behind PgBouncer in transaction mode, in front of a Postgres of 20 connections."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from tests.cluster import Cluster, PgBouncerMissing
from tests.faults.conftest import QUICK

#: Connections of PgBouncer to Postgres, which allows 20 and keeps some of them for superusers.
POOL = 12

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def bounced(scratch) -> Iterator[Cluster]:
    try:
        made = Cluster(
            scratch / "bounced",
            webs=1,
            workers=1,
            concurrency=8,
            connections=20,
            pgbouncer=POOL,
            **QUICK,
        )
    except PgBouncerMissing as missing:
        pytest.skip(str(missing))
    try:
        yield made.start()
    finally:
        made.stop()


@pytest.fixture
def cluster(bounced):
    return bounced


def test_more_runs_than_connections_are_executed_once(cluster, probe):
    runs = [probe.start(seconds=0.2) for _ in range(3 * POOL)]
    for run in runs:
        probe.assert_done_once(*run)
    with psycopg.connect(cluster.postgres.url) as conn:
        [used] = conn.execute(
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        ).fetchone()
    assert 0 < used <= POOL


@pytest.mark.parametrize("kind", ["async_sleep", "spin", "swallow_async"])
@pytest.mark.parametrize("action", ["interrupt", "rollback"])
def test_runs_are_cancelled(client, beats, kind, action):
    thread_id = client.threads.create()["thread_id"]
    client.runs.wait(thread_id, "counter", input={"count": 1})
    before = client.threads.get_state(thread_id)
    given = {"kind": kind, "beats": str(beats)}
    run_id = client.runs.create(thread_id, "nodes", input=given)["run_id"]
    beats.wait_for("begin")
    client.runs.cancel(thread_id, run_id, wait=True, action=action)
    lines = beats.lines()
    if action == "rollback":
        assert client.threads.get_state(thread_id) == before
    else:
        assert client.runs.get(thread_id, run_id)["status"] == "interrupted"
    assert beats.lines() == lines


def test_streams_stores_and_states_work(client, beats):
    thread_id = client.threads.create()["thread_id"]
    given = {"tag": "", "beats": str(beats)}
    parts = client.runs.stream(thread_id, "steps", input=given, stream_mode=["values", "updates"])
    assert [part.event for part in parts].count("updates") == 4
    client.threads.update_state(thread_id, {"steps": ["mine"]}, as_node="s4")
    assert client.threads.get_state(thread_id)["values"]["steps"][-1] == "mine"
    assert len(client.threads.get_history(thread_id)) > 4
    for number in range(3):
        client.store.put_item(("pgbouncer",), str(number), {"number": number})
    found = client.store.search_items(("pgbouncer",), filter={"number": {"$gte": 1}})
    assert sorted(item["key"] for item in found["items"]) == ["1", "2"]


def test_runs_continue_after_a_restart_of_pgbouncer(cluster, probe):
    runs = [probe.start(seconds=0.5) for _ in range(4)]
    for run in runs:
        probe.wait_for(run[2], "s2")
    cluster.pgbouncer.kill()
    cluster.pgbouncer.start()
    for run in runs:
        probe.assert_done_once(*run)


def test_runs_continue_after_the_death_of_their_worker(cluster, probe):
    runs = [probe.start(seconds=0.5) for _ in range(4)]
    for run in runs:
        probe.wait_for(run[2], "s2")
    [worker] = cluster.workers
    worker.kill()
    cluster.restart(worker)
    for run in runs:
        probe.assert_done_once(*run, last=False)
