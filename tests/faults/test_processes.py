"""What bad luck may not do: processes killed at the wrong moment, and `belay dev` as a whole."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import psutil
import pytest
import redis
from langgraph_sdk import get_sync_client

from app.dev.embedded import free_port
from tests.conftest import Beats
from tests.servers import LiveServer
from tests.waiting import wait_until


@pytest.fixture
def own_server(scratch, tmp_path):
    """A server of this test's own, because it is going to be hurt."""
    live = LiveServer(scratch / tmp_path.name)
    live.start()
    yield live
    live.stop()


@pytest.fixture
def client(own_server):
    with get_sync_client(url=own_server.url) as made:
        yield made


def gone(processes) -> list[psutil.Process]:
    """Those that are still there."""
    left = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                left.append(process)
        except psutil.NoSuchProcess:
            continue
    return left


def start_steps(client, beats, *, seconds=0.5, graph="sync_steps", **options):
    thread = client.threads.create()
    run = client.runs.create(
        thread["thread_id"],
        graph,
        input={"seconds": seconds, "beats": str(beats)},
        durability="sync",
        **options,
    )
    return thread["thread_id"], run["run_id"]


def test_a_killed_child_is_noticed_at_once_and_the_run_resumes(own_server, client, beats):
    thread_id, run_id = start_steps(client, beats)
    beats.wait_for("s3:start")
    os.kill(next(iter(beats.pids())), signal.SIGKILL)
    values = client.runs.join(thread_id, run_id)
    assert values["steps"] == ["s1", "s2", "s3", "s4"]
    names = beats.names()
    assert tuple(names.count(f"s{i}:start") for i in (1, 2, 3, 4)) == (1, 1, 2, 1)
    assert client.runs.get(thread_id, run_id)["status"] == "success"


def test_a_killed_worker_loses_nothing(own_server, client, beats, tmp_path):
    thread_id, run_id = start_steps(client, beats)
    queued = client.runs.create(thread_id, "sync_steps", input={"beats": str(tmp_path / "queued")})
    beats.wait_for("s2:start")
    own_server.worker_parent().kill()
    assert client.runs.join(thread_id, run_id)["steps"] == ["s1", "s2", "s3", "s4"]
    assert client.runs.join(thread_id, queued["run_id"])["steps"] == ["s1", "s2", "s3", "s4"] * 2
    assert beats.names().count("s1:start") == 1
    assert Beats(tmp_path / "queued").names().count("s1:start") == 1


def test_a_run_that_kills_every_child_ends_with_an_error_that_says_so(own_server, client, beats):
    thread = client.threads.create()
    run = client.runs.create(
        thread["thread_id"], "nodes", input={"kind": "async_beats", "beats": str(beats)}
    )
    for attempt in (1, 2, 3):
        wait_until(lambda n=attempt: len(beats.pids()) >= n, what=f"attempt {attempt}")
        os.kill(int(beats.lines()[-1].split()[1]), signal.SIGKILL)
    answer = client.runs.join(thread["thread_id"], run["run_id"])
    assert answer["__error__"]["error"] == "MaxAttemptsExceeded"
    assert "3 times" in answer["__error__"]["message"]
    assert client.threads.get(thread["thread_id"])["status"] == "error"
    assert client.runs.wait(None, "counter", input={"count": 1}) == {"count": 2}


@pytest.mark.parametrize(
    ("graph", "error"), [("leaves", "RuntimeError"), ("leaves_async", "MaxAttemptsExceeded")]
)
def test_a_node_that_exits_ends_its_run_and_nothing_else(own_server, client, graph, error):
    answer = client.runs.wait(None, graph, input={"count": 1}, raise_error=False)
    assert answer["__error__"]["error"] == error
    assert client.runs.wait(None, "counter", input={"count": 1}) == {"count": 2}


def test_a_cancel_accepted_before_the_worker_died_is_carried_out(own_server, client, beats):
    thread_id, run_id = start_steps(client, beats, seconds=5)
    beats.wait_for("s1:start")
    worker = own_server.worker_parent()
    worker.suspend()  # it cannot hear of the cancel
    client.runs.cancel(thread_id, run_id)
    worker.kill()
    wait_until(lambda: client.runs.get(thread_id, run_id)["status"] == "interrupted", 25, "the end")
    assert "s2:start" not in beats.names()


def test_the_server_has_a_limit_for_runs_that_set_none(scratch, tmp_path):
    live = LiveServer(scratch / tmp_path.name, BELAY_RUN_TIMEOUT_SECONDS="0.4").start()
    try:
        with get_sync_client(url=live.url) as client:
            answer = client.runs.wait(
                None, "nodes", input={"kind": "time_sleep"}, raise_error=False
            )
            assert answer["__error__"]["error"] == "TimeoutError"
            assert client.runs.wait(None, "counter", input={"count": 1}) == {"count": 2}
    finally:
        live.stop()


@pytest.mark.parametrize("words", [("gunicorn",)])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_web_process_that_goes_is_not_a_client_that_left(
    own_server, client, beats, words, number
):
    thread_id = client.threads.create()["thread_id"]
    body = {
        "assistant_id": "steps",
        "input": {"seconds": 1.0, "beats": str(beats)},
        "on_disconnect": "cancel",
    }
    url = f"{own_server.url}/threads/{thread_id}/runs/stream"
    with (
        httpx.Client(timeout=30) as http,
        http.stream("POST", url, json=body) as answer,
        pytest.raises(httpx.HTTPError),
    ):
        for line in answer.iter_lines():
            if line.startswith("event: values"):
                beats.wait_for("s1:start")
                for web in own_server.find(*words):
                    web.send_signal(number)
        raise httpx.ReadError("the stream was cut cleanly")

    def status():
        try:
            return client.runs.list(thread_id)[0]["status"]
        except httpx.HTTPError:
            return None

    wait_until(lambda: status() not in (None, "pending", "running"), 40, "the end")
    assert status() == "success"
    assert beats.names().count("s4:end") == 1


def test_a_restart_goes_on_with_running_and_pending_runs(own_server, client, beats, tmp_path):
    thread_id, run_id = start_steps(client, beats, seconds=1.5)
    queued = client.runs.create(thread_id, "sync_steps", input={"beats": str(tmp_path / "queued")})
    beats.wait_for("s2:start")
    assert own_server.stop() == 0
    own_server.start()
    assert client.runs.join(thread_id, run_id)["steps"] == ["s1", "s2", "s3", "s4"]
    client.runs.join(thread_id, queued["run_id"])
    assert client.runs.get(thread_id, run_id)["status"] == "success"
    assert client.runs.get(thread_id, queued["run_id"])["status"] == "success"
    assert beats.names().count("s1:start") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_belay_dev_leaves_no_process_behind(own_server, client, beats, number):
    start_steps(client, beats, seconds=30, graph="steps")
    beats.wait_for("s1:start")
    tree = own_server.tree()
    assert len(tree) > 10
    begun = time.monotonic()
    own_server.stop(number)
    wait_until(lambda: not gone(tree), 20, "every process to be gone")
    assert time.monotonic() - begun < 15


@pytest.mark.parametrize("words", [("gunicorn",), ("valkey-server",), ("bin/postgres", "-D")])
def test_belay_dev_restarts_what_dies(own_server, client, words):
    victim = min(own_server.find(*words), key=lambda p: p.create_time())
    victim.kill()
    wait_until(lambda: "starting it again" in own_server.log.read_text(), 10, "the restart")

    def answers():
        try:
            return client.runs.wait(None, "counter", input={"count": 1}) == {"count": 2}
        except httpx.HTTPError:
            return False

    wait_until(answers, 40, "the server to work again")


@pytest.mark.parametrize(
    ("document", "cause"),
    [
        (
            '{"graphs": {"broken": "./broken.py:graph"}}',
            "Graph 'broken' (./broken.py:graph): "
            "ModuleNotFoundError: No module named 'nothing_of_that_name'",
        ),
        ('{"graphs": {"broken": "./broken.py:graph"}, "env": ".missing"}', ".missing"),
        ('{"graphs"', "langgraph.json"),
    ],
)
def test_a_project_that_cannot_be_loaded_stops_the_start(scratch, tmp_path, document, cause):
    (tmp_path / "langgraph.json").write_text(document)
    (tmp_path / "broken.py").write_text("import nothing_of_that_name")
    command = [sys.executable, "-m", "app.cli", "dev", "--port", str(free_port())]
    command += ["--config", str(tmp_path / "langgraph.json")]
    done = subprocess.run(
        [*command, "--data-dir", str(scratch / tmp_path.name)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert cause in done.stdout
    assert "cannot start, see above" in done.stderr
    assert "Traceback" not in done.stdout


def test_a_busy_port_is_an_error_and_exit_2(scratch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "app.cli", "dev", "--port", port]
        done = subprocess.run(
            [*command, "--data-dir", str(scratch / "never")],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert f"127.0.0.1:{port}" in done.stderr
    assert not (scratch / "never").exists()


@pytest.mark.parametrize("action", ["interrupt", "rollback"])
def test_a_cancel_takes_effect_while_redis_is_away_and_after_it_came_back_empty(
    own_server, client, beats, action
):
    thread_id, run_id = start_steps(client, beats, seconds=60)
    beats.wait_for("s1:start")
    valkey = own_server.find("valkey-server")[0]
    valkey.suspend()  # half-open: it accepts, and never answers
    try:
        url = f"{own_server.url}/threads/{thread_id}/runs/{run_id}/cancel"
        answer = httpx.post(url, params={"action": action}, timeout=30)
        assert answer.status_code == 202

        def status():
            found = httpx.get(url.removesuffix("/cancel"), timeout=30)
            return found.json().get("status", found.status_code)

        wait_until(lambda: status() in ("interrupted", 404), 30, "the end without Redis")
    finally:
        valkey.resume()
    before = beats.lines()
    with redis.Redis.from_url(own_server.find("gunicorn")[0].environ()["REDIS_URL"]) as bus:
        bus.flushall()
    wait_until(lambda: client.runs.wait(None, "counter", input={"count": 1}) == {"count": 2}, 30)
    assert before == beats.lines()
