"""Processes are killed at the wrong moment, `belay dev` restarts them, and bad settings stop it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import httpx
import psutil
import psycopg
import pytest
from langgraph_sdk import get_sync_client

from belay_server.dev.server import _lock_folder
from tests.conftest import Beats
from tests.faults.conftest import signal_tree
from tests.long_forms import full_case, long_case
from tests.ports import free_port
from tests.servers import PROJECT, LiveServer
from tests.waiting import wait_until


@pytest.fixture
def own_server(scratch, tmp_path):
    """Yield a separate server, because the test kills its processes."""
    live = LiveServer(scratch / tmp_path.name)
    live.start()
    yield live
    live.stop()


@pytest.fixture
def own_client(own_server):
    with get_sync_client(url=own_server.url) as made:
        yield made


def still_alive(processes) -> list[psutil.Process]:
    """Return the processes that are still alive."""
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


def queue_steps(client, thread_id, tmp_path):
    return client.runs.create(thread_id, "sync_steps", input={"beats": str(tmp_path / "queued")})


@pytest.mark.full
def test_a_killed_worker_loses_no_run(own_server, own_client, beats, tmp_path):
    """Use the default settings; `test_fault_points` covers a shorter lease."""
    thread_id, run_id = start_steps(own_client, beats)
    queued = queue_steps(own_client, thread_id, tmp_path)
    beats.wait_for("s2:start")
    own_server.worker_parent().kill()
    assert own_client.runs.join(thread_id, run_id)["steps"] == ["s1", "s2", "s3", "s4"]
    assert (
        own_client.runs.join(thread_id, queued["run_id"])["steps"] == ["s1", "s2", "s3", "s4"] * 2
    )
    assert beats.names().count("s1:start") == 1
    assert Beats(tmp_path / "queued").names().count("s1:start") == 1


@pytest.mark.parametrize(
    ("graph", "error"), [("leaves", "RuntimeError"), ("leaves_async", "MaxAttemptsExceeded")]
)
def test_a_node_that_exits_its_process_ends_only_its_run(cluster, probe, graph, error):
    client = probe.client
    answer = client.runs.wait(None, graph, input={"count": 1}, raise_error=False)
    assert answer["__error__"]["error"] == error
    assert client.runs.wait(None, "counter", input={"count": 1}) == {"count": 2}


def test_a_cancel_accepted_before_the_worker_died_is_carried_out(cluster, probe):
    thread_id, run_id, tag = probe.start(seconds=5)
    worker, _ = probe.worker_of(probe.wait_for(tag, "s1").pid)
    worker.send(signal.SIGSTOP)  # it cannot receive the cancel
    probe.client.runs.cancel(thread_id, run_id)
    worker.kill()
    assert probe.wait_until_over(thread_id, run_id) == "interrupted"
    assert probe.starts(tag) == ["s1"]


@pytest.mark.long
def test_the_children_of_a_parent_that_is_not_executed_are_killed(make_server, beats):
    """Its leases will lapse, and another worker end its runs: their code must not go on."""
    live = make_server("unsupervised", concurrency=1).start()
    try:
        with get_sync_client(url=live.url) as client:
            thread_id = client.threads.create()["thread_id"]
            input_ = {"kind": "sync_beats", "beats": str(beats)}
            run_id = client.runs.create(thread_id, "nodes", input=input_)["run_id"]
            beats.wait_for("beat")
            [child] = map(psutil.Process, beats.pids())
            parent = child.parent().parent()  # the zygote is between them
            parent.suspend()
            wait_until(lambda: not child.is_running() or child.status() == "zombie", 9, "its death")
            parent.resume()
            wait_until(lambda: len(beats.pids()) == 2, 60, "the next attempt")
            client.runs.cancel(thread_id, run_id, wait=True)
    finally:
        live.stop()


@pytest.mark.long
def test_the_run_timeout_of_the_server_applies_to_runs_without_one(scratch, tmp_path):
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


@pytest.mark.parametrize("number", [full_case(signal.SIGKILL), signal.SIGTERM])
def test_the_end_of_a_web_process_is_not_taken_for_a_disconnect(cluster, probe, number):
    thread_id = probe.client.threads.create()["thread_id"]
    body = {
        "assistant_id": "probe",
        "input": {"seconds": 0.5, "tag": "watched", "history": str(probe.history)},
        "on_disconnect": "cancel",
    }
    url = f"{cluster.url}/threads/{thread_id}/runs/stream"
    web = cluster.webs[0]
    with (
        httpx.Client(timeout=30) as http,
        http.stream("POST", url, json=body) as answer,
        pytest.raises(httpx.HTTPError),
    ):
        for line in answer.iter_lines():
            if line.startswith("event: values"):
                probe.wait_for("watched", "s1")
                signal_tree(web, number)
        raise httpx.ReadError("the stream was cut cleanly")
    web.process.wait(10)
    cluster.restart(web)
    [run] = probe.client.runs.list(thread_id)
    probe.assert_done_once(thread_id, run["run_id"], "watched")
    assert probe.starts("watched") == ["s1", "s2", "s3", "s4"]


@pytest.mark.long
def test_a_restart_continues_running_and_pending_runs(own_server, own_client, beats, tmp_path):
    thread_id, run_id = start_steps(own_client, beats, seconds=0.8)
    queued = queue_steps(own_client, thread_id, tmp_path)
    beats.wait_for("s2:start")
    assert own_server.stop() == 0
    own_server.start()
    assert own_client.runs.join(thread_id, run_id)["steps"] == ["s1", "s2", "s3", "s4"]
    own_client.runs.join(thread_id, queued["run_id"])
    assert own_client.runs.get(thread_id, run_id)["status"] == "success"
    assert own_client.runs.get(thread_id, queued["run_id"])["status"] == "success"
    assert beats.names().count("s1:start") == 1


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, long_case(signal.SIGKILL), long_case(signal.SIGTERM)],
)
def test_belay_dev_leaves_no_process_behind(own_server, own_client, beats, number):
    start_steps(own_client, beats, seconds=30, graph="steps")
    beats.wait_for("s1:start")
    tree = own_server.tree()
    assert len(tree) > 10
    own_server.stop(number)
    wait_until(lambda: not still_alive(tree), 20, "every process to be gone")


# A wait whose server dies continues at its Location, and the SDK warns of it.
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Request failed, attempting reconnect")
def test_belay_dev_restarts_a_dead_process_and_reports_it(own_server, own_client):
    for name, words in {
        "web": ("gunicorn",),
        "worker": ("celery",),
        "valkey": ("valkey-server",),
        "postgres": ("bin/postgres", "-D"),
    }.items():
        victim = min(own_server.find(*words), key=lambda p: p.create_time())
        victim.kill()
        line = f"{name} was killed by SIGKILL; starting it again"
        own_server.wait_for_log(line)

        def answers():
            try:
                return own_client.runs.wait(None, "counter", input={"count": 1}) == {"count": 2}
            except httpx.HTTPError:
                return False

        wait_until(answers, 40, f"the server to work again without its old {name}")


@pytest.mark.parametrize(
    ("document", "cause"),
    [
        long_case(
            '{"graphs": {"broken": "./broken.py:graph"}}',
            "Graph 'broken' (./broken.py:graph): "
            "ModuleNotFoundError: No module named 'nothing_of_that_name'",
        ),
        full_case('{"graphs": {"broken": "./broken.py:graph"}, "env": ".missing"}', ".missing"),
        long_case('{"graphs"', "langgraph.json"),
    ],
)
def test_a_project_that_cannot_be_loaded_stops_the_start(scratch, tmp_path, document, cause):
    (tmp_path / "langgraph.json").write_text(document)
    (tmp_path / "broken.py").write_text("import nothing_of_that_name")
    command = [sys.executable, "-m", "belay_server", "dev", "--port", str(free_port())]
    command += ["--config", str(tmp_path / "langgraph.json")]
    done = subprocess.run(
        [*command, "--data-dir", str(scratch / tmp_path.name)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    # The first of migration, web and worker to read the setting reports it.
    assert cause in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stdout


@pytest.mark.long
def test_a_concurrency_above_the_postgres_connections_stops_the_start(database_url):
    """The children would use all connections: no lease would be renewed, no cancel received."""
    reserved = "current_setting('superuser_reserved_connections')::int"
    with psycopg.connect(database_url) as conn:
        row = conn.execute(f"SELECT current_setting('max_connections')::int - {reserved}")
        [[allowed]] = row.fetchall()
    environ = {
        "DATABASE_URL": database_url,
        "REDIS_URL": "redis://127.0.0.1:1",
        "BELAY_CONFIG": str(PROJECT),
        "BELAY_CONCURRENCY": str(allowed),
        "BELAY_ISOLATION": "process",
    }
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "belay_workers", "worker"],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 3
    needs = f"{allowed} runs at once need {allowed + 4} connections to Postgres, which allows"
    assert f"belay worker: {needs} {allowed}: raise its max_connections" in done.stderr


def test_a_worker_with_another_pool_does_not_start():
    """It would take doorbells and execute nothing."""
    environ = {"DATABASE_URL": "postgresql://127.0.0.1:1/x", "REDIS_URL": "redis://127.0.0.1:1"}
    done = subprocess.run(
        [sys.executable, "-m", "belay_server", "worker", "--", "--pool", "solo"],
        env={**os.environ, **environ, "BELAY_CONFIG": str(PROJECT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 3
    said = done.stderr.splitlines()[-1]
    assert said == "belay worker: only Belay's own pool executes runs: omit --pool"


def test_a_second_server_in_the_same_folder_is_refused(tmp_path):
    command = [sys.executable, "-m", "belay_server", "dev", "--port", str(free_port())]
    with _lock_folder(tmp_path):
        done = subprocess.run(
            [*command, "--data-dir", str(tmp_path)],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.returncode == 2
    assert "another `belay dev` uses" in done.stderr.splitlines()[-1]
    assert done.stdout == ""


def test_a_busy_port_is_an_error_and_exit_2(scratch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "belay_server", "dev", "--port", port]
        done = subprocess.run(
            [*command, "--data-dir", str(scratch / "never")],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert f"127.0.0.1:{port}" in done.stderr
    assert not (scratch / "never").exists()
