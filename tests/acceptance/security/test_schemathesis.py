"""The API, fuzzed from its OpenAPI document: no response is a 500 or missing from the document.

Every operation is tested with valid and invalid values that are generated from its schemas. Random
values would never match a thread or a graph. So about half of the ids and names are replaced by
those of existing resources, which are created anew for each operation. Values that would make a
request wait (a run in a year, an endless stream) are shortened. No operation is left out.
"""

from __future__ import annotations

import json
import zlib
from collections import defaultdict
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.bare_api import bare_client

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
NEVER_SOON = "0 0 1 1 *"
#: A request that takes longer is a failure; a stream is closed after this time.
SECONDS = 30.0
SECONDS_OF_A_THREADS_STREAM = 0.3
STREAMS_OF_A_THREAD = (
    "GET /threads/{thread_id}/stream",
    "POST /threads/{thread_id}/stream/events",
)
#: A separate key, so that the other tests do not use up its limit of active runs.
AGENT_HEADERS = {"x-api-key": "schemathesis", "Exa-Beta": "agent-2026-05-07"}
_HOW = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


class Scene:
    """Existing resources, created anew for each operation."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http
        self.url = str(http.base_url).rstrip("/")
        #: The statuses of the responses, by operation.
        self.statuses: defaultdict[str, set[int]] = defaultdict(set)
        self._made: dict[str, dict[str, Any]] = {}

    def ids(self, operation: str) -> dict[str, Any]:
        if operation not in self._made:
            self._made[operation] = self._make(to_cancel="cancel" in operation)
        return self._made[operation]

    def _make(self, *, to_cancel: bool) -> dict[str, Any]:
        http = self.http
        assistant_id = http.post("/assistants", json={"graph_id": "family"}).json()["assistant_id"]
        thread_id = http.post("/threads", json={}).json()["thread_id"]
        body = {"assistant_id": "counter", "input": {"count": 1}, "stream_resumable": True}
        run = http.post(f"/threads/{thread_id}/runs", json=body).json()
        http.get(f"/threads/{thread_id}/runs/{run['run_id']}/join")
        state = http.get(f"/threads/{thread_id}/state").json()
        if to_cancel:
            later = {**body, "after_seconds": 3600}
            run = http.post(f"/threads/{thread_id}/runs", json=later).json()
        cron = {"assistant_id": "counter", "schedule": NEVER_SOON}
        agent_run = http.post("/agent/runs", json={"query": "q"}, headers=AGENT_HEADERS).json()
        return {
            "id": agent_run["id"],
            "assistant_id": assistant_id,
            "thread_id": thread_id,
            "run_id": run["run_id"],
            "run_ids": [run["run_id"]],
            "checkpoint_id": state["checkpoint_id"],
            "cron_id": http.post("/runs/crons", json=cron).json()["cron_id"],
            "graph_id": "counter",
            "namespace": "child",
        }

    def clean_up(self) -> None:
        self.http.post("/runs/cancel", json={"status": "all"})
        for cron in self.http.post("/runs/crons/search", json={"limit": 1000}).json():
            self.http.delete(f"/runs/crons/{cron['cron_id']}")


def _coin(value: Any) -> bool:
    """Return True or False, always the same for the same value."""
    return zlib.crc32(json.dumps(value, sort_keys=True, default=str).encode()) % 2 == 0


def _met(body: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Return the body with ids of existing resources half of the time, and without long waits."""
    met = dict(body)
    if _coin(body):
        met |= {name: known[name] for name in body if name in known and name != "namespace"}
        if "assistant_id" in body:
            met["assistant_id"] = "counter"
        if "schedule" in body:
            met["schedule"] = NEVER_SOON
    if isinstance(met.get("after_seconds"), (int, float)):
        met["after_seconds"] = min(met["after_seconds"], 0.1)
    return met


def document_of_the_project() -> dict[str, Any]:
    """Return the server's document, from which tests are created before a server runs."""
    return bare_client().get("/openapi.json").json


DOCUMENT = document_of_the_project()
API = schemathesis.openapi.from_dict(DOCUMENT)
MODES = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
each_operation = pytest.mark.parametrize(
    "operation",
    [found.ok() for found in API.get_all_operations()],
    ids=lambda operation: operation.label,
)


@pytest.fixture(scope="module")
def scene(server):
    with httpx.Client(base_url=server.url, timeout=60) as http:
        made = Scene(http)
        yield made
        made.clean_up()


def assert_documented(case, scene) -> None:
    known = scene.ids(case.operation.label)
    if case.path_parameters and not _coin(case.path_parameters):
        ids = case.path_parameters
        case.path_parameters = {name: known.get(name, value) for name, value in ids.items()}
    if case.operation.label.partition(" ")[2].startswith("/agent/") and _coin(case.headers):
        case.headers = {**dict(case.headers or {}), **AGENT_HEADERS}
    if isinstance(case.body, dict):
        case.body = _met(case.body, known)
    elif isinstance(case.body, list):
        case.body = [_met(item, known) if isinstance(item, dict) else item for item in case.body]
    of_a_thread = case.operation.label in STREAMS_OF_A_THREAD
    timeout = SECONDS_OF_A_THREADS_STREAM if of_a_thread else SECONDS
    answer = case.call_and_validate(base_url=scene.url, checks=CHECKS, timeout=timeout)
    scene.statuses[case.operation.label].add(answer.status_code)


def attack(operation, scene, max_examples: int) -> None:
    """Send random values, valid and invalid, from the same seed each time."""

    @settings(_HOW, max_examples=max_examples)
    @given(case=st.one_of(operation.as_strategy(generation_mode=mode) for mode in MODES))
    def attacked(case):
        assert_documented(case, scene)

    attacked()


@pytest.mark.long
def test_the_document_equals_that_of_the_server(scene):
    assert scene.http.get("/openapi.json").json() == DOCUMENT


@each_operation
@pytest.mark.long
def test_every_response_conforms_to_the_document(operation, scene):
    attack(operation, scene, max_examples=15)


@pytest.mark.long
def test_most_operations_have_succeeded_at_least_once(scene):
    """Without this, only rejections might be tested. Runs after all tests of the normal form."""
    if scene.statuses:
        in_vain = {name for name, seen in scene.statuses.items() if min(seen) >= 300}
        assert len(in_vain) <= len(scene.statuses) / 8, in_vain


@pytest.mark.full
@pytest.mark.timeout(1800)
@each_operation
def test_every_response_to_many_more_values_conforms_to_the_document(operation, scene):
    """Send more random values, and each value at the boundaries of a schema."""
    attack(operation, scene, max_examples=300)
    how = API.config.generation_for(operation=operation, phase="coverage")
    edges = API.iter_coverage_cases(operation, generation_modes=MODES, generation_config=how)
    for case in edges:
        assert_documented(case, scene)
