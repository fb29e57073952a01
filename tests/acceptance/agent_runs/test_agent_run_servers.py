"""Agent runs on servers with other settings: API keys, limits."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import httpx
import pytest

from belay_server.db.api_keys import revoke_api_key
from belay_server.db.postgres.connection import connect
from tests.acceptance.agent_runs.exa_clients import (
    BETAS,
    ROUTES,
    asking,
    assert_error,
    assert_gone,
    assert_not_let_in,
    clients_watched,
    raw_client,
    until_running,
)
from tests.acceptance.playing import refused
from tests.servers import LiveServer
from tests.waiting import wait_until

__all__ = ["clients_watched"]


class Locked:
    """A server that requires API keys, with one child process, small limits, and no beta header."""

    def __init__(self, live: LiveServer) -> None:
        self.live = live
        self.url = live.url
        self._teams = 0

    def key(self, *, team: str | None = None, scope: str = "all") -> str:
        """Create a key, of a new team unless one is named."""
        self._teams += 1
        team = team or f"team {self._teams}"
        return self.live.new_key(team, team=team, scope=scope)

    def exa(self, key: str):
        from exa_py import Exa

        return Exa(key, base_url=self.url)

    def raw(self, key: str | None) -> httpx.Client:
        return raw_client(self.url, key)

    @contextmanager
    def held(self):
        """Keep the server's only child busy until the context exits."""
        runs = self.exa(self.key()).beta.agent.runs
        run = runs.create(**asking(seconds=60), betas=BETAS)
        until_running(runs, run.id)
        try:
            yield
        finally:
            runs.delete(run.id)


@pytest.fixture(scope="module")
def locked(keyed):
    return Locked(keyed)


def create(client: httpx.Client) -> httpx.Response:
    return client.post("/agent/runs", json={"query": "q"})


# ---------------------------------------------------------------------------------------------
# API keys.


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_an_unknown_key_is_refused(locked, method, path):
    for key in (None, "dev", "belay_" + "a" * 12 + "_" + "A" * 32):
        with locked.raw(key) as client:
            assert_not_let_in(client.request(method, path))


def test_the_keys_of_a_team_share_its_runs_and_see_no_other_teams(locked):
    keys = [locked.key(team="ours"), locked.key(team="ours", scope="agent_runs")]
    run = locked.exa(keys[0]).agent.runs.create_and_wait(query="q", poll_interval=20)
    for key in keys:
        assert locked.exa(key).agent.runs.get(run.id) == run
    with locked.raw(locked.key()) as other:
        assert_gone(other.get(f"/agent/runs/{run.id}"))
        assert other.get("/agent/runs").json()["data"] == []


def test_a_key_of_scope_agent_runs_is_rejected_by_the_other_api(locked):
    key = locked.key(scope="agent_runs")
    with locked.raw(key) as client:
        assert create(client).status_code == 200
    answer = httpx.post(f"{locked.url}/threads/search", json={}, headers={"x-api-key": key})
    assert refused(answer, 403)


def test_a_revoked_key_is_refused(locked):
    key = locked.key(team="revoked")
    with locked.raw(key) as client:
        assert create(client).status_code == 200
        with connect(locked.live.database_url) as conn:
            revoke_api_key(conn, "revoked")
        wait_until(lambda: client.get("/agent/runs").status_code == 401, what="it to be refused")
        assert_not_let_in(client.get("/agent/runs"))


# ---------------------------------------------------------------------------------------------
# Limits.


def test_the_beta_header_can_be_made_optional(locked):
    exa = locked.exa(locked.key())
    runs = exa.agent.runs
    run = runs.create_and_wait(query="q", poll_interval=20)
    assert run.status == "completed"
    assert [found.id for found in runs.list().data] == [run.id]
    assert runs.stop(run.id) == run
    assert exa.beta.agent.runs.stop(run.id) == run
    assert runs.delete(run.id).deleted is True


@pytest.mark.parametrize("how", ["cancel", "stop"])
def test_a_queued_run_that_is_cancelled_or_stopped_never_starts(locked, how):
    runs = locked.exa(locked.key()).beta.agent.runs
    with locked.held():
        run = runs.create(query="q", betas=BETAS)
        after = getattr(runs, how)(run.id, betas=BETAS)
        status, reason = {"cancel": ("cancelled", "cancelled"), "stop": ("completed", "stopped")}[
            how
        ]
        assert (after.status, after.stop_reason) == (status, reason)
        assert (after.output.text, after.output.structured) == ("", None)
        assert getattr(runs, how)(run.id, betas=BETAS) == after
        events = [event.event for event in runs.events.list(run.id, betas=BETAS).data]
        assert events == ["agent_run.created", f"agent_run.{status}"]


def test_the_stream_of_a_run_cancelled_while_queued_has_no_started_event(locked):
    runs = locked.exa(locked.key()).beta.agent.runs
    with locked.held():
        stream = runs.create(query="q", stream=True, betas=BETAS)
        created = next(stream)
        runs.cancel(created.data["id"], betas=BETAS)
        assert [(e.id, e.event) for e in stream] == [("2", "agent_run.cancelled")]


@pytest.fixture
def two_teams(locked):
    teams = [locked.raw(locked.key()) for _ in range(2)]
    yield teams
    for team in teams:
        team.close()


def test_concurrent_creates_never_exceed_the_active_run_limit_of_a_team(locked, two_teams):
    with locked.held(), ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(create, two_teams * 10))
        for n, team in enumerate(two_teams):
            accepted = [a.json()["id"] for a in answers[n::2] if a.status_code == 200]
            assert len(accepted) == 3
            for answer in answers[n::2]:
                if answer.status_code != 200:
                    assert_error(answer, 429, "CONCURRENCY_LIMIT_REACHED", "RATE_LIMIT_ERROR")
                    assert answer.headers["retry-after"] == "2"
            assert {run["id"] for run in team.get("/agent/runs").json()["data"]} == set(accepted)
            for run in accepted:
                team.delete(f"/agent/runs/{run}")


def test_a_cancelled_or_deleted_run_no_longer_counts_toward_the_limit(locked, two_teams):
    team, _ = two_teams
    with locked.held():
        ids = [create(team).json()["id"] for _ in range(3)]
        assert create(team).status_code == 429
        assert team.post(f"/agent/runs/{ids[0]}/cancel").status_code == 200
        assert create(team).status_code == 200
        assert create(team).status_code == 429
        assert team.delete(f"/agent/runs/{ids[1]}").status_code == 200
        assert create(team).status_code == 200
        assert create(team).status_code == 429
        for run in team.get("/agent/runs").json()["data"]:
            team.delete(f"/agent/runs/{run['id']}")


@pytest.mark.long
def test_a_run_that_exceeds_its_timeout_fails(make_server):
    """The timeout is one hour, or the operator's limit for all runs if that is shorter."""
    live = make_server("hasty", BELAY_RUN_TIMEOUT_SECONDS="1").start()
    with ExitStack() as stack:
        stack.callback(live.stop)
        client = stack.enter_context(raw_client(live.url, "dev"))
        path = f"/agent/runs/{client.post('/agent/runs', json=asking(seconds=60)).json()['id']}"
        wait_until(lambda: client.get(path).json()["status"] == "failed", what="it to fail")
        run = client.get(path).json()
        assert (run["stopReason"], run["error"]["code"]) == ("error", "TIMEOUT")
        events = client.get(f"{path}/events").json()["data"]
        assert events[-1]["event"] == "agent_run.failed"
        assert events[-1]["data"]["error"] == run["error"]
