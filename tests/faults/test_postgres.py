"""Postgres is unavailable, cuts connections or is read-only: no accepted run is lost or executed
twice, and requests that fail get a 503."""

from __future__ import annotations

import json
import signal
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx
import psycopg
import pytest
from langgraph_sdk import get_sync_client

from tests.faults.conftest import LEASE_SECONDS, Probe, pass_time, signal_tree
from tests.long_forms import full_case, long_case
from tests.waiting import wait_until

CONFLICTS = ("40001", "40P01", "55P03")
FAULTS = ["cut-before", *map(long_case, ("cut-after", *CONFLICTS))]


def each_statement(cluster, connection: str, fault: str):
    """Yield a function that plans the fault, for one statement after the other until the last."""
    number, injected = 0, True
    while injected:
        number += 1
        cluster.clear_plans()
        yield partial(cluster.plan, "statements", f"{connection} {number} {fault}")
        injected = bool(cluster.injected())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_any_statement_of_an_attempt_is_retried_in_place(cluster, probe, fault):
    """Cover claim, checkpoints, writes and end: each statement in turn."""
    tried = 0
    for plan in each_statement(cluster, "belay child", fault):
        tried += 1
        plan()
        thread_id, run_id, tag = probe.start()
        probe.assert_done_once(thread_id, run_id, tag)
        # It was the same attempt: no other was charged, and no step was executed again.
        assert probe.row(run_id)["attempts"] == 1
        assert probe.starts(tag) == ["s1", "s2", "s3", "s4"]
    assert tried > 8


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_any_statement_of_a_cancelled_run_leaves_it_cancelled(cluster, probe, fault):
    tried = 0
    for plan in each_statement(cluster, "belay child", fault):
        tried += 1
        thread_id, run_id, tag = probe.start(seconds=5.0, graph="probe")
        probe.wait_for(tag, "s1")
        plan()
        probe.client.runs.cancel(thread_id, run_id, action="rollback")
        assert probe.wait_until_over(thread_id, run_id) is None
        assert probe.client.threads.get_state(thread_id)["values"] in ({}, [], None)
        assert probe.starts(tag) == ["s1"]
    assert tried > 3


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_any_statement_of_a_create_accepts_the_run_once(cluster, probe, fault):
    number = 0
    while True:
        number += 1
        cluster.clear_plans()
        thread_id = probe.client.threads.create()["thread_id"]
        cluster.plan("statements", f"belay web {number} {fault}")
        given = {"tag": f"w{number}", "history": str(probe.history)}
        body = {"assistant_id": "sync_probe", "input": given, "run_id": str(uuid.uuid4())}
        answer = httpx.post(f"{cluster.url}/threads/{thread_id}/runs", json=body, timeout=30)
        assert answer.status_code == 200, answer.text
        injected = cluster.injected()
        cluster.clear_plans()
        probe.assert_done_once(thread_id, body["run_id"], f"w{number}")
        assert len(probe.client.runs.list(thread_id)) == 1
        if not injected:
            break
    assert number > 5


@pytest.mark.parametrize("connection", ["belay supervisor keep", long_case("belay sweeper")])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_worker_continues_after_its_own_connections_fail(cluster, probe, connection, fault):
    cluster.plan("statements", f"{connection} 2 {fault}")
    thread_id, run_id, tag = probe.start(seconds=0.5)
    probe.assert_done_once(thread_id, run_id, tag)
    assert cluster.injected()
    assert probe.row(run_id)["attempts"] == 1


@pytest.mark.parametrize("fault", FAULTS)
def test_the_end_of_a_dead_child_is_written_despite_connection_faults(cluster, probe, fault):
    for number in range(1, 5):
        cluster.clear_plans()
        cluster.plan("P8", "kill")
        cluster.plan("statements", f"belay supervisor end {number} {fault}")
        thread_id, run_id, tag = probe.start()
        probe.assert_done_once(thread_id, run_id, tag)
        assert probe.row(run_id)["attempts"] == 2


@pytest.mark.parametrize(
    ("number", "away"),
    [
        full_case(signal.SIGINT, 0.0, id="fast"),
        pytest.param(signal.SIGQUIT, 0.0, id="immediate"),
        full_case(signal.SIGQUIT, 2 * LEASE_SECONDS, id="immediate, longer than a lease"),
        full_case(signal.SIGKILL, 0.0, id="crash"),
        full_case(signal.SIGINT, 2 * LEASE_SECONDS, id="fast, longer than a lease"),
        full_case(signal.SIGKILL, 2 * LEASE_SECONDS, id="crash, longer than a lease"),
    ],
)
def test_a_restart_of_postgres_costs_a_run_no_attempt_and_no_step(cluster, probe, number, away):
    thread_id, run_id, tag = probe.start(seconds=0.3, stream_resumable=True)
    queued = probe.start(thread_id=thread_id)
    probe.wait_for(tag, "s2")
    told: dict[str, str] = {}
    listeners = [
        threading.Thread(target=follow, args=(cluster, thread_id, run_id, path, told))
        for path in ("join", "stream")
    ]
    for listener in listeners:
        listener.start()
    wait_until(lambda: told.keys() == {"join", "stream"}, what="both to be answered")
    cluster.postgres.shut_down(number)
    refused = httpx.post(f"{cluster.url}/threads", json={}, timeout=30)
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    assert refused.json()["detail"]
    pass_time(away)
    cluster.postgres.start()
    probe.assert_done_once(thread_id, run_id, tag, last=False)
    probe.assert_done_once(*queued)
    assert probe.row(run_id)["attempts"] == 1
    assert probe.starts(tag) == ["s1", "s2", "s3", "s4"]
    for listener in listeners:
        listener.join(20)
    assert json.loads(told["join"])["done"] == [f"{tag}:s{n}" for n in (1, 2, 3, 4)]
    assert f"{tag}:s4" in told["stream"]


def follow(cluster, thread_id, run_id, path, told) -> None:
    """Join a run and record what the client receives until the response ends."""
    url = f"{cluster.url}/threads/{thread_id}/runs/{run_id}/{path}"
    # From the start: on a slow machine the run may have ended before the client is connected.
    headers = {"last-event-id": "-1"}
    with httpx.stream("GET", url, headers=headers, timeout=60) as answer:
        assert answer.status_code == 200
        told[path] = ""
        for text in answer.iter_text():
            told[path] += text


def test_no_run_is_taken_over_after_postgres_hangs_longer_than_a_lease(cluster, probe):
    runs = [probe.start(seconds=0.3) for _ in range(4)]
    for run in runs:
        probe.wait_for(run[2], "s1")
    signal_tree(cluster.postgres, signal.SIGSTOP)
    pass_time(2 * LEASE_SECONDS)
    signal_tree(cluster.postgres, signal.SIGCONT)
    for run in runs:
        probe.assert_done_once(*run)
        assert probe.row(run[1])["attempts"] == 1
        assert probe.starts(run[2]) == ["s1", "s2", "s3", "s4"]


def test_while_postgres_is_read_only_writes_get_503_and_no_run_is_lost(cluster, probe):
    thread_id, run_id, tag = probe.start(seconds=0.4)
    probe.wait_for(tag, "s1")
    settle = "SELECT pg_reload_conf()"

    def sql(*statements: str) -> None:
        with psycopg.connect(cluster.postgres.url, autocommit=True) as conn:
            conn.execute("SET default_transaction_read_only = off")
            for statement in statements:
                conn.execute(statement)

    sql("ALTER SYSTEM SET default_transaction_read_only = on", settle)
    try:

        def refused() -> httpx.Response | None:
            answer = httpx.post(f"{cluster.url}/threads", json={}, timeout=30)
            return answer if answer.status_code == 503 else None

        answer = wait_until(refused, what="the server to be read-only")
        assert answer.headers["retry-after"]
        assert probe.status(thread_id, run_id) == "running"  # reads still succeed
        pass_time(1.5 * LEASE_SECONDS)
        assert probe.status(thread_id, run_id) == "running"
    finally:
        sql("ALTER SYSTEM RESET default_transaction_read_only", settle)
    probe.assert_done_once(thread_id, run_id, tag)
    assert probe.row(run_id)["attempts"] == 1
    assert probe.starts(tag) == ["s1", "s2", "s3", "s4"]


@pytest.mark.long
@pytest.mark.parametrize("requests", [100, full_case(500)])
def test_a_flood_of_requests_costs_no_lease_and_no_accepted_run(make_cluster, tmp_path, requests):
    """All requests share two connections at once, while runs continue."""
    cluster = make_cluster(workers=1, concurrency=4, BELAY_WEB_POOL_SIZE="2")
    with get_sync_client(url=cluster.url) as client:
        probe = Probe(cluster, client, tmp_path / "history")
        runs = [probe.start(seconds=0.8) for _ in range(4)]
        answers: list[int] = []
        lock = threading.Lock()

        def ask(number: int) -> None:
            body = {"assistant_id": "counter", "input": {"count": number}}
            answer = httpx.post(f"{cluster.url}/runs", json=body, timeout=60)
            with lock:
                answers.append(answer.status_code)
            if answer.status_code == 503:
                assert answer.headers["retry-after"]

        with ThreadPoolExecutor(100) as pool:
            list(pool.map(ask, range(requests)))
        assert set(answers) <= {200, 503}
        assert answers.count(200) >= 50
        for run in runs:
            probe.assert_done_once(*run)
            assert probe.row(run[1])["attempts"] == 1

        def accepted() -> int:
            with psycopg.connect(cluster.postgres.url) as conn:
                sql = "SELECT count(*) FROM run WHERE graph_id = 'counter' AND status = 'success'"
                return conn.execute(sql).fetchone()[0]

        wait_until(lambda: accepted() == answers.count(200), 60, "every accepted run to end")


@pytest.mark.long
def test_every_request_gets_503_while_postgres_hangs(cluster, probe):
    """Every request gets a 503 while the server hangs, even on an established connection."""
    thread_id = probe.client.threads.create()["thread_id"]
    url = f"{cluster.url}/threads/{thread_id}"
    assert httpx.get(url, timeout=30).status_code == 200
    paths = ["", "/state", "/history", "/runs"]
    signal_tree(cluster.postgres, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(32) as pool:
            asked = [
                pool.submit(httpx.get, url + paths[number % 4], timeout=120) for number in range(32)
            ]
            wait_until(lambda: all(one.done() for one in asked), 60, "answers")
        assert {one.result().status_code for one in asked} == {503}
    finally:
        signal_tree(cluster.postgres, signal.SIGCONT)
    wait_until(lambda: httpx.get(url, timeout=60).status_code == 200, 60, "it to answer again")
    probe.assert_done_once(*probe.start())
