"""Agent runs on a server with the project's own authentication and authorization."""

from __future__ import annotations

import httpx
import pytest

from tests.acceptance.agent_runs.exa_clients import (
    ROUTES,
    assert_gone,
    assert_not_let_in,
    raw_client,
)
from tests.servers import LiveServer
from tests.waiting import wait_until


def as_user(guarded: LiveServer, token: str | None) -> httpx.Client:
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    return raw_client(guarded.url, None, **headers)


def create(client: httpx.Client) -> httpx.Response:
    return client.post("/agent/runs", json={"query": "q"})


@pytest.mark.parametrize("token", [None, "banned"])
def test_a_caller_rejected_by_the_project_cannot_use_agent_runs(guarded, token):
    with as_user(guarded, token) as client:
        for method, path in ROUTES:
            assert_not_let_in(client.request(method, path))


def test_each_user_is_a_team_and_owns_the_run_in_both_apis(guarded):
    with as_user(guarded, "agnes") as agnes, as_user(guarded, "boris") as boris:
        run = create(agnes).json()
        path = f"/agent/runs/{run['id']}"
        wait_until(lambda: agnes.get(path).json()["status"] == "completed", what="its end")
        assert [r["id"] for r in agnes.get("/agent/runs").json()["data"]] == [run["id"]]
        for method, whose in ROUTES[2:]:
            assert_gone(boris.request(method, whose.replace(ROUTES[2][1], path)))
        assert boris.get("/agent/runs").json()["data"] == []
        found = agnes.post("/threads/search", json={}).json()
        assert [thread["metadata"]["owner"] for thread in found] == ["agnes"]
        assert boris.post("/threads/search", json={}).json() == []
        for method, whose in ROUTES[4:]:
            assert agnes.request(method, whose.replace(ROUTES[2][1], path)).status_code == 200
        assert agnes.delete(path).status_code == 200
        assert_gone(agnes.get(path))


def test_a_user_who_may_not_create_runs_may_not_create_agent_runs(guarded):
    with as_user(guarded, "agnes:no-runs") as client:
        assert_not_let_in(create(client))
