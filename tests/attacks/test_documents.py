"""Walks along the links of the OpenAPI document by one tenant, repeated by another with the first
one's ids: no resource of one tenant is shown to the other."""

from __future__ import annotations

import copy
import uuid
from typing import Any

import httpx
import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, settings

from tests.bare_api import bare_client

#: The ids in an operation's response; links lead to all operations that take these ids.
MAKES = {
    ("/threads", "post"): ("thread_id",),
    ("/threads/{thread_id}/runs", "post"): ("thread_id", "run_id"),
    ("/runs", "post"): ("thread_id", "run_id"),
    ("/assistants", "post"): ("assistant_id",),
    ("/runs/crons", "post"): ("cron_id",),
}
_SECONDS = 20.0
_HOW = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def is_quick(path: str) -> bool:
    """Return whether a path neither waits nor streams until its thread is deleted."""
    return not any(word in path for word in ("stream", "wait", "join", "/agent/", "store"))


def takes(path: str) -> set[str]:
    return {part[1:-1] for part in path.split("/") if part.startswith("{")}


def linked_document() -> dict[str, Any]:
    """Return the server's document with links, and without operations that wait."""
    document = copy.deepcopy(bare_client().get("/openapi.json").json)
    document["paths"] = {path: ops for path, ops in document["paths"].items() if is_quick(path)}
    for (path, method), names in MAKES.items():
        links = {}
        for target, operations in document["paths"].items():
            if not takes(target) or not takes(target) <= set(names):
                continue
            for verb in operations:
                if verb not in ("get", "post", "patch", "delete", "put"):
                    continue
                pointer = target.replace("~", "~0").replace("/", "~1")
                links[f"{verb} {target}"] = {
                    "operationRef": f"#/paths/{pointer}/{verb}",
                    "parameters": {
                        f"path.{name}": f"$response.body#/{name}" for name in takes(target)
                    },
                }
        document["paths"][path][method]["responses"]["200"]["links"] = links
    return document


def walk(server, examples: int, steps: int, seed: int | None = None) -> int:
    """Walk as one tenant and repeat each step as another. Return the number of repeats."""
    import schemathesis  # takes most of a second, in each process of pytest-xdist

    word = uuid.uuid4().hex[:8]
    mine = {"Authorization": f"Bearer ann-{word}"}
    theirs = {"Authorization": f"Bearer bob-{word}"}
    asked = 0
    other = httpx.Client(base_url=server.url, timeout=_SECONDS, headers=theirs)
    owner = f"ann-{word}"

    class Walk(schemathesis.openapi.from_dict(linked_document()).as_state_machine()):
        def get_call_kwargs(self, _case):
            return {"base_url": server.url, "headers": mine, "timeout": _SECONDS}

        def before_call(self, case):
            body = case.body
            if isinstance(body, dict):
                # A chosen id would be taken in the next walk, which would then differ.
                made = MAKES.get((case.path, case.method.lower()), ())
                for name in made if case.path != "/runs" else ("run_id",):
                    body.pop(name, None)
                if "assistant_id" in body:
                    body["assistant_id"] = "counter"
                if "graph_id" in body:
                    body["graph_id"] = "counter"
                if "schedule" in body:
                    body["schedule"] = "0 0 1 1 *"
                if "after_seconds" in body or "multitask_strategy" in body:
                    body["after_seconds"] = 3600

        def validate_response(self, response, case, *_args, **_kwargs):
            nonlocal asked
            assert response.status_code < 500, response.text
            if not case.path_parameters or case.method.upper() == "DELETE":
                return
            again = other.request(case.method, case.formatted_path, json=None)
            asked += 1
            assert again.status_code < 500, again.text
            assert owner not in again.text

    how = settings(_HOW, max_examples=examples, stateful_step_count=steps)
    if seed is not None:
        how, Walk = settings(how, derandomize=False), hypothesis.seed(seed)(Walk)
    Walk.run(settings=how)
    other.close()
    return asked


@pytest.mark.long
def test_no_resource_of_one_tenant_is_shown_to_another(guarded):
    assert walk(guarded, examples=4, steps=8) > 5


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_no_resource_of_one_tenant_is_shown_to_another_on_long_walks(guarded):
    assert walk(guarded, examples=120, steps=20) > 500
