"""The project's own authentication with two tenants: a resource of another tenant is not found.

`MATRIX` has every operation of the OpenAPI document that can name a resource of a user; a test
compares it with the document. Each row is sent three times: by a stranger with the owner's ids, by
the stranger with ids that do not exist, and by the owner. The first two responses must be equal.
"""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

import httpx
import psycopg
import pytest
from langgraph_sdk import get_sync_client
from langgraph_sdk.errors import APIStatusError
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from belay_server.domain.agent_runs.runs import agent_run_id
from tests.acceptance.agent_runs.exa_clients import BETA, asking
from tests.acceptance.playing import frames_of, refused
from tests.conformance import watched
from tests.servers import LiveServer
from tests.waiting import wait_until

NEVER_SOON = "0 0 1 1 *"
SECRET = "only for ann's eyes"


def as_user(server: LiveServer, token: str | None) -> httpx.Client:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    headers["Exa-Beta"] = BETA
    return watched(httpx.Client(base_url=server.url, timeout=30, headers=headers))


@pytest.fixture(scope="module")
def ann(guarded):
    with as_user(guarded, "ann") as client:
        yield client


@pytest.fixture(scope="module")
def bob(guarded):
    with as_user(guarded, "bob") as client:
        yield client


# --- the project's environment --------------------------------------------------------------


def test_settings_in_the_projects_env_count(ann):
    assert ann.get("/agent/runs", headers={"Exa-Beta": ""}).status_code == 200
    body = {"assistant_id": "headers", "input": {}}
    told = json.loads(ann.post("/runs/wait", json=body).json()["note"])
    assert told == {"x-default": "of the project"}


# --- authentication -----------------------------------------------------------------------------


def test_an_unauthenticated_request_is_refused_with_the_projects_error(guarded):
    with as_user(guarded, None) as nobody:
        answer = nobody.post("/threads/search", json={})
        assert refused(answer, 401) == "Who are you?"
        assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/ok", "/info", "/openapi.json", "/docs/"):
            assert nobody.get(path).status_code == 200, path
        assert nobody.get("/metrics").status_code == 401
    with as_user(guarded, "banned") as banned:
        assert refused(banned.post("/threads", json={}), 403) == "You are banned"


def test_custom_routes_require_authentication_if_so_configured(guarded):
    url = f"{guarded.url}/of/the/project"
    assert httpx.get(url, timeout=30).status_code == 401
    headers = {"Authorization": "Bearer ann"}
    answer = httpx.get(url, headers=headers, timeout=30)
    assert (answer.status_code, answer.text) == (200, "the project at /of/the/project")
    assert httpx.get(f"{guarded.url}/who", headers=headers, timeout=30).text == "ann"


@pytest.mark.parametrize("token", ["broken", "exits"])
def test_an_authentication_that_raises_returns_500_without_details(ann, guarded, token):
    headers = {"Authorization": f"Bearer {token}"}
    answer = httpx.post(f"{guarded.url}/threads/search", json={}, headers=headers, timeout=30)
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/json"
    assert "canary" not in answer.text
    assert ann.post("/threads/search", json={}).status_code == 200


def test_the_graph_receives_the_authenticated_user(ann, guarded):
    body = {"assistant_id": "whoami", "input": {}, "config": {"configurable": {"user_id": "eve"}}}
    told = json.loads(ann.post("/runs/wait", json=body).json()["note"])
    assert told == ["ann", "gold", "eve", []]
    body["config"] = {"configurable": {"langgraph_auth_user": {"identity": "eve", "plan": "x"}}}
    told = json.loads(ann.post("/runs/wait", json=body).json()["note"])
    assert told == ["ann", "gold", "ann", []]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_factory_gets_the_user_the_store_and_why_it_is_called(ann, bob, kind):
    graph_id = f"for_users_{kind}"
    thread_id = ann.post("/threads", json={"metadata": {"graph_id": graph_id}}).json()["thread_id"]
    assert ann.get(f"/threads/{thread_id}/state").status_code == 200
    assert ann.post(f"/threads/{thread_id}/history", json={}).status_code == 200
    for part in ("schemas", "graph", "subgraphs"):
        assert ann.get(f"/assistants/{graph_id}/{part}").status_code == 200
    update = {"values": {"count": 1}, "as_node": "say"}
    assert ann.post(f"/threads/{thread_id}/state", json=update).status_code == 200
    body = {"assistant_id": graph_id, "input": {}, "context": {"voice": "loud"}}
    told = json.loads(ann.post(f"/threads/{thread_id}/runs/wait", json=body).json()["note"])
    assert told == {
        "calls": ["assistants.read", "threads.create_run", "threads.read", "threads.update"],
        "user": ["ann", "gold", True],
        "node": ["ann", "gold", None, "gold"],
        "voice": "loud",
    }
    told = json.loads(bob.post("/runs/wait", json=body).json()["note"])
    assert (told["calls"], told["user"][0]) == (["threads.create_run"], "bob")


def test_the_code_of_a_graph_has_its_callers_access_in_every_process(ann, bob):
    bob.post("/threads", json={})
    made = ann.post("/threads", json={"metadata": {"graph_id": "calling"}}).json()
    thread_id = made["thread_id"]
    assert ann.get(f"/threads/{thread_id}/state").status_code == 200
    for part in ("schemas", "graph"):
        assert ann.get(f"/assistants/calling/{part}").status_code == 200
    update = {"values": {"count": 1}, "as_node": "say"}
    assert ann.post(f"/threads/{thread_id}/state", json=update).status_code == 200
    body = {"assistant_id": "calling", "input": {}}
    seen = json.loads(ann.post(f"/threads/{thread_id}/runs/wait", json=body).json()["note"])
    assert seen == {
        access: ["ann"]
        for access in ("assistants.read", "threads.create_run", "threads.read", "threads.update")
    }


def test_code_of_a_graph_that_exits_ends_no_web_process(ann, bob, guarded):
    thread_id = ann.post("/threads", json={}).json()["thread_id"]
    body = {"assistant_id": "exiting", "input": {}}
    assert ann.post(f"/threads/{thread_id}/runs/wait", json=body).json() == {"note": "ran"}
    for _ in range(3):
        assert "SystemExit" in refused(ann.get(f"/threads/{thread_id}/state"), 422)
        assert "SystemExit" in refused(ann.get("/assistants/exiting/schemas"), 400)
        assert ann.post("/threads/search", json={}).status_code == 200
        assert bob.post("/threads/search", json={}).status_code == 200
    assert "exited with code" not in guarded.log_until_now()


def test_the_sdk_authenticates_by_its_headers(guarded):
    headers = {"Authorization": "Bearer ann"}
    with watched(get_sync_client(url=guarded.url, headers=headers)) as client:
        thread = client.threads.create()
        assert thread["metadata"]["owner"] == "ann"
        assert client.runs.wait(thread["thread_id"], "counter", input={"count": 1}) == {"count": 2}
    with (
        watched(get_sync_client(url=guarded.url)) as nobody,
        pytest.raises(APIStatusError, match="Who are you"),
    ):
        nobody.threads.create()


def test_a_run_denied_by_a_handler_is_403(guarded):
    with as_user(guarded, "ann:no-runs") as client:
        thread = client.post("/threads", json={}).json()["thread_id"]
        body = {"assistant_id": "counter", "input": {"count": 1}}
        for path in (f"/threads/{thread}/runs", "/runs", "/runs/wait", "/runs/stream"):
            assert refused(client.post(path, json=body), 403) == "Forbidden"
        assert refused(client.post("/runs/batch", json=[body]), 403) == "Forbidden"
        cron = {**body, "schedule": NEVER_SOON}
        assert refused(client.post("/runs/crons", json=cron), 403) == "Forbidden"


def test_listing_the_runs_of_a_thread_is_authorized_as_a_search(guarded, ann):
    thread = ann.post("/threads", json={}).json()["thread_id"]
    with as_user(guarded, "ann:no-search") as client:
        assert client.get(f"/threads/{thread}").status_code == 200
        for answer in (
            client.get(f"/threads/{thread}/runs"),
            client.post("/threads/search", json={}),
            client.post("/threads/count", json={}),
        ):
            assert refused(answer, 403) == "Forbidden"


def test_a_handler_may_change_what_a_cron_runs(ann):
    cron = ann.post("/runs/crons", json={**CRON, "input": {"count": 1}}).json()
    assert cron["payload"]["input"] == {"count": 1, "note": "by a handler"}
    ann.delete(f"/runs/crons/{cron['cron_id']}").raise_for_status()


# --- the matrix of operations ---------------------------------------------------------------------

RUN = {"assistant_id": "counter", "input": {"count": 1}}
CRON = {"assistant_id": "counter", "schedule": NEVER_SOON}
START = {"id": 1, "method": "run.start", "params": RUN}
T, R = "/threads/{thread_id}", "/threads/{thread_id}/runs/{run_id}"
MATRIX: list[tuple[str, Any]] = [
    ("GET /assistants/{assistant_id}", None),
    ("PATCH /assistants/{assistant_id}", {"name": "stolen"}),
    ("POST /assistants/{assistant_id}/versions", {}),
    ("POST /assistants/{assistant_id}/latest", {"version": 1}),
    ("GET /assistants/{assistant_id}/graph", None),
    ("GET /assistants/{assistant_id}/subgraphs", None),
    ("GET /assistants/{assistant_id}/subgraphs/{namespace}", None),
    ("GET /assistants/{assistant_id}/schemas", None),
    (f"GET {T}", None),
    (f"PATCH {T}", {"metadata": {"stolen": True}}),
    (f"POST {T}/copy", None),
    (f"GET {T}/storage", None),
    (f"GET {T}/state", None),
    (f"GET {T}/state/{{checkpoint_id}}", None),
    (f"POST {T}/state/checkpoint", {"checkpoint": {"checkpoint_id": "{checkpoint_id}"}}),
    (f"POST {T}/state", {"values": {"count": 66}}),
    (f"PATCH {T}/state", {"metadata": {"stolen": True}}),
    (f"GET {T}/history", None),
    (f"POST {T}/history", {}),
    (f"GET {T}/runs", None),
    (f"POST {T}/runs", RUN),
    (f"POST {T}/runs", {"assistant_id": "{assistant_id}"}),
    (f"POST {T}/runs", {**RUN, "interrupt_before": ["nope"]}),
    (f"POST {T}/runs/wait", RUN),
    (f"POST {T}/runs/stream", RUN),
    (f"GET {R}", None),
    (f"GET {R}/join", None),
    (f"GET {R}/stream", None),
    (f"GET {T}/stream", None),
    (f"POST {T}/commands", {"id": 1, "method": "agent.getTree"}),
    (
        f"POST {T}/commands",
        {"id": 1, "method": "input.respond", "params": {"interrupt_id": "x", "response": 1}},
    ),
    (f"POST {T}/stream/events", {"channels": ["values", "lifecycle"]}),
    (f"POST {T}/runs/crons", CRON),
    ("GET /runs/{run_id}/join", None),
    ("GET /runs/{run_id}/stream", None),
    ("POST /runs", {"assistant_id": "{assistant_id}", "input": {}}),
    ("POST /runs", {"assistant_id": "{assistant_id}", "interrupt_before": ["nope"]}),
    ("POST /runs/wait", {"assistant_id": "{assistant_id}", "input": {}}),
    ("POST /runs/stream", {"assistant_id": "{assistant_id}", "input": {}}),
    ("POST /runs/batch", [{**RUN, "thread_id": "{thread_id}"}]),
    ("POST /runs/batch", [{"assistant_id": "{assistant_id}"}]),
    ("POST /runs/crons", {"assistant_id": "{assistant_id}", "schedule": NEVER_SOON}),
    ("POST /runs/crons/search", {"thread_id": "{thread_id}"}),
    ("POST /runs/crons/count", {"thread_id": "{thread_id}"}),
    ("GET /runs/crons/{cron_id}", None),
    ("PATCH /runs/crons/{cron_id}", {"enabled": False}),
    ("POST /threads/search", {"ids": ["{thread_id}"]}),
    ("POST /threads/prune", {"thread_ids": ["{thread_id}"]}),
    ("POST /threads/prune", {"thread_ids": ["{thread_id}"], "strategy": "keep_latest"}),
    ("POST /runs/cancel", {"thread_id": "{thread_id}", "run_ids": ["{run_id}"]}),
    (f"POST {R}/cancel", None),
    (f"POST {R}/cancel?action=rollback&wait=1", None),
    ("DELETE /runs/crons/{cron_id}", None),
    (f"DELETE {R}", None),
    (f"DELETE {T}", None),
    ("DELETE /assistants/{assistant_id}", None),
    ("DELETE /assistants/{assistant_id}?delete_threads=true", None),
]
#: Operations of the agent runs API, on the same runs.
AGENT_RUN = "/agent/runs/{id}"
AGENT_MATRIX: list[tuple[str, Any]] = [
    ("GET /agent/runs?cursor={id}", None),
    ("POST /agent/runs", {"query": "q", "previousRunId": "{id}"}),
    (f"GET {AGENT_RUN}", None),
    (f"GET {AGENT_RUN}/events", None),
    (f"POST {AGENT_RUN}/cancel", None),
    (f"POST {AGENT_RUN}/stop", None),
    (f"DELETE {AGENT_RUN}", None),
]
#: Operations without an id of a resource. Each has a test below, or is open to every user.
NAMES_NOTHING = {
    "POST /assistants": "creates",
    "POST /assistants/search": "searches",
    "POST /assistants/count": "searches",
    "POST /threads": "creates",
    "POST /threads/count": "searches",
    "PUT /store/items": "store",
    "GET /store/items": "store",
    "DELETE /store/items": "store",
    "POST /store/items/search": "store",
    "POST /store/namespaces": "store",
    "GET /": "public",
    "GET /ok": "public",
    "GET /info": "public",
    "GET /langgraph.schema.json": "public",
    "GET /metrics": "numbers of the whole server; asks who calls",
}


def test_the_matrix_has_every_operation_of_the_document(ann):
    paths = ann.get("/openapi.json").json()["paths"]
    operations = {
        f"{method.upper()} {path}"
        for path, methods in paths.items()
        for method in methods
        if method != "parameters"
    }
    rows = {operation.partition("?")[0] for operation, _ in MATRIX + AGENT_MATRIX}
    assert operations == rows | NAMES_NOTHING.keys()


def create_resources(client: httpx.Client, *, active: bool) -> dict[str, str]:
    """Create one of each resource, with a run that has ended, or a pending one if `active`."""
    assistant = client.post(
        "/assistants", json={"graph_id": "counter", "context": {"secret": SECRET}}
    ).json()
    thread_id = client.post("/threads", json={"metadata": {"secret": SECRET}}).json()["thread_id"]
    body = {**RUN, "input": {"count": 1, "note": SECRET}, "stream_resumable": True}
    run_id = client.post(f"/threads/{thread_id}/runs", json=body).json()["run_id"]
    client.get(f"/threads/{thread_id}/runs/{run_id}/join")
    state = client.get(f"/threads/{thread_id}/state").json()
    if active:
        later = {**body, "after_seconds": 3600}
        run_id = client.post(f"/threads/{thread_id}/runs", json=later).json()["run_id"]
    cron = client.post(f"/threads/{thread_id}/runs/crons", json=CRON).json()
    return {
        "assistant_id": assistant["assistant_id"],
        "thread_id": thread_id,
        "run_id": run_id,
        "checkpoint_id": state["checkpoint_id"],
        "cron_id": cron["cron_id"],
        "namespace": "child",
    }


def unknown_ids() -> dict[str, str]:
    names = ("assistant_id", "thread_id", "run_id", "checkpoint_id", "cron_id")
    return {**{name: str(uuid.uuid4()) for name in names}, "namespace": "child"}


def filled(document: Any, ids: dict[str, str]) -> Any:
    text = json.dumps(document)
    for name, value in ids.items():
        text = text.replace(f"{{{name}}}", value)
    return json.loads(text)


def send(client: httpx.Client, operation: str, body: Any, ids: dict[str, str]) -> tuple[int, str]:
    """Return status and body with the ids masked; of an unfinished stream, its beginning."""
    method, path = operation.split(" ", 1)
    how = {} if body is None else {"json": filled(body, ids)}
    with client.stream(method, filled(path, ids), **how) as response:
        text = ""
        try:
            until = time.monotonic() + 10
            for chunk in response.iter_text():
                text += chunk
                if "heartbeat" in text or time.monotonic() > until:
                    break
        except httpx.ReadTimeout:
            pass
    for name, value in ids.items():
        text = text.replace(value, f"<{name}>")
    return response.status_code, text


def resources_of(client: httpx.Client, ids: dict[str, str]) -> dict[str, Any]:
    """Return all resources that another user could have changed."""
    thread = ids["thread_id"]
    return {
        "assistant": client.get(f"/assistants/{ids['assistant_id']}").json(),
        "versions": client.post(f"/assistants/{ids['assistant_id']}/versions", json={}).json(),
        "thread": client.get(f"/threads/{thread}").json(),
        "state": client.get(f"/threads/{thread}/state").json(),
        "runs": client.get(f"/threads/{thread}/runs").json(),
        "crons": client.post("/runs/crons/search", json={"thread_id": thread}).json(),
    }


@pytest.mark.parametrize(
    ("operation", "body"), MATRIX, ids=[f"{n} {row[0]}" for n, row in enumerate(MATRIX)]
)
def test_a_resource_of_another_user_is_not_found(ann, bob, operation, body):
    ids = create_resources(ann, active="cancel" in operation)
    if "/runs/{run_id}" in operation and T not in operation:  # routes of stateless runs
        ids["run_id"] = ann.post("/runs", json=RUN).json()["run_id"]
    before = resources_of(ann, ids)
    strange = send(bob, operation, body, ids)
    unknown = send(bob, operation, body, unknown_ids())
    assert strange == unknown
    assert SECRET not in strange[1]
    assert resources_of(ann, ids) == before
    if "nope" not in str(body):
        status, text = send(ann, operation, body, ids)
        assert status < 300, text
        assert '"type":"error"' not in text or "input.respond" in str(body)


def agent_runs_of(client: httpx.Client, ids: dict[str, str]) -> dict[str, Any]:
    path = filled(AGENT_RUN, ids)
    return {
        "run": client.get(path).json(),
        "events": client.get(f"{path}/events").json(),
        "all": client.get("/agent/runs").json(),
    }


@pytest.mark.parametrize(
    ("operation", "body"), AGENT_MATRIX, ids=[operation for operation, _ in AGENT_MATRIX]
)
def test_an_agent_run_of_another_user_is_not_found(ann, bob, operation, body):
    active = operation.endswith(("cancel", "stop")) or operation.startswith("DELETE")
    asked = {**asking(seconds=60 if active else 0), "query": SECRET}
    made = ann.post("/agent/runs", json=asked)
    ids = {"id": made.json()["id"]}
    path = filled(AGENT_RUN, ids)
    wanted = "running" if active else "completed"
    wait_until(lambda: ann.get(path).json()["status"] == wanted, 20, f"it to be {wanted}")
    before = agent_runs_of(ann, ids)
    strange = send(bob, operation, body, ids)
    unknown = send(bob, operation, body, {"id": agent_run_id(uuid.uuid4())})
    assert strange == unknown
    assert SECRET not in strange[1]
    assert agent_runs_of(ann, ids) == before
    assert ids["id"] not in bob.get("/agent/runs").text
    status, text = send(ann, operation, body, ids)
    assert status == 200, text
    ann.delete(path)


# --- operations without an id -----------------------------------------------------------------


def test_a_created_resource_is_owned_by_its_creator(ann, bob):
    thread = ann.post("/threads", json={"metadata": {"owner": "bob"}}).json()
    assert thread["metadata"]["owner"] == "ann"
    assistant = ann.post("/assistants", json={"graph_id": "counter"}).json()
    assert assistant["metadata"]["owner"] == "ann"
    cron = ann.post("/runs/crons", json=CRON).json()
    assert cron["metadata"]["owner"] == "ann"
    again = {"thread_id": thread["thread_id"]}
    assert bob.post("/threads", json=again).status_code == 409
    seen = bob.post("/threads", json={**again, "if_exists": "do_nothing"})
    assert seen.status_code == 409
    again = {"graph_id": "counter", "assistant_id": assistant["assistant_id"]}
    assert bob.post("/assistants", json=again).status_code == 409
    seen = bob.post("/assistants", json={**again, "if_exists": "do_nothing"})
    assert seen.status_code == 409


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/threads", {}),
        ("/assistants", {"graph_id": "counter"}),
        ("/runs/crons", {"schedule": "0 0 1 1 *", "assistant_id": "counter"}),
    ],
)
def test_a_resource_cannot_be_given_to_another_user(ann, bob, path, body):
    """Otherwise a caller could plant an assistant with its instructions, or a cron whose runs it
    reads, among the resources of another."""
    made = ann.post(path, json=body).json()
    one = f"{path}/{next(value for name, value in made.items() if name.endswith('_id'))}"
    before = ann.get(one).json()
    given = ann.patch(one, json={"metadata": {"owner": "bob"}})
    assert given.status_code == 403
    assert "does not match what you may access" in given.json()["detail"]
    assert ann.get(one).json() == before
    assert bob.get(one).status_code == 404
    assert ann.delete(one).status_code in (200, 204)


def test_a_version_that_belonged_to_another_user_cannot_be_restored(guarded, ann):
    assistant_id = ann.post("/assistants", json={"graph_id": "counter"}).json()["assistant_id"]
    one = f"/assistants/{assistant_id}"
    ann.patch(one, json={"name": "second"}).raise_for_status()
    foreign = """UPDATE assistant_version SET metadata = '{"owner": "bob"}'
        WHERE assistant_id = %s AND version = 1"""
    with psycopg.connect(guarded.database_url, autocommit=True) as conn:
        conn.execute(foreign, (assistant_id,))
    assert ann.post(f"{one}/latest", json={"version": 1}).status_code == 403
    assert ann.get(one).json()["name"] == "second"


def test_an_open_websocket_does_not_show_a_thread_that_is_another_users_now(guarded, ann, bob):
    thread = {"thread_id": str(uuid.uuid4())}
    ann.post("/threads", json=thread).raise_for_status()
    url = f"{guarded.url.replace('http', 'ws')}/threads/{thread['thread_id']}/stream/events"
    command = {"method": "subscription.subscribe", "params": {"channels": ["values"]}}
    with connect(url, additional_headers={"Authorization": "Bearer ann"}) as opened:
        opened.send(json.dumps({"id": 1, **command}))
        assert json.loads(opened.recv(30))["type"] == "success"
        ann.delete(f"/threads/{thread['thread_id']}").raise_for_status()
        bob.post("/threads", json=thread).raise_for_status()
        opened.send(json.dumps({"id": 2, **command}))
        answer = json.loads(opened.recv(30))
    assert (answer["type"], answer["id"]) == ("error", 2)
    assert "not found" in answer["message"]
    bob.delete(f"/threads/{thread['thread_id']}").raise_for_status()


def test_a_cron_does_not_use_an_assistant_that_was_taken_from_its_creator(guarded, ann):
    body = {"graph_id": "counter", "context": {"prompt": "ann's"}}
    assistant_id = ann.post("/assistants", json=body).json()["assistant_id"]
    schedule = {"schedule": "* * * * * *", "assistant_id": assistant_id}
    cron = ann.post("/runs/crons", json={**schedule, "on_run_completed": "keep"}).json()
    one = f"/runs/crons/{cron['cron_id']}"
    search = {"metadata": {"assistant_id": assistant_id}}
    wait_until(lambda: ann.post("/threads/search", json=search).json(), 20, "a run")
    taken = """UPDATE assistant SET metadata = '{"owner": "bob"}' WHERE assistant_id = %s"""
    with psycopg.connect(guarded.database_url, autocommit=True) as conn:
        conn.execute(taken, (assistant_id,))
    wait_until(lambda: ann.get(one).json().get("last_error"), 20, "a due time without a run")
    assert ann.get(one).json()["last_error"] == "Thread or assistant not found."
    assert ann.delete(one).status_code == 204


def test_only_its_creator_changes_what_the_runs_of_a_cron_do(guarded, ann, bob):
    """They have the creator's access: whoever chose their input and webhook could read with it."""
    cron = ann.post("/runs/crons", json={"schedule": NEVER_SOON, "assistant_id": "counter"}).json()
    one = f"/runs/crons/{cron['cron_id']}"

    def give_to(owner):
        given = (
            "UPDATE cron SET metadata = jsonb_build_object('owner', %s::text) WHERE cron_id = %s"
        )
        with psycopg.connect(guarded.database_url, autocommit=True) as conn:
            conn.execute(given, (owner, cron["cron_id"]))
        return {"ann": ann, "bob": bob}[owner].get(one).json()

    before = give_to("bob")
    for body in (
        {"input": {"count": 1}},
        {"webhook": "https://example.com/"},
        {"config": {"configurable": {"x": 1}}},
        {"context": {"x": 1}},
        {"interrupt_before": "*", "enabled": False},
    ):
        said = refused(bob.patch(one, json=body), 403)
        assert f"{next(iter(body))}: only the user who created this cron" in said
    assert bob.get(one).json() == before
    allowed = {"schedule": "0 0 2 2 *", "enabled": False, "metadata": {"x": 1}}
    changed = bob.patch(one, json=allowed)
    assert changed.status_code == 200, changed.text
    assert changed.json()["schedule"] == "0 0 2 2 *"
    give_to("ann")
    assert ann.patch(one, json={"input": {"count": 1}}).json()["payload"]["input"] == {"count": 1}
    assert ann.delete(one).status_code == 204


def test_a_users_own_fields_are_for_the_code_of_its_runs_alone(ann, bob):
    """A project hands tokens to its graphs in them, and others may read a shared thread."""
    ids = create_resources(ann, active=False)
    path = f"/threads/{ids['thread_id']}"
    ann.patch(path, json={"metadata": {"readers": ["bob"]}}).raise_for_status()
    body = {"assistant_id": "whoami", "input": {}, "stream_mode": ["debug", "checkpoints"]}
    streamed = ann.post(f"{path}/runs/stream", json=body)
    assert streamed.status_code == 200
    runs = [bob.get(f"{path}/runs/{ids['run_id']}").json(), *ann.get(f"{path}/runs").json()]
    users = [run["kwargs"]["config"]["configurable"]["langgraph_auth_user"] for run in runs]
    assert {user["identity"] for user in users} == {"ann"}
    public = {"identity", "display_name", "is_authenticated", "permissions"}
    assert {key for user in users for key in user} == public
    assert '"langgraph_auth_user":{"identity":"ann"' in streamed.text
    assert '"plan":' not in streamed.text


def test_a_cron_outlives_the_deletion_of_its_assistant_by_another_user(guarded, ann, bob):
    assistant_id = ann.post("/assistants", json={"graph_id": "counter"}).json()["assistant_id"]
    crons = [
        f"/runs/crons/{user.post('/runs/crons', json=body).json()['cron_id']}"
        for user, body in (
            (ann, {"schedule": NEVER_SOON, "assistant_id": assistant_id}),
            (bob, {"schedule": NEVER_SOON, "assistant_id": "counter"}),
        )
    ]
    shared = "UPDATE cron SET assistant_id = %s WHERE cron_id = %s"
    with psycopg.connect(guarded.database_url, autocommit=True) as conn:
        conn.execute(shared, (assistant_id, crons[1].rpartition("/")[2]))
    assert ann.delete(f"/assistants/{assistant_id}").status_code == 204
    refused(ann.get(crons[0]), 404)
    left = bob.get(crons[1]).json()
    assert (left["enabled"], left["last_error"]) == (False, "Its assistant was deleted.")
    assert bob.delete(crons[1]).status_code == 204


@pytest.mark.parametrize("query", ["cancel_on_disconnect=1", "on_disconnect=cancel"])
@pytest.mark.parametrize("how", ["join", "stream"])
def test_who_may_only_read_a_thread_cancels_no_run_by_leaving(ann, bob, query, how):
    ids = create_resources(ann, active=False)
    thread = f"/threads/{ids['thread_id']}"
    ann.patch(thread, json={"metadata": {"readers": ["bob"]}}).raise_for_status()
    path = f"{thread}/runs/{ids['run_id']}/{how}"
    assert bob.get(path).status_code == 200
    assert refused(bob.get(f"{path}?{query}"), 404) == "Run not found"
    assert ann.get(f"{path}?{query}").status_code == 200


def test_searches_and_counts_exclude_resources_of_other_users(ann, bob):
    ids = create_resources(ann, active=False)
    for noun, key in (("threads", "thread_id"), ("assistants", "assistant_id")):
        found = [one[key] for one in bob.post(f"/{noun}/search", json={"limit": 1000}).json()]
        assert ids[key] not in found
        wanted = {"metadata": {"owner": "ann"}}
        assert bob.post(f"/{noun}/search", json=wanted).json() == []
        assert bob.post(f"/{noun}/count", json=wanted).json() == 0
        assert ann.post(f"/{noun}/count", json=wanted).json() > 0
    assert bob.post("/runs/crons/count", json={"metadata": {"owner": "ann"}}).json() == 0
    assert bob.post("/threads/search", json={"values": {"note": SECRET}}).json() == []
    assert bob.post("/threads/count", json={"values": {"note": SECRET}}).json() == 0
    # Every user may use the graphs' system assistants, and no user may change them.
    everybodys = bob.post("/assistants/search", json={"graph_id": "counter"}).json()
    system = next(one for one in everybodys if one["metadata"].get("created_by") == "system")
    patched = bob.patch(f"/assistants/{system['assistant_id']}", json={"name": "mine"})
    assert patched.status_code == 404


def test_a_thread_shared_for_reading_can_be_read_but_not_changed(ann, bob):
    ids = create_resources(ann, active=False)
    path = f"/threads/{ids['thread_id']}"
    ann.patch(path, json={"metadata": {"readers": ["bob"]}}).raise_for_status()
    assert bob.get(f"{path}/state").json()["values"]["note"] == SECRET
    assert bob.get(f"{path}/runs/{ids['run_id']}/join").status_code == 200
    assert bob.patch(path, json={"metadata": {"x": 1}}).status_code == 404
    assert bob.post(f"{path}/runs", json=RUN).status_code == 404
    assert bob.delete(path).status_code == 404


def test_a_conditional_create_on_the_thread_of_another_user_is_not_found(ann, bob):
    ids = create_resources(ann, active=False)
    before = resources_of(ann, ids)
    body = {**RUN, "if_not_exists": "create"}
    for how in ("", "/wait", "/stream"):
        answer = bob.post(f"/threads/{ids['thread_id']}/runs{how}", json=body)
        assert refused(answer, 404) == "Thread or assistant not found."
    answer = bob.post(f"/threads/{ids['thread_id']}/commands", json=START).json()
    assert (answer["type"], answer["message"]) == ("error", "404: Thread or assistant not found.")
    assert resources_of(ann, ids) == before
    fresh = str(uuid.uuid4())
    made = bob.post(f"/threads/{fresh}/runs", json=body)
    assert made.status_code == 200
    assert bob.get(f"/threads/{fresh}").json()["metadata"]["owner"] == "bob"
    assert ann.get(f"/threads/{fresh}").status_code == 404


def test_the_run_id_of_another_user_conflicts_without_revealing_the_run(ann, bob):
    ids = create_resources(ann, active=False)
    mine = bob.post("/threads", json={}).json()["thread_id"]
    body = {**RUN, "run_id": ids["run_id"]}
    for path in (f"/threads/{mine}/runs", "/runs"):
        answer = bob.post(path, json=body)
        assert answer.status_code == 409, answer.text
        assert SECRET not in answer.text
        assert ids["thread_id"] not in answer.text


def test_a_bulk_cancel_cancels_only_runs_of_the_caller(ann, bob):
    ids = create_resources(ann, active=True)
    mine = create_resources(bob, active=True)
    for status in ("pending", "all", "running"):
        bob.post("/runs/cancel", json={"status": status})
    run = ann.get(f"/threads/{ids['thread_id']}/runs/{ids['run_id']}").json()
    assert run["status"] == "pending"
    run = bob.get(f"/threads/{mine['thread_id']}/runs/{mine['run_id']}").json()
    assert run["status"] == "interrupted"


def test_a_stateless_run_is_owned_by_its_creator(ann, bob):
    run = ann.post("/runs", json=RUN).json()
    assert ann.get(f"/runs/{run['run_id']}/join").json() == {"count": 2}
    assert bob.get(f"/runs/{run['run_id']}/join").status_code == 404
    run = ann.post("/runs", json={**RUN, "on_completion": "keep"}).json()
    assert bob.get(f"/threads/{run['thread_id']}").status_code == 404
    assert ann.get(f"/threads/{run['thread_id']}").json()["metadata"]["owner"] == "ann"


def test_the_runs_of_a_cron_are_owned_by_its_creator(ann, bob):
    cron = ann.post(
        "/runs/crons",
        json={
            "assistant_id": "whoami",
            "schedule": "* * * * * *",
            "on_run_completed": "keep",
            "metadata": {"for": "the cron test"},
            "input": {},
        },
    ).json()
    wanted = {"metadata": {"graph_id": "whoami"}, "status": "idle"}

    def noted():
        found = ann.post("/threads/search", json=wanted).json()
        return [one["values"]["note"] for one in found if "note" in (one["values"] or {})]

    wait_until(noted, 20, "the cron to fire")
    ann.delete(f"/runs/crons/{cron['cron_id']}").raise_for_status()
    assert json.loads(noted()[0])[:2] == ["ann", "gold"]
    assert bob.post("/threads/search", json=wanted).json() == []


def test_each_user_has_a_separate_store(ann, bob):
    item = {"namespace": ["notes"], "key": "k", "value": {"text": SECRET}}
    assert ann.put("/store/items", json=item).status_code == 204
    read = {"namespace": "notes", "key": "k"}
    assert ann.get("/store/items", params=read).json()["value"] == {"text": SECRET}
    assert bob.get("/store/items", params=read).json() is None
    sneaky = {"namespace": "ann.notes", "key": "k"}
    assert bob.get("/store/items", params=sneaky).json() is None
    for prefix in ([], ["notes"], ["ann"], ["ann", "notes"]):
        found = bob.post("/store/items/search", json={"namespace_prefix": prefix}).json()
        assert found["items"] == []
        listed = bob.post("/store/namespaces", json={"prefix": prefix}).json()
        assert listed["namespaces"] == []
    assert bob.post("/store/namespaces", json={"suffix": ["notes"]}).json()["namespaces"] == []
    bob.request("DELETE", "/store/items", json={"namespace": ["notes"], "key": "k"})
    assert ann.get("/store/items", params=read).json()["value"] == {"text": SECRET}
    assert ann.post("/store/namespaces", json={}).json()["namespaces"] == [["ann", "notes"]]


def test_another_user_cannot_stream_join_or_cancel_a_running_run(ann, bob):
    thread_id = ann.post("/threads", json={}).json()["thread_id"]
    body = {"assistant_id": "steps", "input": {"seconds": 30}, "stream_resumable": True}
    run = ann.post(f"/threads/{thread_id}/runs", json=body).json()
    path = f"/threads/{thread_id}/runs/{run['run_id']}"
    wait_until(lambda: ann.get(path).json()["status"] == "running", 20, "the run to start")
    for url in (f"{path}/stream", f"/threads/{thread_id}/stream", f"{path}/join"):
        assert bob.get(url, headers={"Last-Event-ID": "-1"}).status_code == 404
    assert bob.post(f"{path}/cancel", params={"wait": "1"}).status_code == 404
    assert ann.get(path).json()["status"] == "running"
    assert ann.post(f"{path}/cancel", params={"wait": "1"}).status_code == 200


def test_the_owner_of_a_thread_can_stream_its_runs(ann):
    thread_id = ann.post("/threads", json={}).json()["thread_id"]
    body = {**RUN, "stream_mode": ["values"]}
    with ann.stream("POST", f"/threads/{thread_id}/runs/stream", json=body) as response:
        frames = frames_of(list(response.iter_lines()))
    assert [frame.event for frame in frames] == ["metadata", "values", "values"]


def test_only_the_owner_of_a_thread_can_open_its_websocket(guarded, ann):
    thread_id = ann.post("/threads", json={}).json()["thread_id"]
    url = guarded.url.replace("http://", "ws://") + f"/threads/{thread_id}/stream/events"
    with (
        pytest.raises(InvalidStatus) as refusal,
        connect(url, additional_headers={"Authorization": "Bearer bob"}),
    ):
        pass
    assert refusal.value.response.status_code == 404
    with pytest.raises(InvalidStatus) as refusal, connect(url):
        pass
    assert refusal.value.response.status_code == 401
    with connect(url, additional_headers={"Authorization": "Bearer ann"}) as socket:
        socket.send(json.dumps({"id": 1, "method": "run.start", "params": RUN}))
        assert json.loads(socket.recv(20))["type"] == "success"


# --- secrets ------------------------------------------------------------------------------------


def test_a_secret_of_a_caller_is_in_no_log_response_or_row(guarded, ann, beats):
    """Send a canary wherever clients have secrets, with runs that succeed, fail and are killed. The
    log includes those of web and worker, with tracebacks of failed nodes."""
    canary = "canary-" + uuid.uuid4().hex
    headers = {"x-api-key": canary, "cookie": f"session={canary}", "proxy-authorization": canary}
    answers = []
    with as_user(guarded, f"ann/{canary}") as client:
        client.headers.update(headers)
        thread_id = client.post("/threads", json={}).json()["thread_id"]
        for graph in ("counter", "bad", "whoami", "questions"):
            asked = {"assistant_id": graph, "input": {}, "stream_mode": ["values", "debug"]}
            answers.append(client.post("/runs/wait", json=asked))
            answers.append(client.post("/runs/stream", json=asked))
            answers.append(client.post(f"/threads/{thread_id}/runs", json=asked))
        given = {"kind": "swallow_sync", "beats": str(beats)}
        run = client.post("/runs", json={"assistant_id": "nodes", "input": given}).json()
        path = f"/threads/{run['thread_id']}/runs/{run['run_id']}"
        beats.wait_for("beat")
        answers += [
            client.get(path),
            client.post(f"{path}/cancel?wait=1"),
            client.get(f"/threads/{thread_id}/runs"),
            client.get(f"/threads/{thread_id}/history"),
            client.get(f"/threads/{thread_id}/state"),
            client.post("/runs/crons", json={**CRON, "webhook": "https://127.0.0.1/"}),
            client.post("/runs/crons", json=CRON),
            client.post("/threads", content=b"{"),
            client.post("/agent/runs", json={"query": "q"}),
            client.get("/metrics"),
        ]
    for name in ("banned", "broken"):
        header = {"Authorization": f"Bearer {name}/{canary}"}
        for path in ("/threads/x", "/agent/runs"):
            answers.append(httpx.get(guarded.url + path, headers=header, timeout=30))
    statuses = {answer.status_code for answer in answers}
    assert statuses >= {200, 401, 403, 422, 500}
    for answer in answers:
        assert canary not in answer.text
        assert all(canary not in value for value in answer.headers.values())
    # The log includes the failed handler, the failed node and the killed run.
    for said in ("the provider said", "did not stop when asked", "Traceback"):
        guarded.wait_for_log(said)
    log = guarded.log_until_now()
    assert canary not in log
    with psycopg.connect(guarded.database_url) as conn:
        for table in ("run", "thread", "cron", "assistant", "checkpoints", "checkpoint_writes"):
            kept = f"SELECT count(*) FROM {table} t WHERE t::text LIKE %s"
            assert conn.execute(kept, (f"%{canary}%",)).fetchone() == (0,), table
