"""Test clients of `langgraph_sdk` without a URL, in graphs and in the project's app.

They reach the server that they run in. A node may do what the run's creator may.
"""

from __future__ import annotations

import json
import uuid
from typing import Any

import httpx
import psycopg
import pytest
from langgraph_sdk import get_sync_client

from tests.acceptance.playing import refused
from tests.conformance import watched
from tests.servers import PROJECT, LiveServer
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def scheduled(scratch):
    return scratch / "scheduled-thread"


@pytest.fixture(scope="module")
def server(make_server, scheduled):
    config = PROJECT.parent / "with_loopback.json"
    live = make_server(
        "loopback",
        config=config,
        TEST_SCHEDULED=str(scheduled),
        BELAY_ACCESS_LOG="1",
        BELAY_LOG_FORMAT="json",
    )
    live.start()
    yield live
    live.stop()


def as_user(server: LiveServer, name: str) -> httpx.Client:
    headers = {"Authorization": f"Bearer {name}"}
    return watched(httpx.Client(base_url=f"{server.url}/agents/v1", timeout=60, headers=headers))


@pytest.fixture(scope="module")
def ann(server):
    with as_user(server, "ann") as client:
        yield client


@pytest.fixture(scope="module")
def bob(server):
    with as_user(server, "bob") as client:
        yield client


def test_middleware_precedes_authentication_by_default(server, ann):
    """It marks a response that refuses the caller; the user whom it sets is not the caller."""
    refused = httpx.post(f"{server.url}/agents/v1/threads", json={})
    assert (refused.status_code, refused.headers["x-marked"]) == (401, "1")
    thread = ann.post("/threads", json={})
    assert (thread.status_code, thread.headers["x-marked"]) == (200, "1")
    assert thread.json()["metadata"]["owner"] == "ann"


def outcome(client: httpx.Client, graph_id: str, **given: Any) -> tuple[dict[str, Any], str]:
    """Run a graph on a new thread. Return what its node has told, and the run's id."""
    thread_id = client.post("/threads", json={}).json()["thread_id"]
    body = {"assistant_id": graph_id, "input": given}
    values = client.post(f"/threads/{thread_id}/runs/wait", json=body).json()
    (run,) = client.get(f"/threads/{thread_id}/runs").json()
    return json.loads(values["note"]), run["run_id"]


def test_a_node_calls_its_server_with_the_access_of_the_runs_creator(ann, bob):
    foreign = bob.post("/threads", json={}).json()["thread_id"]
    told, run_id = outcome(ann, "calls", thread_id=foreign)
    assert told == {
        "values": {"count": 2},
        "parent": run_id,
        "events": ["metadata", "values", "values"],
        "remote": {"count": 2},
        "owner": "ann",
        "refused": 404,
    }


def test_a_sync_node_calls_its_server(bob):
    told, run_id = outcome(bob, "calls_sync")
    assert told == {
        "values": {"count": 2},
        "parent": run_id,
        "remote": {"count": 2},
        "owner": "bob",
    }


def test_a_run_of_a_cron_acts_for_the_creator_of_the_cron(ann):
    cron = {"assistant_id": "calls", "schedule": "* * * * * *", "on_run_completed": "keep"}
    cron_id = ann.post("/runs/crons", json={**cron, "input": {}}).json()["cron_id"]
    search = {"metadata": {"made_by": "a node"}, "limit": 1000}
    before = len(ann.post("/threads/search", json=search).json())
    wait_until(lambda: len(ann.post("/threads/search", json=search).json()) > before, 60)
    assert ann.delete(f"/runs/crons/{cron_id}").status_code in (200, 204)


def test_the_access_ends_with_the_run(ann, server):
    told, run_id = outcome(ann, "tells")
    credential = told["x-belay-run"]
    assert credential.startswith(run_id)
    # The SDK takes this key from the environment; it is LangSmith's.
    assert "x-api-key" not in told
    for header in (credential, f"{run_id}.", "no-run.token", ""):
        answer = httpx.post(
            f"{server.url}/agents/v1/threads/search",
            json={},
            headers={"x-belay-run": header, "Authorization": "Bearer ann"},
            timeout=30,
        )
        assert "x-belay-run" in refused(answer, 401)
    answer = httpx.post(f"{server.url}/agents/v1/threads", json={}, headers={"x-belay-server": ""})
    assert refused(answer, 401) == "Who are you?"


def test_a_thread_that_a_node_has_left_behind_has_no_access(ann, bob, tmp_path):
    seen = tmp_path / "seen"
    body = {"assistant_id": "leaves", "input": {"note": str(seen)}}
    assert ann.post("/runs/wait", json=body).status_code == 200
    for _ in range(16):  # in all children, also the one with the thread
        bob.post("/runs/wait", json={"assistant_id": "tells", "input": {}})
    wait_until(lambda: seen.exists() and len(seen.read_text().split()) > 20, 60)
    lines = seen.read_text().split()
    assert set(lines) == {"401", "store-refused"}
    assert lines[-1] == lines[-3] == "store-refused"


def test_a_route_of_the_project_acts_for_its_caller(ann, bob, server):
    for client, name in ((ann, "ann"), (bob, "bob")):
        client.post("/threads", json={})
        headers = {"Authorization": f"Bearer {name}"}
        answer = httpx.get(f"{server.url}/agents/v1/mine/threads", headers=headers, timeout=30)
        assert set(answer.json()) == {name}


def test_a_route_of_the_project_sees_the_authenticated_caller(server):
    """Not the user whom its middleware has set before the authentication."""
    url = f"{server.url}/agents/v1/mine/who"
    for name in ("ann", "bob"):
        headers = {"authorization": f"Bearer {name}"}
        assert httpx.get(url, headers=headers, timeout=30).json() == [name, True]
    assert httpx.get(url, timeout=30).status_code == 401


def test_all_paths_start_with_the_mount_prefix(ann, server):
    assert httpx.get(f"{server.url}/ok", timeout=30).json()["ok"] is True
    for path in ("/info", "/", "/agents", "/agents/v1x/info", "/threads/search"):
        answer = httpx.get(f"{server.url}{path}", timeout=30)
        assert (answer.status_code, answer.json()) == (404, {"detail": "Not Found"}), path
    assert ann.get("/info").status_code == 200
    assert ann.get("").json()["ok"] is True
    assert ann.get("/openapi.json").json()["servers"] == [{"url": "/agents/v1"}]
    assert "/agents/v1/openapi.json" in ann.get("/docs/").text
    created = ann.post("/threads", json={})
    headers = {"Authorization": "Bearer ann"}
    with watched(get_sync_client(url=f"{server.url}/agents/v1", headers=headers)) as client:
        thread_id = created.json()["thread_id"]
        assert client.threads.get(thread_id)["thread_id"] == thread_id
        parts = list(client.runs.stream(thread_id, "counter", input={"count": 1}))
        assert parts[-1].data == {"count": 2}


def test_the_openapi_document_has_the_projects_authentication(ann):
    document = ann.get("/openapi.json").json()
    assert document["components"]["securitySchemes"]["Token"] == {
        "type": "http",
        "scheme": "bearer",
    }
    assert document["security"] == [{"Token": []}]
    assert document["paths"]["/ok"]["get"]["security"] == []
    assert "security" not in document["paths"]["/threads/search"]["post"]


def test_credentials_of_a_header_are_for_the_code_of_the_run_alone(server, ann):
    """The project names `cookie` among the headers of its graphs."""
    canary = f"cookie-{uuid.uuid4()}"
    thread_id = ann.post("/threads", json={}).json()["thread_id"]
    body = {"assistant_id": "counter", "input": {"count": 1}}
    modes = {"stream_mode": ["debug", "checkpoints", "messages", "updates"]}
    headers = {"cookie": f"session={canary}", "x-team": "blue"}
    path = f"/threads/{thread_id}"
    streamed = ann.post(f"{path}/runs/stream", json=body | modes, headers=headers)
    assert '"x-team":"blue"' in streamed.text
    answers = [ann.get(f"{path}{of}") for of in ("/runs", "/history", "/state", "")]
    assert '"x-team":"blue"' in answers[0].text
    for answer in (streamed, *answers):
        assert answer.status_code == 200, answer.text
        assert canary not in answer.text
    with psycopg.connect(server.database_url) as conn:
        for table, count in (("run", 1), ("checkpoints", 0)):
            kept = f"SELECT count(*) FROM {table} t WHERE t::text LIKE %s"
            assert conn.execute(kept, (f"%{canary}%",)).fetchone() == (count,), table


def test_log_records_have_the_headers_that_the_project_names(ann, server):
    headers = {"X-Team": "blue", "x-team-secret": "no", "x-request-id": "logged-headers"}
    assert ann.get("/info", headers=headers).status_code == 200

    def record():
        lines = server.log_lines()
        found = [line.partition("| ")[2] for line in lines if "logged-headers" in line]
        return json.loads(found[0]) if found else None

    logged = wait_until(record, 30)
    assert logged["headers"] == {"x-team": "blue"}
    assert (logged["method"], logged["path"]) == ("GET", "/info")


def test_code_of_which_the_caller_is_unknown_has_no_access(server):
    headers = {"Authorization": "Bearer ann"}
    answer = httpx.get(f"{server.url}/agents/v1/mine/executor", headers=headers, timeout=60)
    assert answer.json() == ["refused: 401", "found"]


def test_the_credential_of_a_run_is_in_no_other_run(ann):
    _, run_id = outcome(ann, "calls")
    found = ann.post("/threads/search", json={"metadata": {"made_by": "a node"}}).json()
    children = [run for t in found for run in ann.get(f"/threads/{t['thread_id']}/runs").json()]
    assert run_id in [run["metadata"].get("parent_run_id") for run in children]
    for run in children:
        assert "user-agent" in run["kwargs"]["config"]["configurable"]
        assert "x-belay" not in json.dumps(run)


def test_a_webhook_may_be_a_route_of_the_project(ann, server):
    body = {"assistant_id": "counter", "input": {"count": 1}, "webhook": "/hooks/ended?a=b"}
    thread_id = ann.post("/threads", json={}).json()["thread_id"]
    run_id = ann.post(f"/threads/{thread_id}/runs", json=body).json()["run_id"]

    def calls():
        headers = {"Authorization": "Bearer ann"}
        found = httpx.get(f"{server.url}/agents/v1/hooks/ended", headers=headers, timeout=30).json()
        return [call for call in found if call["body"]["run_id"] == run_id]

    (call,) = wait_until(calls, 60)
    assert call == {
        "user": "Bearer hooks",
        "body": {"run_id": run_id, "status": "success", "values": {"count": 2}},
    }


@pytest.mark.parametrize(
    "path", ["/threads", "/threads/{id}/runs/{id}/cancel", "/runs?x=y", "/th%72eads", "/ok"]
)
def test_a_webhook_may_not_be_a_route_of_the_server(ann, path):
    named = path.replace("{id}", "0f715a29-8ef9-58bb-8994-759656ff6aee")
    body = {"assistant_id": "counter", "input": {}, "webhook": named}
    assert "http.app" in refused(ann.post("/runs", json=body), 422)


def test_the_code_of_the_project_outside_of_requests_may_do_everything(ann, scheduled):
    wait_until(lambda: scheduled.exists() and scheduled.read_text(), 60)
    thread = ann.get(f"/threads/{scheduled.read_text()}").json()
    assert thread["metadata"] == {"owner": "ann", "by": "a scheduler"}
