"""API keys are created, listed and revoked on the command line, and required by the server."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import uuid
from contextlib import ExitStack, suppress
from functools import partial

import httpx
import psycopg
import pytest
from langgraph_sdk import get_sync_client
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from belay_server.bus.rate_limits import FailedLogins
from belay_server.dev.process_tree import die_with_parent
from tests.acceptance.playing import UNKNOWN, refused, socket_url
from tests.conformance import watched
from tests.ports import free_port
from tests.servers import PROJECT, LiveServer
from tests.waiting import wait_until

RUN = {"assistant_id": "counter", "input": {"count": 1}}
LATER = {**RUN, "after_seconds": 3600}


@pytest.fixture(scope="module")
def locked(keyed):
    return keyed


def belay(server: LiveServer, *words: str, code: int = 0) -> tuple[str, str]:
    """Run `belay keys …` on the server's database and return its stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "belay_server", "keys", *words],
        env={**os.environ, "DATABASE_URL": server.database_url},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done.stdout.strip(), done.stderr.strip()


@pytest.fixture(scope="module")
def key(locked):
    return belay(locked, "create", "--name", "tests")[0]


def call(server: LiveServer, **headers: str) -> httpx.Response:
    return httpx.post(f"{server.url}/threads/search", json={}, headers=headers, timeout=30)


def test_a_key_is_accepted_in_either_header(locked, key):
    assert call(locked, **{"x-api-key": key}).status_code == 200
    assert call(locked, Authorization=f"Bearer {key}").status_code == 200
    assert call(locked, Authorization=f"bearer   {key}").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"x-api-key": ""},
        {"x-api-key": "nonsense"},
        {"x-api-key": "belay_" + "a" * 12 + "_" + "A" * 32},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic dXNlcjpwYXNz"},
        {"x-api-key": "x" * 5000},
        {"x-api-key": "belay_é"},
    ],
    ids=str,
)
def test_a_request_without_a_valid_key_is_unauthorized(locked, headers):
    sent = {name: value.encode() for name, value in headers.items()}
    answer = call(locked, **sent)
    assert refused(answer, 401)
    assert answer.headers["www-authenticate"] == "Bearer"


def test_a_nearly_correct_key_is_refused(locked, key):
    for wrong in (key[:-1] + ("A" if key[-1] != "A" else "B"), key + "A", key.upper(), key[:-1]):
        assert refused(call(locked, **{"x-api-key": wrong}), 401)
    both = {"x-api-key": "wrong", "Authorization": f"Bearer {key}"}
    assert refused(call(locked, **both), 401)


def test_every_route_except_the_public_ones_requires_a_key(locked):
    document = httpx.get(f"{locked.url}/openapi.json").json()
    open_ones = set()
    for path, methods in document["paths"].items():
        for method in methods:
            url = locked.url + path.replace("{", "").replace("}", "")
            for name in ("thread_id", "run_id", "assistant_id", "cron_id", "checkpoint_id"):
                url = url.replace(f"/{name}", f"/{UNKNOWN}")
            asked = method != "parameters" and not path.startswith("/agent/")
            if asked and httpx.request(method.upper(), url, timeout=30).status_code != 401:
                open_ones.add(f"{method.upper()} {path}")
    assert open_ones == {"GET /", "GET /ok", "GET /info", "GET /langgraph.schema.json"}


def test_the_sdk_authenticates_with_a_key(locked, key):
    with watched(get_sync_client(url=locked.url, api_key=key)) as client:
        assert client.runs.wait(None, "counter", input={"count": 1}) == {"count": 2}


def test_a_revoked_key_is_refused_and_others_stay_valid(locked, key):
    other = locked.new_key("to be revoked")
    assert call(locked, **{"x-api-key": other}).status_code == 200
    said, _ = belay(locked, "revoke", "to be revoked")
    assert said.startswith(f"revoked {other.split('_')[1]}")
    wait_until(lambda: call(locked, **{"x-api-key": other}).status_code == 401, 10, "the revoke")
    assert call(locked, **{"x-api-key": key}).status_code == 200
    said, _ = belay(locked, "revoke", other)  # the key itself, which is not repeated
    assert said.startswith(f"revoked {other.split('_')[1]} ")
    assert other not in said
    assert "there is no key nobody" in belay(locked, "revoke", "nobody", code=1)[1]


def test_the_code_of_a_run_loses_its_access_with_the_key_that_created_it(locked, key, tmp_path):
    other = locked.new_key("replaced")
    note = tmp_path / "called"
    body = {"assistant_id": "refused", "input": {"note": str(note)}}
    with watched(httpx.Client(base_url=locked.url, timeout=60)) as client:
        run = client.post("/runs", json=body, headers={"x-api-key": other}).json()
        wait_until(note.exists, 30, "a call")
        belay(locked, "revoke", "replaced")
        path = f"/threads/{run['thread_id']}/runs/{run['run_id']}/join"
        values = client.get(path, headers={"x-api-key": key}).json()
    assert "revoked or expired; the run's code has no access" in values["note"]
    assert values["note"].startswith("401")


def test_revoking_a_key_states_and_disables_its_crons(locked, key):
    other = locked.new_key("scheduler")
    body = {"assistant_id": "counter", "schedule": "0 0 1 1 *"}
    with watched(httpx.Client(base_url=locked.url, timeout=60)) as client:
        cron = client.post("/runs/crons", json=body, headers={"x-api-key": other}).json()
        kept = client.post("/runs/crons", json=body, headers={"x-api-key": key}).json()
        said, _ = belay(locked, "revoke", "scheduler")
        assert "crons that continue: 1 (--disable-crons disables them)" in said
        said, _ = belay(locked, "revoke", "scheduler", "--disable-crons")
        assert said.endswith("crons disabled: 1")
        for one, enabled in ((cron, False), (kept, True)):
            path = f"/runs/crons/{one['cron_id']}"
            found = client.get(path, headers={"x-api-key": key}).json()
            assert found["enabled"] is enabled
            client.delete(path, headers={"x-api-key": key})


def test_a_key_expires(locked):
    short = belay(locked, "create", "--name", "short", "--days", "0.00004")[0]
    assert call(locked, **{"x-api-key": short}).status_code == 200
    wait_until(lambda: call(locked, **{"x-api-key": short}).status_code == 401, 20, "the expiry")
    assert "expired" in belay(locked, "list")[0]


def test_a_key_for_agent_runs_is_refused_on_other_routes(locked):
    narrow = belay(locked, "create", "--name", "narrow", "--scope", "agent_runs")[0]
    answer = call(locked, **{"x-api-key": narrow})
    assert refused(answer, 403) == "This API key is for Agent runs only"


def test_keys_are_listed_without_their_secrets_and_kept_as_hashes(locked, key):
    call(locked, **{"x-api-key": key})
    listed, _ = belay(locked, "list")
    _, prefix, secret = key.split("_", 2)
    line = next(line for line in listed.splitlines() if line.startswith(prefix))
    assert "tests" in line
    assert "never" not in line
    assert secret not in listed
    with psycopg.connect(locked.database_url) as conn:
        rows = conn.execute("SELECT to_jsonb(api_key)::text FROM api_key").fetchall()
    assert all(secret not in row[0] for row in rows)


def test_the_secret_of_a_key_is_in_no_log_and_no_response(locked, key):
    """Use the key as a canary in every place where a client may send one."""
    secret = key.split("_", 2)[2]
    headers = {"x-api-key": key, "Authorization": f"Bearer {key}"}
    with watched(httpx.Client(base_url=locked.url, headers=headers, timeout=30)) as client:
        thread = client.post("/threads", json={}).json()["thread_id"]
        answers = [
            client.post("/runs/wait", json=RUN),
            client.post(f"/threads/{thread}/runs/wait", json={**RUN, "assistant_id": "bad"}),
            client.post("/threads", content=b"{"),
            client.get(f"/threads/{thread}/runs", params={"limit": "x"}),
            client.get("/nowhere"),
            client.get("/metrics"),
            client.post("/runs", json={"assistant_id": "nope"}),
            client.get(f"/threads/{thread}/history"),
            client.get(f"/threads/{thread}/runs"),
        ]
        wrong = {"x-api-key": key[:-1] + "~"}
        answers.append(client.get("/threads", headers=wrong))
    for answer in answers:
        assert secret not in answer.text
        assert secret[:-1] not in answer.text
        assert all(secret not in value for value in answer.headers.values())
    log = locked.log_until_now()
    assert secret not in log
    assert secret[:-1] not in log


def test_revoking_a_key_closes_its_streams_and_waits(locked):
    key = locked.new_key("doomed")
    headers = {"x-api-key": key}
    with watched(httpx.Client(base_url=locked.url, headers=headers, timeout=120)) as client:
        thread = client.post("/threads", json={}).json()["thread_id"]
        run = client.post(f"/threads/{thread}/runs", json=LATER).json()
        ended = []

        def follow(path):
            url = f"{locked.url}{path}"
            with (
                suppress(httpx.HTTPError),
                httpx.stream("GET", url, headers=headers, timeout=120) as stream,
            ):
                for _ in stream.iter_raw():
                    pass
            ended.append(path)

        paths = [f"/threads/{thread}/stream", f"/threads/{thread}/runs/{run['run_id']}/stream"]
        paths.append(f"/threads/{thread}/runs/{run['run_id']}/join")
        following = [threading.Thread(target=follow, args=(path,)) for path in paths]
        for one in following:
            one.start()
        with connect(socket_url(locked, thread), additional_headers=headers) as opened:
            opened.send(json.dumps({"id": 1, "method": "agent.getTree"}))
            assert json.loads(opened.recv(20))["id"] == 1
            belay(locked, "revoke", "doomed")
            with pytest.raises(ConnectionClosed):
                while True:
                    opened.recv(60)
        for one in following:
            one.join(60)
        assert sorted(ended) == sorted(paths)
        wait_until(lambda: client.get(f"/threads/{thread}").status_code == 401, 20, "a refusal")
    with (
        pytest.raises(InvalidStatus),
        connect(socket_url(locked, thread), additional_headers=headers),
    ):
        pass


def test_a_redacted_error_message_is_in_no_response(locked):
    """The message is absent from every response about the run, its states and its events."""
    headers = {"x-api-key": locked.new_key("redacted")}
    with watched(httpx.Client(base_url=locked.url, headers=headers, timeout=60)) as client:
        seen = _responses_about_an_error(client)
    for text in seen[:3]:
        assert "An internal error occurred" in text
    assert [text for text in seen if "boom" in text] == []


def _responses_about_an_error(client) -> list[str]:
    thread = client.post("/threads", json={}).json()["thread_id"]
    body = {
        "assistant_id": "bad",
        "input": {"count": 1},
        "stream_mode": ["values", "updates", "tasks", "checkpoints", "debug", "events"],
        "stream_subgraphs": True,
        "stream_resumable": True,
    }
    seen = [client.post(f"/threads/{thread}/runs/stream", json=body).text]
    [run] = client.get(f"/threads/{thread}/runs").json()
    assert run["status"] == "error"
    paths = ("/state", "/history?limit=10", "", "/runs", f"/runs/{run['run_id']}/join")
    return seen + [client.get(f"/threads/{thread}{path}").text for path in paths]


def test_a_key_revoked_while_a_body_is_received_is_refused(locked):
    key = locked.new_key("slow")
    head = (
        f"POST /threads HTTP/1.1\r\nHost: localhost\r\nx-api-key: {key}\r\n"
        "Content-Type: application/json\r\nContent-Length: 2\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", locked.port)) as slow:
        slow.sendall(head.encode())

        def is_used() -> bool:
            [line] = [line for line in belay(locked, "list")[0].splitlines() if " slow " in line]
            return "never" not in line

        def is_refused() -> bool:
            headers = {"x-api-key": key}
            answer = httpx.get(f"{locked.url}/threads/{uuid.uuid4()}", headers=headers)
            return answer.status_code == 401

        wait_until(is_used, 20, "its use")
        belay(locked, "revoke", "slow")
        wait_until(is_refused, 20, "its refusal")
        slow.sendall(b"{}")
        slow.settimeout(20)
        assert slow.recv(4096).startswith(b"HTTP/1.1 401 ")


def test_the_number_of_slow_cancel_requests_is_limited(locked):
    key = locked.new_key("slow")
    head = f"POST /runs/cancel HTTP/1.1\r\nHost: localhost\r\nx-api-key: {key}\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
    with ExitStack() as stack:
        opened = []
        for _ in range(30):
            one = stack.enter_context(
                socket.create_connection(("127.0.0.1", locked.port), timeout=5)
            )
            one.sendall(head.encode())
            opened.append(one)

        def answered() -> int:
            count = 0
            for one in opened:
                one.setblocking(False)
                with suppress(BlockingIOError):
                    count += one.recv(64, socket.MSG_PEEK).startswith(b"HTTP/1.1 429")
            return count

        wait_until(lambda: answered() == 20, 20, "those beyond the tenth to be refused")


def fail_often(server: LiveServer) -> None:
    """Count failed authentications of this address, up to the limit of an hour: the test is not to
    depend on how many requests the machine serves in a minute."""
    logins = FailedLogins(server.worker_parent().environ()["REDIS_URL"], "belay:")
    hourly = next(item for item in logins._items if item.get_expiry() == 3600)
    left = logins._limiter.get_window_stats(hourly, "failures", "127.0.0.1").remaining
    assert logins._limiter.hit(hourly, "failures", "127.0.0.1", cost=left)


def test_invalid_keys_are_rate_limited_and_valid_ones_are_not(locked):
    """Not before other tests of this server: further invalid keys are refused with 429."""
    key = locked.new_key("right")
    invalid = {"x-api-key": f"belay_{'a' * 12}_{0:032d}"}
    with watched(httpx.Client(base_url=locked.url, timeout=60)) as client:
        search = partial(client.post, "/threads/search", json={})
        assert search(headers=invalid).status_code == 401
        fail_often(locked)
        assert search(headers=invalid).status_code == 429
        assert search(headers={"x-api-key": key}).status_code == 200


@pytest.mark.long
def test_no_password_is_logged_while_redis_is_unavailable(database_url, tmp_path):
    """Web and worker run and log errors without Redis; a run is accepted meanwhile."""
    environ = {
        "DATABASE_URL": database_url,
        "REDIS_URL": "redis://:canary-redis@127.0.0.1:1/0",
        "BELAY_AUTH": "none",
        "BELAY_CONFIG": str(PROJECT),
        "BELAY_RATE_LIMIT": "1000/second",
        "BELAY_MAX_OPEN_REQUESTS": "10",
        "BELAY_WEBHOOK_SECRET": "canary-hook",
        "PORT": str(free_port()),
    }
    web = [
        "gunicorn",
        "-c",
        "python:belay_server.gunicorn_conf",
        "belay_server.factory:create_app()",
    ]
    worker = ["celery", "-A", "belay_workers", "worker", "--concurrency", "1"]
    log = tmp_path / "log"
    with log.open("ab") as output:
        started = [
            subprocess.Popen(
                [sys.executable, "-m", *words],
                env={**os.environ, **environ},
                cwd=PROJECT.parents[2],
                stdout=output,
                stderr=output,
                preexec_fn=die_with_parent(os.getpid(), signal.SIGKILL),
            )
            for words in (web, worker)
        ]
    try:
        url = f"http://127.0.0.1:{environ['PORT']}"
        wait_until(lambda: _answers(url), 180, "the web process")
        with watched(httpx.Client(base_url=url, timeout=30)) as client:
            assert client.post("/runs", json=RUN).status_code == 200
        for words in (
            "cannot count requests",
            "cannot count open requests in Redis",
            "Cannot connect to redis",
        ):
            wait_until(lambda words=words: words in log.read_text(), 40, words)
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(30)
    assert "canary" not in log.read_text()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ok").status_code == 200
    except httpx.TransportError:
        return False


# --- a server that is reachable from the network ------------------------------------------------


def dev(*words: str, **env: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("BELAY_")}
    return subprocess.run(
        [sys.executable, "-m", "belay_server", "dev", *words],
        env={**clean, **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_belay_dev_does_not_start_on_a_public_address_without_auth(tmp_path):
    words = ("--host", "0.0.0.0", "--port", "20199", "--data-dir", str(tmp_path / "data"))
    done = dev(*words, "--config", str(PROJECT))
    assert done.returncode == 2
    assert "0.0.0.0 can be reached from other machines" in done.stderr
    assert "BELAY_AUTH=keys" in done.stderr
    assert not (tmp_path / "data").exists()


def test_gunicorn_does_not_start_on_a_public_address_without_auth():
    command = [sys.executable, "-m", "gunicorn", "-c", "python:belay_server.gunicorn_conf"]
    command += ["--bind", "0.0.0.0:20198", "belay_server.factory:create_app()"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("BELAY_")}
    urls = {"DATABASE_URL": "postgresql://nobody@127.0.0.1:1/x", "REDIS_URL": "redis://127.0.0.1:1"}
    done = subprocess.run(
        command, env={**clean, **urls}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 3
    assert "0.0.0.0 can be reached from other machines" in done.stderr
