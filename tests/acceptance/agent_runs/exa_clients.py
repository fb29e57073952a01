"""Exa's own clients and raw HTTP clients for the tests of agent runs.

Every response is validated against Exa's documents (`exa_schemas`), whichever client sent the
request.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import requests

from tests.acceptance.agent_runs.exa_schemas import check_answer
from tests.conformance import watched
from tests.waiting import wait_until

if TYPE_CHECKING:  # it imports the client of OpenAI, in each process of pytest-xdist
    from exa_py.agent.client import AgentBetaRunsClient
    from exa_py.agent.types import AgentRun

BETA = "agent-2026-05-07"
BETAS = [BETA]
UNKNOWN = "agent_run_01j7x9v0m2n4p6q8r0s2t4v6w8"
ROUTES = [
    ("POST", "/agent/runs"),
    ("GET", "/agent/runs"),
    ("GET", f"/agent/runs/{UNKNOWN}"),
    ("DELETE", f"/agent/runs/{UNKNOWN}"),
    ("POST", f"/agent/runs/{UNKNOWN}/cancel"),
    ("POST", f"/agent/runs/{UNKNOWN}/stop"),
    ("GET", f"/agent/runs/{UNKNOWN}/events"),
]


@pytest.fixture(autouse=True)
def clients_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validate the responses to the synchronous client, and bypass the environment's proxy."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    send = requests.Session.send

    def send_and_check(
        session: requests.Session, request: requests.PreparedRequest, **kwargs: Any
    ) -> requests.Response:
        response = send(session, request, **kwargs)
        if not kwargs.get("stream"):
            assert request.method is not None
            path = request.path_url.partition("?")[0]
            status, body = response.status_code, response.content
            check_answer(request.method, path, status, response.headers, body)
        return response

    monkeypatch.setattr(requests.Session, "send", send_and_check)


def _is_stream(response: httpx.Response) -> bool:
    content_type: str = response.headers.get("content-type", "")
    return content_type.startswith("text/event-stream")


def check_response(response: httpx.Response) -> None:
    """Validate a response of this API; the other API has its own documents."""
    if not response.request.url.path.startswith("/agent"):
        return
    body = b"" if _is_stream(response) else response.read()
    path, method = response.request.url.path, response.request.method
    check_answer(method, path, response.status_code, response.headers, body)


async def check_response_async(response: httpx.Response) -> None:
    body = b"" if _is_stream(response) else await response.aread()
    path, method = response.request.url.path, response.request.method
    check_answer(method, path, response.status_code, response.headers, body)


def raw_client(url: str, key: str | None, **headers: str) -> httpx.Client:
    """Return a client whose responses are validated against Exa's documents and Belay's."""
    sent = {"Exa-Beta": BETA, **({"x-api-key": key} if key else {}), **headers}
    client = watched(httpx.Client(base_url=url, timeout=60, headers=sent))
    client.event_hooks["response"].append(check_response)
    return client


def asking(**what: Any) -> dict[str, Any]:
    """Return a request whose input controls what the test graph does."""
    return {"query": "q", "input": {"data": [what]}}


def ended(runs: AgentBetaRunsClient, run_id: str) -> AgentRun:
    return runs.poll_until_finished(run_id, poll_interval=20, betas=BETAS)


def until_running(runs: AgentBetaRunsClient, run_id: str) -> None:
    def is_running() -> bool:
        return runs.get(run_id, betas=BETAS).status == "running"

    wait_until(is_running, what=f"{run_id} to be running")


@contextmanager
def refused(status: int, code: str) -> Iterator[None]:
    with pytest.raises(ValueError, match=rf"status code {status}: .*{code}"):
        yield


def assert_error(response: httpx.Response, status: int, code: str, kind: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert (error["type"], error["code"]) == (kind, code), response.text
    assert error["message"]
    return error


def assert_invalid(response: httpx.Response, code: str = "INVALID_REQUEST") -> dict[str, Any]:
    return assert_error(response, 400, code, "INVALID_REQUEST")


def assert_gone(response: httpx.Response) -> None:
    assert_error(response, 404, "RUN_NOT_FOUND", "NOT_FOUND")


def assert_not_let_in(response: httpx.Response) -> None:
    assert_error(response, 401, "TEAM_NOT_FOUND", "AUTHENTICATION_ERROR")
