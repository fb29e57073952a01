"""Test the middleware of a project's app around all requests: nothing is buffered or lost."""

from __future__ import annotations

import json
import socket
import struct
import threading
from contextlib import suppress

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from tests.acceptance.playing import (
    leave_handshakes,
    new_thread,
    refused,
    status_of,
    until_status,
)
from tests.conformance import watched
from tests.long_forms import in_turn
from tests.servers import PROJECT
from tests.waiting import wait_until

ANN = {"Authorization": "Bearer ann"}
COUNT = {"assistant_id": "counter", "input": {"count": 1}}


@pytest.fixture(scope="module")
def server(make_server):
    config = PROJECT.parent / "with_middleware.json"
    live = make_server("middleware", config=config, BELAY_HEARTBEAT_SECONDS="1").start()
    yield live
    live.stop()


@pytest.fixture
def api(server):
    with watched(httpx.Client(base_url=server.url, timeout=60, headers=ANN)) as client:
        yield client


@pytest.fixture
def raw(server):
    """Yield a client whose responses need not be documented."""
    with httpx.Client(base_url=server.url, timeout=60, headers=ANN) as client:
        yield client


@pytest.mark.parametrize("path", ["/ok", "/info", "/hello", "/refuse", "/nothing/here"])
def test_middleware_wraps_every_response_once(raw, path):
    answer = raw.get(path)
    assert answer.status_code == {"/refuse": 409, "/nothing/here": 404}.get(path, 200)
    assert answer.headers.get_list("x-counted") == ["1"]
    assert answer.headers["x-path"] == path
    assert len(answer.headers.get_list("x-request-id")) == 1
    if path == "/refuse":
        assert answer.text == "by a route"


def test_the_headers_of_a_stream_do_not_wait_for_its_first_part(raw, tmp_path):
    """Through the middleware, Belay and the project's own route."""
    file = tmp_path / "now"
    with raw.stream("GET", "/follow", params={"file": str(file)}) as answer:
        assert answer.headers["x-counted"] == "1"
        file.touch()
        assert answer.read() == b"a part"


def test_middleware_may_answer_instead(raw):
    before = len(raw.post("/threads/search", json={}).json())
    for length in (2, 300_000):
        body = json.dumps({"metadata": {"x": "y" * length}})
        answer = raw.post("/threads", content=body, headers={"x-answer": "instead"})
        assert (answer.status_code, answer.json()) == (418, {"by": "the middleware"})
    assert len(raw.post("/threads/search", json={}).json()) == before


def test_middleware_that_raises_returns_500_without_details(raw, server):
    answer = raw.get("/info", headers={"x-answer": "raise"})
    assert (answer.status_code, answer.json()) == (500, {"detail": "Internal Server Error"})
    server.wait_for_log("RuntimeError: the middleware is broken")
    assert raw.get("/info").status_code == 200


def test_a_header_with_a_line_break_is_an_error_of_the_middleware(raw, server):
    answer = raw.get("/info", headers={"x-answer": "line break"})
    assert (answer.status_code, answer.json()) == (500, {"detail": "Internal Server Error"})
    server.wait_for_log("the middleware has sent a header with a line break")
    assert raw.get("/info").status_code == 200


def test_a_route_sees_the_caller_and_what_the_middleware_has_added(raw):
    tenant = "of the middleware"
    assert raw.get("/who").json() == ["ann", True, [], tenant]
    of_middleware = raw.get("/who", headers={"x-user": "eve"})
    assert of_middleware.json() == ["eve", True, ["paint"], tenant]
    assert raw.get("/who", headers={"x-user": "nobody"}).json()[0] == "ann"


@pytest.mark.parametrize("how", ["cancel", "exit"])
def test_middleware_that_ends_without_an_answer_returns_500(raw, how):
    for _ in range(3):
        answer = raw.get("/info", headers={"x-answer": how})
        assert (answer.status_code, answer.json()) == (500, {"detail": "Internal Server Error"})
    assert raw.get("/info").status_code == 200


@pytest.mark.parametrize("upgrade", ["x", "websocket", "WebSocket"])
@pytest.mark.parametrize("path", ["/threads/search", "/hello"])
def test_no_header_leads_around_middleware(raw, upgrade, path):
    headers = {"Upgrade": upgrade, "Connection": "Upgrade", "x-answer": "instead"}
    assert raw.post(path, json={}, headers=headers).status_code == 418


def test_a_path_that_is_not_utf_8_is_answered_by_belay(raw):
    """ASGI cannot represent it."""
    answer = raw.get("/threads/%ff")
    assert answer.status_code in (404, 422)
    assert answer.json()["detail"]
    assert len(answer.headers.get_list("x-request-id")) == 1
    assert "x-counted" not in answer.headers


def test_middleware_may_change_a_request(api):
    thread_id = new_thread(api)
    run = api.post(
        f"/threads/{thread_id}/runs/wait", json=COUNT, headers={"x-rewrite": "yes"}
    ).json()
    assert run == {"count": 1002}
    body = {"assistant_id": "headers", "input": {}}
    note = api.post("/runs/wait", json=body).json()["note"]
    assert json.loads(note) == {"x-team": "by the middleware"}


@pytest.mark.parametrize("answer", ["", "body"])
@pytest.mark.parametrize("size", [10, 70_000, 3_000_000])
def test_bodies_of_all_sizes_pass_unchanged(api, answer, size):
    metadata = {"text": "ä" * (size // 4)}  # two bytes in UTF-8
    if size > 1_000_000:
        text = "y" * size
        run = {"assistant_id": "counter", "input": {"count": 1, "note": text}}
        found = api.post("/runs/wait", json=run, headers={"x-answer": answer}).json()
        assert found["note"] == text
        return
    made = api.post("/threads", json={"metadata": metadata}, headers={"x-answer": answer}).json()
    assert api.get(f"/threads/{made['thread_id']}").json()["metadata"]["text"] == metadata["text"]


def test_a_body_in_chunks_passes_unchanged(raw):
    def chunks():
        yield b'{"metadata": {"text": "'
        for _ in range(50):
            yield b"x" * 1000
        yield b'"}}'

    made = raw.post("/threads", content=chunks())
    assert made.json()["metadata"]["text"] == "x" * 50_000


def test_bad_bodies_are_refused_and_the_connection_goes_on(api):
    for body in (b"{", b"[]", b"\xff", b""):
        answer = api.post("/threads/search", content=body, headers={"x-answer": "body"})
        assert 400 <= answer.status_code < 500 or body == b""
        assert api.get("/info").status_code == 200
    too_long = api.post("/threads", content=b'{"a":"' + b"x" * 9_000_000 + b'"}')
    assert refused(too_long, 413)


@pytest.mark.parametrize(("name", "expected"), [("carol", "carol"), ("nobody", "ann"), ("", "ann")])
def test_the_user_of_the_middleware_creates_the_runs(api, name, expected):
    thread = new_thread(api)
    run = api.post(f"/threads/{thread}/runs", json=COUNT, headers={"x-user": name}).json()
    set_ = run["kwargs"]["config"]["configurable"]
    assert set_["langgraph_auth_user_id"] == expected
    assert set_["langgraph_auth_permissions"] == (["paint"] if name == "carol" else [])


@pytest.mark.parametrize("answer", ["", "body"])
@pytest.mark.parametrize("chunks", [b"zz\r\n", b"5\r\nabcdefgh\r\n", b"-1\r\n\r\n"])
def test_a_body_with_invalid_chunks_is_refused_and_the_connection_closed(server, answer, chunks):
    head = (
        b"POST /threads HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer ann\r\n"
        b"Transfer-Encoding: chunked\r\nX-Answer: " + answer.encode() + b"\r\n\r\n"
    )
    second = b"GET /ok HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(head + chunks + second)
        received = b""
        while data := connection.recv(65536):
            received += data
    assert received.split(b" ")[1] in (b"400", b"422")
    assert received.count(b"HTTP/1.1 ") == 1
    assert "ClientDisconnect" not in server.log_until_now()


@pytest.mark.parametrize("answer", ["", "body", "instead"])
@pytest.mark.parametrize(("size", "chunked"), in_turn([15_000_000, 70_000_000], [True, False]))
def test_a_long_body_is_refused_and_never_taken_for_a_request(server, raw, answer, chunked, size):
    framing = b"Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}".encode()
    head = (
        b"POST /threads HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer ann\r\n"
        b"X-Answer: " + answer.encode() + b"\r\n" + framing + b"\r\n\r\n"
    )
    data = b'{"a": "' + b"x" * (size - 9) + b'"}'
    if chunked:
        parts = [data[at : at + 1_000_000] for at in range(0, size, 1_000_000)]
        data = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    received = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        sender = threading.Thread(target=_send, args=(connection, head + data + SECOND))
        sender.start()
        with suppress(ConnectionResetError):
            while chunk := connection.recv(65536):
                received += chunk
        sender.join()
    answers = received.split(b"HTTP/1.1 ")[1:]
    assert answers[0][:3] in (b"413", b"418", b"422")
    # The second request is answered, or the connection was closed before it.
    assert [one[:3] for one in answers[1:]] in ([], [b"200"])
    assert raw.get("/info").status_code == 200


@pytest.mark.parametrize("answer", ["", "body", "instead"])
def test_a_connection_is_used_again_after_a_long_body(server, answer):
    with httpx.Client(base_url=server.url, timeout=60, headers=ANN) as client:
        for _ in range(3):
            long = client.post("/threads", content=b"x" * 15_000_000, headers={"x-answer": answer})
            assert long.status_code in (413, 418)
            made = client.post("/threads", json={"metadata": {"text": "x" * 100_000}})
            assert len(made.json()["metadata"]["text"]) == 100_000


SECOND = b"GET /ok HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def _send(connection: socket.socket, data: bytes) -> None:
    with suppress(OSError):
        connection.sendall(data)


@pytest.mark.parametrize("answer", ["", "body", "instead"])
def test_a_client_that_leaves_within_its_body_harms_nobody(raw, server, answer):
    head = (
        b"POST /threads HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer ann\r\n"
        b"Content-Length: 1000\r\nX-Answer: " + answer.encode() + b"\r\n\r\n{"
    )
    before = server.log_until_now().count("Traceback")
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(head)
    assert raw.get("/info").status_code == 200
    assert server.log_until_now().count("Traceback") == before


def test_events_are_not_buffered(api, beats):
    thread_id = new_thread(api)
    given = {"seconds": 600, "beats": str(beats)}
    body = {"assistant_id": "steps", "input": given, "stream_mode": ["updates"]}
    with api.stream("POST", f"/threads/{thread_id}/runs/stream", json=body) as stream:
        # Heartbeats are left out: on a busy machine, one may come before the first event.
        lines = (line for line in stream.iter_lines() if line and not line.startswith(":"))
        assert next(lines) == "event: metadata"
        run_id = json.loads(next(lines).removeprefix("data: "))["run_id"]
        beats.wait_for("s1:start")
        api.post(f"/threads/{thread_id}/runs/{run_id}/cancel?wait=1")
        assert any(line.startswith("event: ") for line in lines)  # the stream ends
    assert status_of(api, thread_id, run_id) == "interrupted"


@pytest.mark.parametrize("how", ["stream", "wait"])
def test_a_client_that_leaves_cancels_its_run(api, raw, beats, how):
    thread_id = new_thread(api)
    body = {
        "assistant_id": "steps",
        "input": {"seconds": 600, "beats": str(beats)},
        "on_disconnect": "cancel",
    }
    with raw.stream("POST", f"/threads/{thread_id}/runs/{how}", json=body) as stream:
        beats.wait_for("s1:start")
        assert stream.status_code == 200
    (run,) = api.get(f"/threads/{thread_id}/runs").json()
    until_status(api, thread_id, run["run_id"], "interrupted")


@pytest.mark.parametrize("resets", [True, False])
@pytest.mark.parametrize("how", ["stream", "wait"])
def test_a_client_that_leaves_before_the_response_cancels_its_run(api, server, how, resets):
    """The web server ends the request while Belay cancels the run, or after it has closed the
    socket."""
    threads = [new_thread(api) for _ in range(10)]
    given = {"assistant_id": "steps", "input": {"seconds": 600}, "on_disconnect": "cancel"}
    body = json.dumps(given).encode()
    for thread_id in threads:
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            if resets:
                reset = struct.pack("ii", 1, 0)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            head = (
                f"POST /threads/{thread_id}/runs/{how} HTTP/1.1\r\nHost: x\r\n"
                f"Authorization: {ANN['Authorization']}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            )
            connection.sendall(head.encode() + body)
            wait_until(lambda t=thread_id: api.get(f"/threads/{t}/runs").json(), 20, "the run")
    for thread_id in threads:
        (run,) = api.get(f"/threads/{thread_id}/runs").json()
        until_status(api, thread_id, run["run_id"], "interrupted")


def test_many_requests_share_a_connection(raw):
    began = {raw.get("/info").headers["x-request-id"] for _ in range(100)}
    assert len(began) == 100


def test_work_in_the_background_goes_on_after_the_response(raw):
    before = len(raw.get("/worked").json())
    assert raw.get("/hello").text == "hello"
    wait_until(lambda: len(raw.get("/worked").json()) > before, 20, "the background task")


def test_the_projects_cors_rules_replace_belays(raw):
    for origin, expected in (("https://ui.example", ["https://ui.example"]), ("https://no", [])):
        found = raw.get("/info", headers={"Origin": origin}).headers
        assert found.get_list("access-control-allow-origin") == expected


def test_a_preflight_needs_no_authentication(server):
    preflight = {"Origin": "https://ui.example", "Access-Control-Request-Method": "GET"}
    answer = httpx.options(f"{server.url}/threads/search", headers=preflight, timeout=30)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://ui.example"


def test_authentication_may_come_first(server):
    refusals = [
        httpx.post(f"{server.url}/threads/search", json={}, timeout=30),
        httpx.get(f"{server.url}/hello", timeout=30),
    ]
    for refusal in refusals:
        assert refused(refusal, 401) == "Who are you?"
        assert "x-counted" not in refusal.headers
    assert httpx.get(f"{server.url}/ok", timeout=30).headers["x-counted"] == "1"


# --- WebSockets -----------------------------------------------------------------------------------


@pytest.fixture
def socket_of(api, server):
    """A function that opens a WebSocket of a new thread, of which the middleware is told a word."""

    def opened(told="", thread_id=None):
        thread_id = thread_id or new_thread(api)
        url = f"{server.url.replace('http', 'ws')}/threads/{thread_id}/stream/events"
        given = {**ANN, **({"x-socket": told} if told else {})}
        return connect(url, additional_headers=given, open_timeout=30, close_timeout=5)

    return opened


def commanded(socket, method, params, command_id=1):
    """Send a command, and return the messages up to its response."""
    socket.send(json.dumps({"id": command_id, "method": method, "params": params}))
    messages = []
    while not messages or messages[-1].get("id") != command_id:
        messages.append(json.loads(socket.recv(timeout=60)))
    return messages


@pytest.mark.parametrize("told", ["", "sign"])
def test_a_web_socket_goes_through_middleware(socket_of, told):
    with socket_of(told) as socket:
        messages = commanded(socket, "subscription.subscribe", {"channels": ["lifecycle"]})
        start = {"assistant_id": "headers", "input": {}}
        messages += commanded(socket, "run.start", start, 2)
        while "completed" not in json.dumps(messages[-1]):
            messages.append(json.loads(socket.recv(timeout=60)))
    assert {message.get("signed", False) for message in messages} == {told == "sign"}


def test_a_web_socket_s_requests_have_what_the_middleware_has_changed(api, socket_of):
    with socket_of() as socket:
        start = {"assistant_id": "headers", "input": {}}
        run_id = commanded(socket, "run.start", start)[-1]["result"]["run_id"]
        thread_id = socket.request.path.split("/")[2]
        values = api.get(f"/threads/{thread_id}/runs/{run_id}/join").json()
    assert json.loads(values["note"])["x-team"] == "by the middleware"


def test_middleware_refuses_a_web_socket(socket_of):
    with pytest.raises(InvalidStatus) as refusal, socket_of("refuse"):
        pass
    assert refusal.value.response.status_code == 403


def test_middleware_answers_a_web_socket_instead(socket_of):
    with socket_of("instead") as socket:
        socket.send("hello")
        assert socket.recv(timeout=30) == "middleware: hello"
        with pytest.raises(ConnectionClosed):
            socket.recv(timeout=30)
        assert (socket.close_code, socket.close_reason) == (4001, "enough")


def test_a_refusal_of_belay_passes_through_middleware(socket_of):
    with pytest.raises(InvalidStatus) as refusal, socket_of(thread_id="nope"):
        pass
    response = refusal.value.response
    assert response.status_code == 422
    assert json.loads(response.body) == {"detail": "Invalid thread ID: must be a UUID"}
    assert response.headers["content-type"] == "application/json"


def test_a_client_that_leaves_within_its_handshake_harms_nobody(api, raw, server):
    before = server.log_until_now().count("Traceback")
    leave_handshakes(server.port, new_thread(api), "ann")
    assert raw.get("/info").status_code == 200
    assert server.log_until_now().count("Traceback") == before


@pytest.mark.parametrize(("version", "status"), [("12", 426), ("13", 400)])
def test_an_invalid_handshake_is_refused_behind_middleware(api, raw, version, status):
    """The key of a handshake with the right version is missing."""
    headers = {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": version}
    answer = raw.get(f"/threads/{new_thread(api)}/stream/events", headers=headers)
    assert "The WebSocket handshake is not valid" in refused(answer, status)
    assert answer.headers["sec-websocket-version"] == "13"


def test_middleware_that_raises_ends_its_web_socket_alone(raw, socket_of):
    with pytest.raises(InvalidStatus) as failure, socket_of("raise"):
        pass
    assert failure.value.response.status_code == 500
    with socket_of("raise later") as socket:
        socket.send(json.dumps({"id": 1, "method": "agent.getTree", "params": {}}))
        with pytest.raises(ConnectionClosed):
            socket.recv(timeout=30)
        assert socket.close_code == 1011
    assert raw.get("/info").status_code == 200


def test_a_client_that_leaves_its_web_socket_harms_nobody(raw, socket_of, server):
    before = server.log_until_now().count("Traceback")
    for _ in range(20):
        with socket_of() as socket:
            commanded(socket, "subscription.subscribe", {"channels": ["values"]})
            socket.close_timeout = 0
            socket.socket.close()
    assert raw.get("/info").status_code == 200
    assert server.log_until_now().count("Traceback") == before


def test_parallel_requests_do_not_wait_for_each_other(api, raw, beats):
    """A stream that is open for long holds up no other request."""
    thread_id = new_thread(api)
    given = {"seconds": 600, "beats": str(beats)}
    body = {"assistant_id": "steps", "input": given, "on_disconnect": "cancel"}
    with raw.stream("POST", f"/threads/{thread_id}/runs/stream", json=body) as stream:
        assert next(stream.iter_lines())
        for _ in range(20):
            assert api.get("/info").status_code == 200
