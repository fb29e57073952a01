"""The `http` section of langgraph.json: the project's own routes, disabled routes and CORS."""

from __future__ import annotations

import asyncio
import socket
import uuid

import httpx
import pytest
from langgraph_sdk import get_client

from tests.acceptance.playing import UNKNOWN, new_thread, refused, wait_for
from tests.servers import PROJECT
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def make_live(make_server):
    """A function that makes a server for one of the projects with routes of their own."""
    return lambda name, **env: make_server(name, config=PROJECT.parent / f"{name}.json", **env)


@pytest.fixture(scope="module")
def with_starlette(make_live, scratch):
    server = make_live("with_starlette", TEST_LIFESPAN_END=str(scratch / "lifespan-end"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def with_flask(make_live):
    server = make_live("with_flask", BELAY_CORS_ORIGINS="https://not.asked").start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def with_bare_asgi(make_live):
    server = make_live(
        "with_bare_asgi", BELAY_CORS_ORIGINS="https://a.example, https://b.example"
    ).start()
    yield server
    server.stop()


@pytest.fixture
def asgi(with_starlette):
    with httpx.Client(base_url=with_starlette.url, timeout=60) as client:
        yield client


@pytest.fixture
def wsgi(with_flask):
    with httpx.Client(base_url=with_flask.url, timeout=60) as client:
        yield client


@pytest.fixture
def bare(with_bare_asgi):
    with httpx.Client(base_url=with_bare_asgi.url, timeout=60) as client:
        yield client


# -- an ASGI app ----------


@pytest.mark.parametrize("chunks", [b"zz\r\n", b"5\r\nabcdefgh\r\n", b"-1\r\n\r\n"])
def test_a_body_with_invalid_chunks_is_refused(with_starlette, chunks):
    """The response was a 500 once: the web server's own error passed through the bridge."""
    head = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", with_starlette.port), timeout=20) as connection:
        connection.sendall(head + chunks)
        assert connection.recv(4096).split(b" ")[1] == b"422"
    assert "Traceback" not in with_starlette.log_until_now()


@pytest.mark.parametrize(
    "body", [b"Content-Length: 1000\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n"]
)
def test_a_client_that_leaves_within_its_body_harms_nobody(with_starlette, body):
    """Its body was read for ever once, with all of a core."""
    before = with_starlette.log_until_now().count("Traceback")
    connections = []
    for _ in range(20):
        with connected(
            with_starlette, b"POST /echo HTTP/1.1\r\nHost: localhost\r\n" + body
        ) as made:
            connections.append(made.getsockname()[1])
    wait_until_closed(with_starlette, connections)
    assert with_starlette.log_until_now().count("Traceback") == before


def connected(server, request):
    """A connection on which a request has been sent, without waiting for the response."""
    made = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    made.sendall(request)
    return made


def wait_until_closed(server, ports):
    """Wait until the web process has no connections to these ports of clients."""

    def open_still():
        for process in server.find("gunicorn"):
            for found in process.net_connections("tcp"):
                if found.raddr and found.raddr.port in ports:
                    return True
        return False

    wait_until(lambda: not open_still(), 30, "the web process to close the connections")


@pytest.mark.parametrize("unread", [0, 20_000])
def test_a_quiet_stream_ends_when_its_client_disconnects(with_starlette, asgi, unread):
    """Also behind a body that the app does not read."""
    before = asgi.get("/left").json()
    head = f"POST /quiet HTTP/1.1\r\nHost: localhost\r\nContent-Length: {unread}\r\n\r\n"
    request = head.encode() + b"x" * unread
    connections = []
    for _ in range(3):
        with connected(with_starlette, request) as made:
            received = b""
            while b"data: 0" not in received:
                received += made.recv(4096)
            connections.append(made.getsockname()[1])
    wait_until(lambda: asgi.get("/left").json() == before + 3, 20, "the streams' ends")
    wait_until_closed(with_starlette, connections)


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /work HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /work HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc",
        b"GET /work HTTP/1.1\r\nHost: localhost\r\n\r\nGET /ok HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=["no body", "body", "next request"],
)
def test_work_goes_on_when_its_client_disconnects(with_starlette, asgi, request_):
    log_before = with_starlette.log_until_now().count("Traceback")
    came, left = asgi.get("/came").json(), asgi.get("/left").json()
    with connected(with_starlette, request_) as made:
        wait_until(lambda: asgi.get("/came").json() == came + 1, 20, "the request")
        assert asgi.get("/left").json() == left
        port = made.getsockname()[1]
    wait_until(lambda: asgi.get("/left").json() == left + 2, 20, "the work and what follows it")
    wait_until_closed(with_starlette, [port])
    assert with_starlette.log_until_now().count("Traceback") == log_before


@pytest.mark.parametrize("path", ["/threads/%ff%fe", "/hello/%ff", "/%ff"])
def test_a_path_that_is_not_utf_8_matches_no_custom_route(asgi, bare, path):
    """The response was a 500 once: ASGI cannot represent such a path."""
    for client in (asgi, bare):
        assert client.get(path).status_code == (422 if path.startswith("/threads") else 404)
    assert asgi.get("/hello/%C3%A9").json()["name"] == "é"


def test_custom_routes_get_the_lifespan_state_and_the_request_id(asgi):
    answer = asgi.get("/hello/you", headers={"x-request-id": "mine", "origin": "https://a.example"})
    expected = {"name": "you", "opened": "at the start", "request_id": "mine", "loop": True}
    assert answer.json() == expected
    assert answer.headers["x-request-id"] == "mine"
    assert answer.headers["access-control-allow-origin"] == "*"
    assert asgi.post("/echo?a=1", content=b"x" * 300_000).text == "POST 300000 a=1"
    in_chunks = iter([b"x" * 100_000] * 30)
    assert asgi.post("/echo", content=in_chunks).text == "POST 3000000 "
    assert asgi.head("/hello/you").content == b""


def test_custom_routes_take_precedence_over_those_of_belay(asgi):
    assert asgi.get("/info").json() == {"mine": True}
    assert asgi.get("/ok").json() == {"ok": True, "services": {}}
    thread_id = new_thread(asgi)  # the project has the same path with another method
    assert asgi.patch("/threads").json() == {"mine": True}
    assert wait_for(asgi, thread_id, "counter", {"count": 1}) == {"count": 2}
    assert asgi.post("/hello/you").status_code == 405
    assert refused(asgi.get("/nothing"), 404) == "Not Found"
    assert "/threads/{thread_id}/runs" in asgi.get("/openapi.json").json()["paths"]


def test_the_sdk_works_beside_custom_routes(with_starlette):
    async def scene():
        async with get_client(url=with_starlette.url) as client:
            thread = await client.threads.create()
            stream = client.runs.stream(thread["thread_id"], "counter", input={"count": 1})
            return [part.event async for part in stream]

    assert "values" in asyncio.run(scene())


def test_a_thread_that_waits_for_a_multiprocessing_queue_does_not_stop_the_process(asgi):
    assert asgi.get("/record").text == "a record"


@pytest.mark.parametrize("path", ["/slow", "/blocking"])
def test_slow_handlers_run_concurrently(with_starlette, path):
    """Each of ten handlers waits for the others."""

    async def scene():
        async with httpx.AsyncClient(base_url=with_starlette.url, timeout=60) as client:
            answers = await asyncio.gather(*(client.get(path) for _ in range(10)))
            return {answer.status_code for answer in answers}

    assert asyncio.run(scene()) == {200}


def test_a_handler_that_blocks_its_event_loop_does_not_delay_belay(with_starlette, tmp_path):
    async def scene():
        async with httpx.AsyncClient(base_url=with_starlette.url, timeout=60) as client:
            spinning = asyncio.create_task(client.get("/spin", params={"folder": str(tmp_path)}))
            while not (tmp_path / "begun").exists():
                await asyncio.sleep(0.01)
            for _ in range(10):
                assert (await client.get("/ok")).status_code == 200
            assert not spinning.done()
            (tmp_path / "over").touch()
            assert (await spinning).text == "spun"

    asyncio.run(scene())


@pytest.mark.parametrize(("method", "status"), [("GET", 200), ("GET", 204), ("HEAD", 200)])
def test_work_in_the_background_goes_on_after_the_response(with_starlette, asgi, method, status):
    before = asgi.get("/left").json()
    with httpx.Client(base_url=with_starlette.url, timeout=30) as client:  # closes its connection
        answer = client.request(method, "/background", params={"status": status})
    assert answer.status_code == status
    wait_until(lambda: asgi.get("/left").json() == before + 1, 20, "the work")


def test_an_app_that_returns_without_a_response_is_500(asgi):
    assert asgi.get("/silent").status_code == 500
    with pytest.raises(httpx.RemoteProtocolError), asgi.stream("GET", "/silent?part") as answer:
        answer.read()


def test_custom_streams_are_not_buffered_and_end_on_disconnect(asgi):
    before = asgi.get("/left").json()
    with asgi.stream("GET", "/beats") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert uuid.UUID(stream.headers["x-request-id"])
        lines = (line for line in stream.iter_lines() if line)
        assert [next(lines) for _ in range(3)] == ["data: 0", "data: 1", "data: 2"]
    wait_until(lambda: asgi.get("/left").json() == before + 1, 10, "the stream's end")


def test_an_error_in_a_custom_route_is_500_and_logged(with_starlette, asgi):
    answer = asgi.get("/broken", headers={"x-request-id": "broken-1"})
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] == "broken-1"
    with_starlette.wait_for_log("broken on purpose")
    assert asgi.get("/ok").status_code == 200


def test_a_custom_route_that_exits_does_not_end_its_process(with_starlette, asgi):
    pid = asgi.get("/pid").json()
    assert asgi.get("/exits").status_code == 500
    with_starlette.wait_for_log("the project's app raised SystemExit")
    assert asgi.get("/pid").json() == pid


def test_requests_to_custom_routes_are_counted(asgi):
    asgi.get("/hello/you")
    line = 'belay_http_requests_total{method="GET",route="http.app",status="200"}'
    assert line in asgi.get("/metrics").text


# -- an ASGI app without a routing table ----------


def test_an_app_without_a_routing_table_gets_paths_unknown_to_belay(bare):
    assert bare.get("/anything").status_code == 418
    assert bare.get("/anything").text == "bare"
    assert bare.get("/ok").json() == {"ok": True, "services": {}}
    assert bare.get("/info").json()["flags"]["assistants"] is True


def test_disabled_webhooks_are_refused(bare):
    body = {"assistant_id": "counter", "webhook": "https://hooks.invalid/run"}
    assert "disable_webhooks" in refused(bare.post("/runs", json=body), 422)


def test_disabled_event_streaming_is_given_to_the_app(bare):
    thread = bare.post("/threads", json={}).json()["thread_id"]
    command = {"id": 1, "method": "run.start", "params": {"assistant_id": "counter"}}
    for method, path in (("POST", "commands"), ("POST", "stream/events"), ("GET", "stream/events")):
        answer = bare.request(method, f"/threads/{thread}/{path}", json=command)
        assert (answer.status_code, answer.text) == (418, "bare"), path
    assert bare.get(f"/threads/{thread}/runs").json() == []
    assert "/threads/{thread_id}/commands" not in bare.get("/openapi.json").json()["paths"]


def test_an_error_before_a_response_is_reported_by_belay(bare):
    answer = bare.get("/bare/broken", headers={"x-request-id": "b-1"})
    assert refused(answer, 500) == "Internal Server Error"
    assert answer.headers["x-request-id"] == "b-1"


def test_only_the_configured_origins_are_allowed(bare):
    for origin in ("https://a.example", "https://b.example"):
        answer = bare.get("/ok", headers={"origin": origin})
        assert answer.headers["access-control-allow-origin"] == origin
        assert "origin" in answer.headers["vary"].lower()
    for origin in ("https://c.example", "https://a.example.evil", "https://axexample", "null"):
        answer = bare.get("/ok", headers={"origin": origin})
        assert "access-control-allow-origin" not in answer.headers, origin


# -- a WSGI app, disabled routes, and the project's CORS -----------------


def test_a_wsgi_app_is_served_unchanged(with_flask, wsgi):
    answer = wsgi.get("/hello/you", headers={"x-request-id": "mine"})
    assert answer.json() == {"name": "you", "request_id": "mine"}
    assert answer.headers["x-request-id"] == "mine"
    assert wsgi.get("/beats").text == "beat 0\nbeat 1\nbeat 2\n"
    assert wsgi.post("/hello/you").status_code == 405
    assert wsgi.get("/broken").status_code == 500
    with_flask.wait_for_log("broken on purpose")
    assert refused(wsgi.get("/nothing"), 404) == "Not Found"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/assistants/search"),
        ("GET", f"/assistants/{UNKNOWN}"),
        ("POST", "/runs/wait"),
        ("POST", "/runs/batch"),
        ("POST", "/runs/cancel"),
        ("POST", "/runs/crons"),
        ("POST", "/store/items/search"),
        ("POST", f"/threads/{UNKNOWN}/runs"),
        ("GET", f"/threads/{UNKNOWN}/runs/{UNKNOWN}/join"),
        ("GET", "/info"),
        ("GET", "/metrics"),
        ("GET", "/docs/"),
        ("GET", "/openapi.json"),
    ],
)
def test_a_disabled_route_is_not_found(wsgi, method, path):
    body = {} if method == "POST" else None
    assert refused(wsgi.request(method, path, json=body), 404) == "Not Found"


def test_a_route_that_is_not_disabled_is_served(wsgi):
    assert wsgi.get("/ok?check_db=1").json() == {"ok": True, "services": {}}
    thread_id = new_thread(wsgi)
    assert wsgi.get(f"/threads/{thread_id}/state").status_code == 200


@pytest.mark.parametrize("origin", ["https://one.example", "https://abc.two.example"])
def test_the_cors_of_the_project_takes_precedence_over_the_settings(wsgi, origin):
    answer = wsgi.get("/hello/you", headers={"origin": origin})
    assert answer.headers["access-control-allow-origin"] == origin
    assert answer.headers["access-control-allow-credentials"] == "true"
    assert answer.headers["access-control-expose-headers"] == "x-mine"
    asked = {
        "access-control-request-method": "GET",
        "access-control-request-headers": "X-Team, x-b",
    }
    preflight = wsgi.options("/threads", headers={"origin": origin, **asked})
    assert preflight.headers["access-control-allow-methods"] == "GET"
    assert preflight.headers["access-control-allow-headers"].lower() == "x-team"
    assert preflight.headers["access-control-max-age"] == "7"


@pytest.mark.parametrize(
    "origin", ["https://not.asked", "https://one.example.evil", "https://a.two.example.evil"]
)
def test_an_origin_that_is_not_allowed_gets_no_cors_headers(wsgi, origin):
    answer = wsgi.get("/ok", headers={"origin": origin})
    assert not [name for name in answer.headers if name.startswith("access-control")]


# -- the end: the module's server is stopped --------


def test_the_lifespan_of_the_app_ends_with_the_server(with_starlette, scratch):
    with_starlette.stop()
    assert (scratch / "lifespan-end").read_text() == "ended"
