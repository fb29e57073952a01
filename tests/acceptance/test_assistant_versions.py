"""Versions of assistants: each change creates one, and runs use the one that is set as latest."""

from __future__ import annotations

import threading
import uuid

import pytest
from langgraph_sdk.errors import NotFoundError

from tests.acceptance.playing import UNKNOWN, new_thread, refused, stops_all, until_status

__all__ = ["stops_all"]


@pytest.fixture
def made(sync_client):
    return sync_client.assistants.create(
        "made_context", context={"by": 3}, metadata={"k": "v"}, name="first", description="d"
    )


def update(client, made, **changes):
    return client.assistants.update(made["assistant_id"], **changes)


def versions(client, made, **options):
    return client.assistants.get_versions(made["assistant_id"], **options)


def test_a_patch_merges_metadata_and_replaces_the_rest(sync_client, made):
    patched = update(
        sync_client,
        made,
        name="second",
        description="other",
        config={"recursion_limit": 9},
        context={"by": 9},
        metadata={"more": 1},
    )
    assert patched["version"] == 2
    assert (patched["name"], patched["description"]) == ("second", "other")
    assert patched["metadata"] == {"k": "v", "more": 1}
    assert patched["context"] == {"by": 9}
    assert patched["config"] == {"recursion_limit": 9, "configurable": {"by": 9}}
    assert patched["created_at"] == made["created_at"]
    assert patched["updated_at"] > made["updated_at"]
    assert sync_client.assistants.get(made["assistant_id"]) == patched


def test_a_patched_config_is_mirrored_into_the_context(sync_client, made):
    patched = update(sync_client, made, config={"configurable": {"by": 4}})
    assert patched["context"] == {"by": 4}
    assert update(sync_client, made, config={"tags": ["t"]})["context"] == {}


def test_a_patch_without_changes_creates_a_version_too(http, sync_client, made):
    def unversioned(assistant):
        return {k: v for k, v in assistant.items() if k not in ("version", "updated_at")}

    again = http.patch(f"/assistants/{made['assistant_id']}", json={}).json()
    assert (again["version"], unversioned(again)) == (2, unversioned(made))
    same = update(sync_client, made, name="first", metadata={"k": "v"}, context={"by": 3})
    assert (same["version"], unversioned(same)) == (3, unversioned(made))
    sync_client.assistants.set_latest(made["assistant_id"], 1)
    assert http.patch(f"/assistants/{made['assistant_id']}", json={}).json()["version"] == 4


def test_a_patch_may_change_the_graph(sync_client, made):
    assert update(sync_client, made, graph_id="counter")["graph_id"] == "counter"
    assert sync_client.runs.wait(None, made["assistant_id"], input={"count": 1})["count"] > 1


def test_concurrent_patches_all_take_effect(http, sync_client, made):
    path = f"/assistants/{made['assistant_id']}"
    patches = [
        threading.Thread(
            target=http.patch, args=(path,), kwargs={"json": {"metadata": {str(n): n}}}
        )
        for n in range(8)
    ]
    for patch in patches:
        patch.start()
    for patch in patches:
        patch.join()
    assert [v["version"] for v in versions(sync_client, made)] == list(range(9, 0, -1))
    after = sync_client.assistants.get(made["assistant_id"])
    assert after["metadata"] == {"k": "v", **{str(n): n for n in range(8)}}


def test_versions_are_listed_newest_first_without_updated_at(sync_client, made):
    update(sync_client, made, name="second", metadata={"round": 2})
    update(sync_client, made, name="third")
    found = versions(sync_client, made)
    assert [(v["version"], v["name"]) for v in found] == [(3, "third"), (2, "second"), (1, "first")]
    assert found[0].keys() == made.keys() - {"updated_at"}
    assert [v["version"] for v in versions(sync_client, made, limit=1, offset=1)] == [2]
    assert [v["version"] for v in versions(sync_client, made, metadata={"round": 2})] == [3, 2]


def test_setting_an_older_version_as_latest_restores_all_its_fields(sync_client, made):
    update(sync_client, made, config={"configurable": {"by": 9}}, metadata={"k": "w"}, name="x")
    restored = sync_client.assistants.set_latest(made["assistant_id"], 1)
    same = {key: value for key, value in made.items() if key != "updated_at"}
    assert {key: value for key, value in restored.items() if key != "updated_at"} == same
    # The next change gets the number after the highest version.
    assert update(sync_client, made, name="y")["version"] == 3


def test_a_run_uses_the_version_that_is_latest_when_it_is_created(sync_client):
    made = sync_client.assistants.create("counter", context={"by": 5})

    def count():
        return sync_client.runs.wait(None, made["assistant_id"], input={"count": 1})["count"]

    assert count() == 6
    update(sync_client, made, context={"by": 7})
    assert count() == 8
    sync_client.assistants.set_latest(made["assistant_id"], 1)
    assert count() == 6


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "detail"),
    [
        ("PATCH", "", {"graph_id": "nope"}, 404, "Graph 'nope' not found"),
        ("PATCH", "", {"config": 5}, 422, "config"),
        ("PATCH", "", {"context": {"a": 1}, "config": {"configurable": {"a": 1}}}, 400, "both"),
        ("POST", "/latest", {"version": 99}, 404, "Version 99 not found"),
        ("POST", "/latest", {}, 422, "version"),
        ("POST", "/latest", {"version": "1"}, 422, "integer"),
        ("POST", "/versions", {"limit": 0}, 422, "limit"),
    ],
)
def test_an_invalid_change_of_an_assistant_is_refused(
    http, made, method, path, body, status, detail
):
    path = f"/assistants/{made['assistant_id']}{path}"
    assert detail in refused(http.request(method, path, json=body), status)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [("PATCH", "", {}), ("POST", "/versions", {}), ("POST", "/latest", {"version": 1})],
)
def test_an_unknown_assistant_is_not_found(http, method, path, body):
    detail = refused(http.request(method, f"/assistants/{UNKNOWN}{path}", json=body), 404)
    assert detail == f"Assistant {UNKNOWN} not found"


def test_assistants_are_counted_by_the_filters_of_search(sync_client):
    tag = {"tag": uuid.uuid4().hex}
    for name in ("Alpha", "Beta", "alphabet"):
        sync_client.assistants.create("counter", name=name, metadata=tag)
    assert sync_client.assistants.count(metadata=tag) == 3
    assert sync_client.assistants.count(metadata=tag, name="ALPHA") == 2
    assert sync_client.assistants.count(metadata=tag, graph_id="steps") == 0


def test_deleting_an_assistant_can_delete_its_threads(http, sync_client, beats):
    made = sync_client.assistants.create("steps")
    done, running, other = (new_thread(http) for _ in range(3))
    sync_client.runs.wait(done, made["assistant_id"], input={})
    sync_client.runs.wait(other, "counter", input={"count": 1})
    body = {"beats": str(beats), "seconds": 30}
    run = sync_client.runs.create(running, made["assistant_id"], input=body)
    until_status(http, running, run["run_id"], "running")
    sync_client.assistants.delete(made["assistant_id"], delete_threads=True)
    for thread_id in (done, running):
        with pytest.raises(NotFoundError):
            sync_client.threads.get(thread_id)
    assert sync_client.threads.get(other)["status"] == "idle"


# -- the drawing of the graph ------------------------------------------------------------------


def test_the_drawing_of_a_graph_has_its_nodes_and_edges(sync_client):
    drawing = sync_client.assistants.get_graph("counter")
    assert [node["id"] for node in drawing["nodes"]] == ["__start__", "inc", "__end__"]
    assert {"source": "__start__", "target": "inc"} in drawing["edges"]


def test_xray_draws_subgraphs(sync_client):
    def ids(**options):
        return {
            node["id"] for node in sync_client.assistants.get_graph("family", **options)["nodes"]
        }

    assert "child" in ids()
    assert not {name for name in ids() if ":" in name}
    assert {name for name in ids(xray=True) if name.startswith("child:")}
    assert ids(xray=1) == ids(xray=True)


@pytest.mark.parametrize("xray", ["bad", "-1", "0", "1.5"])
def test_an_invalid_xray_value_is_refused(http, xray):
    response = http.get("/assistants/counter/graph", params={"xray": xray})
    assert refused(response, 422) == "Invalid xray value"


def test_the_schemas_of_a_graph_are_returned(sync_client):
    made = sync_client.assistants.create("counter")
    schemas = sync_client.assistants.get_schemas(made["assistant_id"])
    assert schemas["graph_id"] == "counter"
    for name in ("input_schema", "output_schema", "state_schema"):
        assert "count" in schemas[name]["properties"], name
    assert sync_client.assistants.get_schemas("counter") == schemas


def test_the_config_schema_is_the_context_schema(sync_client):
    schemas = sync_client.assistants.get_schemas("teller")
    assert "voice" in schemas["context_schema"]["properties"]
    assert schemas["config_schema"] == schemas["context_schema"]


def test_the_subgraphs_of_a_graph_are_returned_by_namespace(sync_client):
    found = sync_client.assistants.get_subgraphs("family")
    assert list(found) == ["child"]
    assert found["child"]["input_schema"]["properties"]
    assert sync_client.assistants.get_subgraphs("family", namespace="child") == found
    assert sync_client.assistants.get_subgraphs("family", namespace="nope") == {}
    assert sync_client.assistants.get_subgraphs("family", recurse=True).keys() >= found.keys()
    assert sync_client.assistants.get_subgraphs("counter") == {}


@pytest.mark.parametrize("graph", ["made", "made_async", "made_with_config", "made_context"])
def test_a_graph_from_a_factory_can_be_drawn(sync_client, graph):
    assert sync_client.assistants.get_graph(graph)["nodes"]
    assert sync_client.assistants.get_schemas(graph)["state_schema"]["properties"]


@pytest.mark.parametrize("what", ["graph", "schemas", "subgraphs"])
def test_the_graph_of_an_unknown_assistant_is_not_found(http, what):
    refused(http.get(f"/assistants/{UNKNOWN}/{what}"), 404)
    assert "Invalid assistant: 'nope'" in refused(http.get(f"/assistants/nope/{what}"), 422)
