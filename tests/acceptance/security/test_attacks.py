"""Attacks by a hostile tenant. Each of them succeeded once."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import httpcore
import httpx
import psutil
import psycopg
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from belay_server.services.webhooks.deadline_http import ERRORS, post
from tests.acceptance.playing import leave_handshakes, refused, socket_url
from tests.conformance import watched
from tests.receiver import Receiver
from tests.servers import LiveServer
from tests.waiting import wait_until

RUN = {"assistant_id": "counter", "input": {"count": 1}}
LATER = {**RUN, "after_seconds": 3600}


@pytest.fixture(scope="module")
def attacked(make_server):
    """Yield a server with low limits, so that attacks can be small."""
    live = make_server(
        "attacked",
        BELAY_HEARTBEAT_SECONDS="1",
        BELAY_WEBHOOK_ALLOW_PRIVATE="1",
        BELAY_CRON_SHORTEST_SECONDS="10",
        BELAY_MAX_CRONS="3",
        BELAY_MAX_PENDING_RUNS="20",
        BELAY_MAX_OPEN_REQUESTS="10",
        BELAY_MAX_RUN_BYTES=str(4 * 1024 * 1024),
        BELAY_MAX_METADATA_BYTES="100000",
        BELAY_MAX_OUTCOME_BYTES="100000",
        BELAY_MAX_ANSWER_BYTES="1000000",
        BELAY_MAX_VERSIONS_BYTES="200000",
        BELAY_CORS_ORIGINS="https://good.example",
    ).start()
    yield live
    live.stop()


@pytest.fixture
def api(attacked):
    with watched(httpx.Client(base_url=attacked.url, timeout=60)) as client:
        yield client


def web_memory(server: LiveServer) -> int:
    """Return the memory of the web processes in bytes."""
    return sum(p.memory_info().rss for p in server.find("gunicorn"))


# --- one request blocks all others ----------------------------------------------------------------


def test_an_invalid_store_namespace_fails_the_run_and_frees_its_slot(api):
    body = {"assistant_id": "hostile", "input": {"label": os.urandom(3_000).hex()}}
    error = api.post("/runs/wait", json=body).json()["__error__"]
    assert error["error"] in ("ProgramLimitExceeded", "InvalidNamespaceError")
    assert api.post("/runs/wait", json=RUN).json() == {"count": 2}


def test_a_run_with_a_webhook_and_a_large_context_can_be_cancelled(api):
    with ExitStack() as stack:
        receiver = Receiver()
        stack.callback(receiver.close)
        thread = api.post("/threads", json={}).json()["thread_id"]
        body = {
            "assistant_id": "hostile",
            "input": {"seconds": 60},
            "context": {"x": "y" * 1_500_000},
            "webhook": f"{receiver.url}/hook",
        }
        run = api.post(f"/threads/{thread}/runs", json=body).json()
        path = f"/threads/{thread}/runs/{run['run_id']}"
        wait_until(lambda: api.get(path).json()["status"] == "running", 30)
        assert api.post(f"{path}/cancel?wait=1").status_code in (200, 202, 204)
        assert api.get(path).json()["status"] == "interrupted"
        told = receiver.wait_for(run["run_id"])
        assert told["kwargs"]["context"] == body["context"]
        assert set(told) >= {"run_id", "status", "values", "run_started_at", "metadata"}
        assert api.delete(f"/threads/{thread}").status_code == 204


def test_a_run_larger_than_the_limit_is_refused(api):
    for path in ("/runs", "/runs/wait", "/runs/batch", "/runs/crons"):
        body = {**RUN, "context": {"x": "y" * 2_500_000}}
        if path == "/runs/crons":
            body |= {"schedule": "0 0 1 1 *", "input": {"x": "y" * 2_500_000}}
        answer = api.post(path, json=[body] if path == "/runs/batch" else body)
        limit = "BELAY_MAX_CRON_BYTES" if path == "/runs/crons" else "BELAY_MAX_RUN_BYTES"
        assert limit in refused(answer, 413), path


def test_metadata_cannot_exceed_its_limit_by_merging(api):
    thread = api.post("/threads", json={}).json()["thread_id"]
    path = f"/threads/{thread}"
    assert api.patch(path, json={"metadata": {"a": "x" * 60_000}}).status_code == 200
    answer = api.patch(path, json={"metadata": {"b": "x" * 60_000}})
    assert "BELAY_MAX_METADATA_BYTES" in refused(answer, 413)
    assert list(api.get(path).json()["metadata"]) == ["a"]
    made = api.post("/assistants", json={"graph_id": "counter", "context": {"x": "y" * 120_000}})
    assert made.status_code == 413


@pytest.mark.parametrize("field", ["config", "context", "metadata"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/assistants", {"graph_id": "counter"}),
        ("/runs", {"assistant_id": "counter"}),
        ("/runs/crons", {"assistant_id": "counter", "schedule": "0 0 1 1 *"}),
    ],
)
def test_documents_that_are_merged_by_key_have_few_keys(api, path, body, field):
    """Runs whose configurable had 99,000 keys took 300 ms each, in which nobody was served."""
    many = {str(number): 0 for number in range(10_001)}
    given = {"configurable": many} if field == "config" else many
    answer = api.post(path, json={**body, field: given})
    assert " keys; at most 10,000 are allowed" in refused(answer, 413)


def test_the_metadata_of_a_thread_has_few_keys_also_after_merging(api):
    halves = [{f"{half}{number}": 0 for number in range(5_001)} for half in "ab"]
    thread = api.post("/threads", json={"metadata": halves[0]}).json()["thread_id"]
    answer = api.patch(f"/threads/{thread}", json={"metadata": halves[1]})
    assert "has 10,002 keys; at most 10,000 are allowed" in refused(answer, 413)


def test_a_value_below_a_key_may_have_many_keys(api):
    context = {"below": {f"{number:x}": 0 for number in range(10_001)}}
    assert api.post("/runs/wait", json={**RUN, "context": context}).json() == {"count": 2}


def test_the_stored_versions_of_an_assistant_are_bounded(api):
    body = {"graph_id": "counter", "context": {"text": os.urandom(30_000).hex()}}
    made = api.post("/assistants", json=body).json()
    path = f"/assistants/{made['assistant_id']}"
    for number in range(10):
        newest = api.patch(path, json={"metadata": {"number": number}}).json()
        assert newest["version"] == number + 2
    kept = [one["version"] for one in api.post(f"{path}/versions", json={}).json()]
    assert kept == list(range(11, 11 - len(kept), -1))
    assert 1 <= len(kept) <= 200_000 / 60_000
    answer = api.post(f"{path}/latest", json={"version": 1})
    assert "Version 1 not found" in refused(answer, 404)
    assert api.get(path).json() == newest


def test_large_values_are_read_from_the_checkpoint(api):
    thread = api.post("/threads", json={}).json()["thread_id"]
    body = {"assistant_id": "hostile", "input": {"size": 300_000}}
    values = api.post(f"/threads/{thread}/runs/wait", json=body).json()
    assert len(values["text"]) == 300_000
    [run] = api.get(f"/threads/{thread}/runs").json()
    again = api.get(f"/threads/{thread}/runs/{run['run_id']}/join").json()
    assert again == values
    assert api.get(f"/threads/{thread}/state").json()["values"] == values
    assert api.get(f"/threads/{thread}").json()["values"] is None
    assert api.get(f"/threads/{thread}").json()["status"] == "idle"


@pytest.fixture
def crowded(api):
    """Create fifteen of each resource, each below the limits, with a word to search for."""
    word, text = uuid.uuid4().hex, "x" * 90_000
    threads = [
        api.post("/threads", json={"metadata": {"word": word, "text": text}}).json()
        for _ in range(15)
    ]
    made = {"graph_id": "counter", "metadata": {"word": word}, "context": {"text": text}}
    assistant = api.post("/assistants", json=made).json()["assistant_id"]
    thread = threads[0]["thread_id"]
    api.post(f"/threads/{thread}/runs/wait", json={**RUN, "assistant_id": "hostile", "input": {}})
    for number in range(15):
        values = {"text": f"{number}{text}"}
        api.post(f"/threads/{thread}/state", json={"values": values}).raise_for_status()
        item = {"namespace": [word], "key": str(number), "value": {"text": text}}
        api.put("/store/items", json=item).raise_for_status()
    return word, thread, assistant


def test_a_response_larger_than_the_limit_is_refused(api, crowded):
    word, thread, assistant = crowded
    found = {"metadata": {"word": word}}

    def ask(method, path, **how):
        return api.request(method, path, **how)

    for limit, status in ((1000, 422), (3, 200)):
        answers = [
            ask("POST", "/threads/search", json={**found, "limit": limit}),
            ask("POST", "/store/items/search", json={"namespace_prefix": [word], "limit": limit}),
            ask("GET", f"/threads/{thread}/history", params={"limit": limit}),
            ask("POST", f"/threads/{thread}/history", json={"limit": limit}),
        ]
        for answer in answers:
            if status == 422:
                assert "BELAY_MAX_ANSWER_BYTES" in refused(answer, 422)
            else:
                answer.raise_for_status()
    batch = [{**LATER, "assistant_id": assistant}] * 15
    assert "BELAY_MAX_ANSWER_BYTES" in refused(api.post("/runs/batch", json=batch), 422)
    assert api.get(f"/threads/{thread}/history", params={"limit": 10}).status_code == 200


def test_a_history_read_in_parts_is_complete(api):
    thread = api.post("/threads", json={}).json()["thread_id"]
    api.post(f"/threads/{thread}/runs/wait", json={**RUN, "assistant_id": "hostile", "input": {}})
    for number in range(30):
        values = {"values": {"text": str(number)}}
        api.post(f"/threads/{thread}/state", json=values).raise_for_status()
    states = api.get(f"/threads/{thread}/history", params={"limit": 1000}).json()
    texts = [state["values"].get("text") for state in states]
    assert texts[:31] == [*(str(n) for n in reversed(range(30))), "x"]
    ids = [state["checkpoint"]["checkpoint_id"] for state in states]
    assert ids == sorted(set(ids), reverse=True)
    some = api.get(f"/threads/{thread}/history", params={"limit": 7, "before": ids[4]}).json()
    assert [state["checkpoint"]["checkpoint_id"] for state in some] == ids[5:12]


def test_the_message_of_an_error_is_truncated(api):
    body = {"assistant_id": "hostile", "input": {"message": "x" * 1000, "size": 1000}}
    error = api.post("/runs/wait", json=body).json()["__error__"]
    assert len(error["message"]) < 21_000
    assert "980000 characters cut off" in error["message"]


#: Python 3.13 replaces a GeneratorExit that leaves a coroutine.
_EXITED = "coroutine ignored GeneratorExit" if sys.version_info >= (3, 13) else "no way on"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"escaped": json.dumps("half \ud83d")}, "cannot parse half ?"),
        ({"escaped": json.dumps("a \x00 NUL")}, "cannot parse a \ufffd NUL"),
        ({"raises": "Unprintable"}, "(its message cannot be formatted: KeyError)"),
        ({"raises": "Panic"}, "no way on"),
        ({"raises": "GeneratorExit"}, _EXITED),
    ],
    ids=["surrogate", "NUL", "unprintable", "panic", "GeneratorExit"],
)
@pytest.mark.parametrize("graph", ["hostile", "hostile_async"])
def test_an_unusual_exception_of_a_node_ends_the_run_at_the_first_attempt(
    api, graph, given, message
):
    thread_id = api.post("/threads", json={}).json()["thread_id"]
    body = {**RUN, "assistant_id": graph, "input": given}
    found = api.post(f"/threads/{thread_id}/runs/wait", json=body).json()["__error__"]
    assert found["message"] == message
    thread = api.get(f"/threads/{thread_id}").json()
    assert (thread["status"], thread["error"]["message"]) == ("error", message)


# --- memory and time ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        lambda: b"{" + b",".join(b'"%d":1' % i for i in range(300_000)) + b"}",
        lambda: b'{"a": ' + b"[" + b"[]," * 300_000 + b"1]}",
        lambda: b'{"a": [' + b'"",' * 300_000 + b"1]}",
        lambda: b'{"a": [' + b'"\\\\",' * 300_000 + b"1]}",
    ],
    ids=["keys", "arrays", "strings", "escapes"],
)
def test_a_body_with_too_many_values_is_refused(api, values):
    body = b'{"metadata": ' + values() + b"}"
    headers = {"content-type": "application/json"}
    for path in ("/threads", "/runs", "/assistants", "/store/items"):
        method = "PUT" if path == "/store/items" else "POST"
        answer = api.request(method, path, content=body, headers=headers)
        assert "BELAY_MAX_BODY_VALUES" in refused(answer, 422), path


@pytest.mark.parametrize("path", ["/runs", "/threads", "/agent/runs", "/nowhere", "/ok"])
def test_invalid_chunks_are_refused_without_a_traceback(attacked, path):
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", attacked.port), timeout=20) as connection:
        connection.sendall(head.encode() + b"zz\r\n{}\r\n0\r\n\r\n")
        assert connection.recv(4096).split(b" ")[1][:1] == b"4"
    assert "InvalidChunkSize" not in attacked.log_until_now()


def test_a_deeply_nested_query_parameter_is_refused(api):
    thread = api.post("/threads", json={}).json()["thread_id"]
    deep = '{"a":' + "[" * 300 + "]" * 300 + "}"
    answer = api.get(f"/threads/{thread}/runs", params={"metadata": deep})
    assert "levels deep" in refused(answer, 422)


def test_a_websocket_refuses_compression_and_large_messages(attacked, api):
    thread = api.post("/threads", json={}).json()["thread_id"]
    with connect(socket_url(attacked, thread), compression="deflate") as opened:
        assert "Sec-WebSocket-Extensions" not in opened.response.headers
        opened.send(
            json.dumps({"id": 1, "method": "agent.getTree", "params": {"x": "y" * 1_200_000}})
        )
        with pytest.raises(ConnectionClosed) as closed:
            opened.recv(20)
        assert closed.value.rcvd.code == 1009


_HANDSHAKE = {"sec-websocket-version": "13", "sec-websocket-key": "A" * 22 + "=="}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"sec-websocket-version": "13"}, 400),
        ({"sec-websocket-version": "99", "sec-websocket-key": "A" * 22 + "=="}, 426),
        ({"sec-websocket-key": "A" * 22 + "=="}, 426),
        ({**_HANDSHAKE, "sec-websocket-protocol": b"caf\xc3\xa9"}, 400),
        ({**_HANDSHAKE, "connection": b"\xff, upgrade"}, 400),
    ],
    ids=["no key", "other version", "no version", "protocol", "connection"],
)
def test_an_invalid_websocket_handshake_is_refused(attacked, api, headers, status):
    thread = api.post("/threads", json={}).json()["thread_id"]
    upgrade = {"connection": "upgrade", "upgrade": "websocket", **headers}
    url = f"{attacked.url}/threads/{thread}/stream/events"
    answer = httpx.get(url, headers={**upgrade, "host": "localhost"})
    assert "handshake is not valid" in refused(answer, status)
    assert answer.headers["sec-websocket-version"] == "13"


def test_a_client_that_leaves_within_its_handshake_is_no_error(attacked, api):
    thread = api.post("/threads", json={}).json()["thread_id"]
    before = attacked.log_until_now().count("Traceback")
    leave_handshakes(attacked.port, thread, "")
    assert attacked.log_until_now().count("Traceback") == before


@pytest.mark.long
def test_an_unread_websocket_does_not_accumulate_messages(attacked, api):
    """Fifty megabytes are sent; the server may hold only a few of them."""
    thread = api.post("/threads", json={}).json()["thread_id"]
    before = web_memory(attacked)
    with connect(socket_url(attacked, thread), compression=None, max_size=None) as opened:
        message = json.dumps({"id": 1, "method": "x" * 500_000})
        sent = []

        def send():
            with suppress(ConnectionClosed, OSError):
                for _ in range(100):
                    opened.send(message)
                    sent.append(1)

        sending = threading.Thread(target=send, daemon=True)
        # Nothing is received here: the responses fill the client's buffer, then the server blocks.
        sending.start()
        sending.join(5)
        grown = web_memory(attacked) - before
        opened.socket.shutdown(socket.SHUT_RDWR)
    sending.join(20)
    assert grown < 60 * 1024 * 1024
    assert api.get("/ok").status_code == 200


@pytest.mark.long
def test_unfinished_bodies_do_not_exhaust_the_memory(guarded, dave):
    """Forty clients send 7.5 of 8 MB and wait; another client's request succeeds meanwhile."""
    before = web_memory(guarded)
    head = (
        "POST /runs HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer carol\r\n"
        "Content-Type: application/json\r\nContent-Length: 8000000\r\n\r\n"
    )
    sent = head.encode() + b" " * 7_500_000
    with ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_connection(("127.0.0.1", guarded.port)))
            for _ in range(40)
        ]

        def send(one: socket.socket) -> None:
            one.settimeout(3)
            with suppress(OSError):
                one.sendall(sent)

        with ThreadPoolExecutor(40) as many:
            list(many.map(send, sockets))
        grown = web_memory(guarded) - before
        body = {**RUN, "context": {"text": "x" * 5_000_000}}
        assert dave.post("/runs/wait", json=body).status_code == 200
    assert grown < 150 * 1024 * 1024


@pytest.mark.long
def test_unread_responses_do_not_exhaust_the_memory(make_server):
    """Forty clients request a history of 12 MB and read nothing."""
    live = make_server(
        "unread",
        BELAY_MAX_ANSWERS_BYTES=str(64 * 1024 * 1024),
        BELAY_MAX_ANSWER_BYTES=str(16 * 1024 * 1024),
        BELAY_BODY_SECONDS="5",
    ).start()
    try:
        with ExitStack() as stack:
            client = stack.enter_context(watched(httpx.Client(base_url=live.url, timeout=60)))
            thread = client.post("/threads", json={"graph_id": "hostile"}).json()["thread_id"]
            update = {"values": {"text": "x" * 4_000_000}, "as_node": "obey"}
            for _ in range(3):
                client.post(f"/threads/{thread}/state", json=update).raise_for_status()
            path = f"/threads/{thread}/history?limit=1000"
            assert len(client.get(path).content) > 12_000_000
            before = web_memory(live)
            sockets = []
            for _ in range(40):
                one = stack.enter_context(socket.socket())
                one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                one.settimeout(30)
                one.connect(("127.0.0.1", live.port))
                one.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                sockets.append(one)
            statuses = [one.recv(12)[-3:] for one in sockets]
            assert b"200" in statuses
            assert b"429" in statuses
            # Less than 40 × 12 MB, although the rejected responses were built too.
            assert web_memory(live) - before < 250 * 1024 * 1024
            wait_until(lambda: client.get(path).status_code == 200, 60, "an end of the unread")
    finally:
        live.stop()


def test_waiting_for_a_large_run_does_not_delay_another(api):
    """Large bodies are processed one at a time, but waiting for the run is not part of it."""
    thread = api.post("/threads", json={}).json()["thread_id"]
    body = {"assistant_id": "hostile", "input": {"seconds": 60}, "context": {"t": "x" * 600_000}}
    with ThreadPoolExecutor(1) as one:
        slow = one.submit(api.post, f"/threads/{thread}/runs/wait", json=body)
        runs = wait_until(lambda: api.get(f"/threads/{thread}/runs").json(), 20, "the slow run")
        assert api.post("/runs/wait", json={**RUN, "context": body["context"]}).status_code == 200
        path = f"/threads/{thread}/runs/{runs[0]['run_id']}"
        assert api.post(f"{path}/cancel?wait=1").status_code in (200, 202, 204)
        assert slow.result().status_code == 200


# --- the database ---------------------------------------------------------------------------------


def test_a_filter_of_long_lists_is_refused(api):
    """Each element is compared with each of a row's: 60,000 by 60,000 took minutes and could not be
    interrupted."""
    many, few = {"a": [{"n": n} for n in range(51)]}, {"a": [{"n": n} for n in range(50)]}
    nested = {"a": {"b": [[1] * 30, {"c": [2] * 30}]}}
    thread = api.post("/threads", json={}).json()["thread_id"]
    for path, name in (
        ("/threads/search", "metadata"),
        ("/threads/search", "values"),
        ("/threads/count", "metadata"),
        ("/threads/count", "values"),
        ("/assistants/search", "metadata"),
        ("/assistants/count", "metadata"),
        ("/runs/crons/search", "metadata"),
        ("/runs/crons/count", "metadata"),
        (f"/threads/{thread}/history", "metadata"),
    ):
        for filter_ in (many, nested):
            answer = api.post(path, json={name: filter_})
            assert "lists may have at most 50 elements" in refused(answer, 422), path
        assert api.post(path, json={name: few}).status_code == 200, path
    runs = f"/threads/{thread}/runs"
    assert api.get(runs, params={"metadata": json.dumps(many)}).status_code == 422
    assert api.get(runs, params={"metadata": json.dumps(few)}).status_code == 200


def test_long_lists_of_ids_are_refused(api):
    ids = [str(uuid.UUID(int=0))] * 20_000
    for path, name in (("/threads/search", "ids"), ("/threads/prune", "thread_ids")):
        assert "Longer than maximum length" in refused(api.post(path, json={name: ids}), 422)
    body = {"thread_id": ids[0], "run_ids": ids}
    assert "Longer than maximum length" in refused(api.post("/runs/cancel", json=body), 422)


def test_an_item_with_too_many_texts_to_embed_is_refused(api):
    """Tens of thousands of texts made a statement too large to send, reported as an outage."""
    item = {"namespace": ["v"], "key": "k", "index": ["a[*].b"]}
    many = {**item, "value": {"a": [{"b": "x"}] * 30_000}}
    answer = api.put("/store/items", json=many)
    assert "find 30000 texts; at most 200 are allowed" in refused(answer, 422)
    few = {**item, "value": {"a": [{"b": "x"}] * 20}}
    assert api.put("/store/items", json=few).status_code == 204


def test_too_many_index_paths_into_a_large_item_are_refused(api):
    """A hundred paths into 190,000 values once kept the web process busy for fifteen seconds."""
    item = {"namespace": ["v"], "key": "k", "value": {"a": [1] * 30_000}}
    for paths in ([f"a[*].c{n}" for n in range(100)], ["{" + ",".join("abcdefgh") + "}"]):
        answer = api.put("/store/items", json={**item, "index": paths})
        assert "values take too long; give fewer paths" in refused(answer, 422)
    assert api.put("/store/items", json={**item, "index": ["a[*].c"]}).status_code == 204
    few = {**item, "value": {"a": [1] * 100}, "index": [f"a[*].c{n}" for n in range(100)]}
    assert api.put("/store/items", json=few).status_code == 204


@pytest.mark.parametrize(
    "paths",
    [["t"], ["{t,x}"], [f"{{t,x{n}}}" for n in range(20)], ["{" + ",".join(["t"] * 40) + "}"]],
    ids=["one", "braces", "many", "one path"],
)
def test_an_item_with_a_large_text_to_embed_is_refused(api, paths):
    """A hundred paths to one text of 4 MB were embedded a hundred times, for 34 seconds."""
    item = {"namespace": ["v"], "key": "large", "index": paths, "value": {"t": "a b " * 300_000}}
    answer = refused(api.put("/store/items", json=item), 422)
    assert "bytes of text; at most 1,048,576 are indexed" in answer or "take too long" in answer
    small = {**item, "value": {"t": "a b " * 10}, "index": paths[:1]}
    assert api.put("/store/items", json=small).status_code == 204
    assert api.put("/store/items", json={**item, "index": False}).status_code == 204


def test_a_large_query_is_refused(api):
    body = {"namespace_prefix": ["v"], "query": "a" * 70_000}
    assert "query: has more than 65,536 bytes" in refused(
        api.post("/store/items/search", json=body), 422
    )
    assert api.post("/store/items/search", json={**body, "query": "a b"}).status_code == 200


def test_concurrent_searches_that_refresh_the_same_items_succeed(api):
    """They deadlock in Postgres, for which the API once returned 503, as in an outage."""
    for n in range(200):
        api.put("/store/items", json={"namespace": ["ttl"], "key": str(n), "value": {}, "ttl": 60})
    body = {"namespace_prefix": ["ttl"], "limit": 200, "refresh_ttl": True}
    with ThreadPoolExecutor(8) as pool:
        statuses = pool.map(
            lambda _: api.post("/store/items/search", json=body).status_code, range(120)
        )
        assert set(statuses) <= {200, 429}


@pytest.mark.parametrize(
    "wanted",
    [
        {"namespaces": [[f"{n:05}"] for n in range(2_000)]},
        {"namespaces": [["a"] * 2_000]},
        {"namespaces": [["a" * 100_000]]},
        {"channels": [f"custom:{n}" for n in range(60_000)]},
        {"channels": ["custom:" + "a" * 100_000]},
    ],
    ids=["namespaces", "names", "long name", "channels", "long channel"],
)
def test_a_subscription_larger_than_the_limit_is_refused(attacked, api, wanted):
    """A subscription is kept while the stream is open, and compared with every event."""
    thread = api.post("/threads", json={}).json()["thread_id"]
    asked = {"channels": ["values"], **wanted}
    answer = api.post(f"/threads/{thread}/stream/events", json=asked)
    assert "at most" in refused(answer, 400)
    with connect(socket_url(attacked, thread), compression=None) as opened:
        opened.send(json.dumps({"id": 1, "method": "subscription.subscribe", "params": asked}))
        answer = json.loads(opened.recv(20))
        assert answer["error"] == "invalid_argument"
        assert "at most" in answer["message"]


def test_the_subscriptions_of_a_websocket_are_bounded_in_total(attacked, api):
    thread = api.post("/threads", json={}).json()["thread_id"]
    asked = {"channels": ["values"], "namespaces": [[f"{n:030}"] for n in range(900)]}
    with connect(socket_url(attacked, thread), compression=None) as opened:
        answers = []
        for number in range(4):
            command = {"id": number, "method": "subscription.subscribe", "params": asked}
            opened.send(json.dumps(command))
            answers.append(json.loads(opened.recv(20)))
    assert [answer["type"] for answer in answers] == ["success"] * 3 + ["error"]
    assert "subscriptions are too large" in answers[-1]["message"]


def test_a_command_with_too_many_targets_is_refused(api):
    goto = [{"node": "step", "input": {}}] * 1_001
    answer = api.post("/runs", json={**RUN, "command": {"goto": goto}})
    assert "at most 1,000 targets" in refused(answer, 422)


def test_long_lists_and_maps_are_refused(api):
    for path, body in (
        ("/store/namespaces", {"prefix": [1] * 20_000}),
        ("/store/items/search", {"namespace_prefix": ["x"] * 20_000}),
        ("/threads/search", {"extract": {str(n): "values.a" for n in range(20_000)}}),
    ):
        assert "Longer than maximum length" in refused(api.post(path, json=body), 422)


def test_a_time_in_the_year_9999_is_refused(api):
    for moment in ("9999-12-31T23:59:59-23:59", "9999-12-31T00:00:00Z"):
        body = {**RUN, "schedule": "0 0 1 1 *", "end_time": moment}
        assert "before the year 9999" in refused(api.post("/runs/crons", json=body), 422)


@pytest.mark.long
def test_one_caller_cannot_occupy_all_database_connections(guarded, carol, dave):
    """Blocked statements of one caller (here on a lock) do not block other callers."""
    search = {"limit": 1}
    assert carol.post("/assistants/search", json=search).status_code == 200
    with psycopg.connect(guarded.database_url) as blocker:
        blocker.execute("LOCK TABLE assistant IN ACCESS EXCLUSIVE MODE")
        with ThreadPoolExecutor(30) as many:
            slow = [
                many.submit(carol.post, "/assistants/search", json=search, timeout=60)
                for _ in range(30)
            ]
            wait_until(lambda: any(one.done() for one in slow), 30, "one has lost its patience")
            for _ in range(10):
                assert dave.post("/threads/search", json={}).status_code == 200
            blocker.rollback()
            statuses = {one.result().status_code for one in slow}
    assert 429 in statuses
    # On a busy machine some may wait until the statement timeout.
    assert statuses <= {200, 429, 503}


@pytest.mark.long
def test_a_blocked_statement_times_out_with_503(guarded, carol):
    with psycopg.connect(guarded.database_url) as blocker:
        blocker.execute("LOCK TABLE cron IN ACCESS EXCLUSIVE MODE")
        answer = carol.post("/runs/crons/count", json={})
    assert answer.status_code == 503
    assert "BELAY_STATEMENT_SECONDS" in answer.json()["detail"]


# --- webhooks -------------------------------------------------------------------------------------


class Trickle:
    """A receiver that sends its response one byte at a time, with pauses."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/slow"
        self.open = 0
        self.most = 0
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                taken, _ = self.socket.accept()
                threading.Thread(target=self._answer, args=(taken,), daemon=True).start()

    def _answer(self, taken: socket.socket) -> None:
        with self._lock:
            self.open += 1
            self.most = max(self.most, self.open)
        with suppress(OSError), taken:
            taken.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            while True:
                taken.sendall(b"y")
                time.sleep(0.5)
        with self._lock:
            self.open -= 1

    def close(self) -> None:
        self.socket.close()


def test_slow_webhook_receivers_delay_no_other_calls(carol, dave):
    slow, good = Trickle(), Receiver()
    try:
        for _ in range(20):
            carol.post("/runs", json={**RUN, "webhook": slow.url}).raise_for_status()
        wait_until(lambda: slow.open > 0, 30, "a slow call")
        # The same host: callers of one host do not wait for each other.
        run = dave.post("/runs", json={**RUN, "webhook": f"{good.url}/hook"}).json()
        good.wait_for(run["run_id"], seconds=20)
        assert slow.most <= 2
    finally:
        slow.close()
        good.close()


def test_a_webhook_call_has_a_total_deadline():
    slow = Trickle()
    try:
        began = time.monotonic()
        with pytest.raises(ERRORS, match=r"exceeded its time limit|timed out"):
            post(slow.url, body=b"{}", headers={}, sni_hostname="x", seconds=1.2)
        assert time.monotonic() - began < 30
        with pytest.raises(ERRORS):
            post("http://127.0.0.1:1/", body=b"{}", headers={}, sni_hostname="x", seconds=1.2)
    finally:
        slow.close()


def test_a_webhook_call_ends_after_too_many_interim_responses():
    """Endless `100 Continue` responses once kept the worker's parent busy until the deadline."""
    listener = socket.create_server(("127.0.0.1", 0))
    sent = []

    def continue_for_ever():
        with suppress(OSError), listener.accept()[0] as connection:
            while True:
                sent.append(connection.send(b"HTTP/1.1 100 Continue\r\n\r\n" * 100))

    threading.Thread(target=continue_for_ever, daemon=True).start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    with pytest.raises(httpcore.RemoteProtocolError, match="no response within"):
        post(url, body=b"{}", headers={}, sni_hostname="x", seconds=60)
    listener.close()


# --- tenants --------------------------------------------------------------------------------------


def as_user(server: LiveServer, name: str) -> httpx.Client:
    headers = {"Authorization": f"Bearer {name}"}
    return watched(httpx.Client(base_url=server.url, timeout=60, headers=headers))


@pytest.fixture
def carol(guarded):
    with as_user(guarded, "carol") as client:
        yield client


@pytest.fixture
def dave(guarded):
    with as_user(guarded, "dave") as client:
        yield client


def test_a_caller_cannot_create_a_system_assistant(carol, dave):
    forged = {"graph_id": "counter", "metadata": {"created_by": "system"}, "name": "counter"}
    made = dave.post("/assistants", json=forged).json()
    assert made["metadata"]["created_by"] == "system"
    assert carol.get(f"/assistants/{made['assistant_id']}").status_code == 404
    found = carol.post("/assistants/search", json={"graph_id": "counter", "limit": 100}).json()
    assert made["assistant_id"] not in [one["assistant_id"] for one in found]
    run = {"assistant_id": made["assistant_id"], "input": {"count": 1}}
    assert carol.post("/runs/wait", json=run).status_code == 404
    patched = {"metadata": {"created_by": "system"}}
    assert dave.patch(f"/assistants/{made['assistant_id']}", json=patched).status_code == 200
    assert carol.get(f"/assistants/{made['assistant_id']}").status_code == 404


def test_idempotency_keys_are_separate_for_each_caller(carol, dave):
    key = {"Idempotency-Key": f"order {uuid.uuid4()}"}
    hers = carol.post("/runs", json=LATER, headers=key)
    his = dave.post("/runs", json=LATER, headers=key)
    assert (hers.status_code, his.status_code) == (200, 200)
    assert hers.json()["run_id"] != his.json()["run_id"]
    assert carol.post("/runs", json=LATER, headers=key).json()["run_id"] == hers.json()["run_id"]


def test_a_client_cannot_choose_a_run_id_derived_from_a_key(carol):
    body = {**LATER, "run_id": "01234567-89ab-8def-8123-456789abcdef"}
    assert "version 8" in refused(carol.post("/runs", json=body), 422)
    key = {"Idempotency-Key": f"order {uuid.uuid4()}"}
    made = carol.post("/runs", json=LATER, headers=key).json()
    assert uuid.UUID(made["run_id"]).version == 8


def test_a_repeated_batch_with_a_key_creates_each_run_once(carol):
    key = {"Idempotency-Key": f"batch {uuid.uuid4()}"}
    first = carol.post("/runs/batch", json=[LATER] * 3, headers=key).json()
    again = carol.post("/runs/batch", json=[LATER] * 3, headers=key).json()
    assert len({run["run_id"] for run in first}) == 3
    assert [run["run_id"] for run in again] == [run["run_id"] for run in first]


def test_the_thread_id_of_an_ended_stateless_run_stays_with_its_owner(carol, dave):
    run = carol.post("/runs", json=RUN).json()
    waiting = f"/threads/{run['thread_id']}"
    wait_until(lambda: carol.get(waiting).status_code == 404, 30, "the run to end")
    body = {"thread_id": run["thread_id"], "if_exists": "do_nothing"}
    assert dave.post("/threads", json=body).status_code == 409
    taken = dave.post(f"{waiting}/runs", json={**RUN, "if_not_exists": "create"})
    assert taken.status_code == 404
    assert carol.post("/threads", json={"thread_id": run["thread_id"]}).status_code == 200


def test_reused_ids_show_no_events_of_the_deleted_run(carol, dave):
    """The event log of a deleted run stays readable for a while, for clients that follow it."""
    thread, run = str(uuid.uuid4()), str(uuid.uuid4())
    streams = []
    for client, count in ((carol, 1000), (dave, 2000)):
        assert client.post("/threads", json={"thread_id": thread}).status_code == 200
        body = {
            "assistant_id": "counter",
            "input": {"count": count},
            "run_id": run,
            "stream_mode": ["values"],
            "stream_resumable": True,
        }
        assert client.post(f"/threads/{thread}/runs", json=body).status_code == 200
        assert client.get(f"/threads/{thread}/runs/{run}/join").json() == {"count": count + 1}
        headers = {"Last-Event-ID": "-1"}
        streams.append(client.get(f"/threads/{thread}/runs/{run}/stream", headers=headers).text)
        with client.stream("GET", f"/threads/{thread}/stream", headers=headers) as answer:
            told = ""
            for text in answer.iter_text():
                told += text
                if "run_done" in told:
                    break
            streams.append(told)
        assert client.delete(f"/threads/{thread}").status_code == 204
    assert ["1001" in text for text in streams] == [True, True, False, False]
    assert ["2001" in text for text in streams] == [False, False, True, True]


def test_a_user_named_star_cannot_use_the_store(guarded, carol):
    secret = f"secret-{uuid.uuid4().hex[:8]}"
    item = {"namespace": ["carol", secret], "key": "k", "value": {"a": 1}}
    assert carol.put("/store/items", json=item).status_code == 204
    with as_user(guarded, "*") as star:
        answer = star.post("/store/namespaces", json={"prefix": ["*"]})
        assert answer.status_code in (403, 422)
        assert secret not in answer.text
        put = star.put("/store/items", json={**item, "namespace": ["*", "x"]})
        assert put.status_code in (403, 422)


# --- pages ----------------------------------------------------------------------------------------


def test_a_request_from_a_foreign_origin_changes_nothing(api):
    foreign = {"Origin": "https://evil.example"}
    assert "may not call" in refused(api.post("/threads", json={}, headers=foreign), 403)
    for invalid in ("http://[::1", "http://]", "http://a[b]", "null", "//", ""):
        answer = api.post("/threads", json={}, headers={"Origin": invalid})
        assert "may not call" in refused(answer, 403), invalid
    text = {**foreign, "content-type": "text/plain"}
    assert api.post("/runs", content=json.dumps(RUN), headers=text).status_code == 403
    for origin in ("https://good.example", str(api.base_url).rstrip("/")):
        assert api.post("/threads", json={}, headers={"Origin": origin}).status_code == 200


def test_a_foreign_origin_cannot_cancel_on_disconnect(api):
    thread = api.post("/threads", json={}).json()["thread_id"]
    run = api.post(f"/threads/{thread}/runs", json=LATER).json()["run_id"]
    url = f"/threads/{thread}/runs/{run}"
    for last in ("stream", "join"):
        for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
            answer = api.get(f"{url}/{last}?cancel_on_disconnect=1", headers=headers)
            assert "may not call this server" in refused(answer, 403)
    assert api.get(url).json()["status"] == "pending"
    api.delete(f"/threads/{thread}")


def test_an_unknown_host_name_is_refused(api):
    for name in ("evil.example", "evil.example:2024", "127.0.0.1.evil.example"):
        assert "BELAY_HOSTS" in refused(api.get("/info", headers={"Host": name}), 403)
    for name in ("localhost:1", "127.0.0.1", "[::1]:2024", "belay.localhost"):
        assert api.get("/info", headers={"Host": name}).status_code == 200


def test_a_websocket_from_a_foreign_origin_is_refused(attacked, api):
    thread = api.post("/threads", json={}).json()["thread_id"]
    headers = {"Origin": "https://evil.example"}
    with (
        pytest.raises(InvalidStatus),
        connect(socket_url(attacked, thread), additional_headers=headers),
    ):
        pass


def test_a_script_name_header_is_not_trusted(attacked):
    answer = httpx.get(f"{attacked.url}/x/ok", headers={"SCRIPT_NAME": "/x"}, timeout=60)
    assert answer.status_code >= 400


# --- crons and limits -----------------------------------------------------------------------------


def test_crons_have_a_minimum_interval_and_a_maximum_number(api):
    hasty = {**RUN, "schedule": "* * * * * *"}
    assert "BELAY_CRON_SHORTEST_SECONDS" in refused(api.post("/runs/crons", json=hasty), 422)
    yearly = {**RUN, "schedule": "0 0 1 1 *"}
    made = [api.post("/runs/crons", json=yearly) for _ in range(4)]
    try:
        assert [one.status_code for one in made] == [200, 200, 200, 429]
        assert "BELAY_MAX_CRONS" in refused(made[-1], 429)
        first = made[0].json()["cron_id"]
        patched = api.patch(f"/runs/crons/{first}", json={"schedule": "* * * * * *"})
        assert patched.status_code == 422
    finally:
        for one in made[:3]:
            api.delete(f"/runs/crons/{one.json()['cron_id']}")


def test_pending_runs_of_unauthenticated_callers_are_capped_by_address(api):
    made = [api.post("/runs", json=LATER).status_code for _ in range(25)]
    assert made.count(429) == 5
    assert api.post("/runs/cancel", json={"status": "pending"}).status_code == 204


def test_long_store_labels_keys_and_index_paths_are_refused(api):
    item = {"namespace": ["a"], "key": "k", "value": {"a": 1}}
    for change in (
        {"namespace": ["x" * 6_000]},
        {"namespace": ["é" * 250] * 3},
        {"namespace": ["*"]},
        {"key": "é" * 600},
        {"index": ["x" * 1_000]},
    ):
        answer = api.put("/store/items", json={**item, **change})
        detail = refused(answer, 422)
        assert any(word in detail for word in ("abel", "key", "index", "namespace")), detail


# --- files left on the disk -----------------------------------------------------------------------


def test_the_files_of_belay_dev_are_private_to_its_user(attacked, api):
    api.post("/runs/wait", json=RUN)
    folder = attacked.data_dir / "valkey"
    assert folder.stat().st_mode & 0o077 == 0
    for path in folder.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
    assert psutil.pid_exists(attacked.process.pid)
