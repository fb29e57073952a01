"""Limits of rate, size and time, and cancels on an overloaded server."""

from __future__ import annotations

import json
import socket
import threading
import time

import httpx
import pytest
from websockets.sync.client import connect

from tests.acceptance.playing import refused
from tests.conformance import watched
from tests.servers import LiveServer
from tests.waiting import wait_until

RUN = {"assistant_id": "counter", "input": {"count": 1}}
LATER = {**RUN, "after_seconds": 3600}


@pytest.fixture(scope="module")
def limited(make_server):
    live = make_server(
        "limits",
        BELAY_AUTH="keys",
        BELAY_RATE_LIMIT="30/minute",
        BELAY_CANCEL_RATE_LIMIT="1000/minute",
        BELAY_MAX_PENDING_RUNS="3",
        BELAY_BODY_SECONDS="1",
        BELAY_HEADER_SECONDS="2",
        BELAY_MAX_OPEN_REQUESTS="8",
        BELAY_MAX_BODY_BYTES="100000",
        BELAY_WEB_POOL_SIZE="2",
    ).start()
    yield live
    live.stop()


def new_client(server: LiveServer, name: str) -> httpx.Client:
    """Return a client with its own new key."""
    headers = {"x-api-key": server.new_key(name)}
    return watched(httpx.Client(base_url=server.url, headers=headers, timeout=60))


def test_a_rate_limited_caller_gets_retry_after_and_can_still_cancel(limited):
    with new_client(limited, "often") as often, new_client(limited, "seldom") as seldom:
        run = often.post("/runs", json=LATER).json()
        answers = [often.post("/threads/search", json={}) for _ in range(40)]
        statuses = [answer.status_code for answer in answers]
        assert statuses[0] == 200
        assert statuses[-1] == 429
        assert refused(answers[-1], 429).startswith("Too many requests")
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
        assert often.post("/runs", json=RUN).status_code == 429
        # Other clients are not affected, and running runs can be cancelled.
        assert seldom.post("/threads/search", json={}).status_code == 200
        cancelled = often.post(f"/threads/{run['thread_id']}/runs/{run['run_id']}/cancel")
        assert cancelled.status_code == 202
        assert often.get("/ok").status_code == 200


def test_websocket_commands_count_toward_the_rate_limit(limited):
    with new_client(limited, "socket") as client:
        thread = client.post("/threads", json={}).json()["thread_id"]
        url = limited.url.replace("http", "ws") + f"/threads/{thread}/stream/events"
        key = {"x-api-key": client.headers["x-api-key"]}
        with connect(url, additional_headers=key) as opened:
            answers = []
            for number in range(40):
                opened.send(json.dumps({"id": number, "method": "agent.getTree"}))
                answers.append(json.loads(opened.recv(20)))
        assert answers[0]["error"] == "no_such_run"
        assert answers[-1]["id"] == 39
        assert answers[-1]["message"].startswith("Too many requests")
        assert client.get(f"/threads/{thread}").status_code == 429


def test_pending_runs_are_capped_by_caller_under_concurrent_creates(limited):
    with new_client(limited, "many") as many, new_client(limited, "few") as few:
        statuses = []

        def create():
            statuses.append(many.post("/runs", json=LATER).status_code)

        threads = [threading.Thread(target=create) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert sorted(statuses) == [200] * 3 + [429] * 7
        answer = many.post("/runs", json=LATER)
        assert refused(answer, 429).startswith("You may have 3 pending runs")
        assert answer.headers["retry-after"]
        batch = few.post("/runs/batch", json=[LATER] * 4)
        assert batch.status_code == 429
        assert few.post("/runs/batch", json=[LATER] * 3).status_code == 200
        assert many.post("/runs/cancel", json={"status": "pending"}).status_code == 204
        assert many.post("/runs", json=LATER).status_code == 200


def test_a_slow_body_times_out_with_408(limited):
    with new_client(limited, "slow") as client:
        key = client.headers["x-api-key"]
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", limited.port), timeout=30) as slow:
        head = f"POST /threads HTTP/1.1\r\nHost: localhost\r\nx-api-key: {key}\r\n"
        slow.sendall(f"{head}Content-Length: 1000\r\n\r\n".encode())
        answer = b""
        while b"too long to come in" not in answer:
            slow.settimeout(0.2)
            try:
                chunk = slow.recv(4096)
                assert chunk, answer
                answer += chunk
            except TimeoutError:
                slow.sendall(b" ")
            assert time.monotonic() - began < 20, "nobody gave it up"
    assert answer.startswith(b"HTTP/1.1 408")


def test_a_connection_with_slow_headers_is_closed(limited):
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", limited.port), timeout=0.2) as slow:
        slow.sendall(b"GET /ok HTTP/1.1\r\nHost: localhost\r\n")
        while time.monotonic() - began < 20:
            try:
                if slow.recv(4096) == b"":
                    return
            except TimeoutError:
                slow.sendall(b"X-More: y\r\n")
            except ConnectionError:
                return
    pytest.fail("nobody gave it up")


def test_the_open_requests_of_a_caller_are_limited_except_for_cancels(limited):
    with new_client(limited, "open") as client:
        thread = client.post("/threads", json={}).json()["thread_id"]
        run = client.post(f"/threads/{thread}/runs", json=LATER).json()
        path = f"/threads/{thread}/runs/{run['run_id']}"
        streams = [
            client.send(client.build_request("GET", f"{path}/stream"), stream=True)
            for _ in range(8)
        ]
        answer = client.get(path)
        assert refused(answer, 429) == "You have 8 requests open already"
        assert client.get("/ok").status_code == 200
        streams.pop().close()
        wait_until(lambda: client.get(path).status_code == 200, 10, "a place to be free")
        assert client.post(f"{path}/cancel").status_code == 202
        for stream in streams:
            stream.read()
            stream.close()


def test_a_body_that_is_too_large_is_refused_while_it_is_received(limited):
    with new_client(limited, "large") as client:
        endless = (b"[" + b" " * 10_000 for _ in range(10_000))
        assert client.post("/threads", content=b" " * 100_001).status_code == 413
        answer = client.post("/threads", content=endless)
        assert answer.status_code == 413, answer.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/runs/batch", [{}] * 1_001),
        ("/threads/prune", {"thread_ids": ["x"] * 1_001}),
        ("/threads/search", {"ids": ["x"] * 1_001}),
        ("/runs", {**RUN, "interrupt_before": ["x"] * 10_001}),
        ("/runs", {**RUN, "feedback_keys": ["x"] * 1_001}),
        ("/runs", {**RUN, "config": {"tags": ["x"] * 1_001}}),
    ],
    ids=["batch", "prune", "search", "nodes", "feedback", "tags"],
)
def test_lists_longer_than_the_limit_are_refused(limited, path, body):
    with new_client(limited, "lists") as client:
        assert client.post(path, json=body).status_code == 422


def test_responses_have_security_headers(limited):
    with new_client(limited, "headers") as client:
        for answer in (client.get("/ok"), client.post("/threads", json={}), client.get("/none")):
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["x-frame-options"] == "DENY"
            assert answer.headers["referrer-policy"] == "no-referrer"
            assert answer.headers["cache-control"] == "no-store"


def test_a_cancel_succeeds_while_every_connection_is_occupied(limited):
    """All connections to Postgres wait for one lock, and so do further requests."""
    import psycopg

    with new_client(limited, "flooded") as client:
        busy, thread = (client.post("/threads", json={}).json()["thread_id"] for _ in "ab")
        run = client.post(f"/threads/{busy}/runs", json=LATER).json()
        path = f"/threads/{run['thread_id']}/runs/{run['run_id']}"
        with psycopg.connect(limited.database_url) as blocker:
            blocker.execute("SELECT 1 FROM thread WHERE thread_id = %s FOR UPDATE", (thread,))
            flood = [
                threading.Thread(
                    target=lambda: client.patch(f"/threads/{thread}", json={"metadata": {"a": 1}})
                )
                for _ in range(6)
            ]
            for one in flood:
                one.start()
            waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            with psycopg.connect(limited.database_url, autocommit=True) as looks:
                wait_until(
                    lambda: looks.execute(waiting).fetchone()[0] >= 2, 20, "every connection taken"
                )
            assert client.post(f"{path}/cancel", timeout=3).status_code == 202
            blocker.rollback()
        for one in flood:
            one.join(30)
        assert client.get(path).json()["status"] == "interrupted"
