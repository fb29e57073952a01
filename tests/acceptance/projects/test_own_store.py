"""A project that brings its own store: the API and graphs use it instead of Belay's."""

from __future__ import annotations

import psycopg
import pytest
from langgraph_sdk import get_sync_client
from langgraph_sdk.errors import APIStatusError

from tests.acceptance.projects.test_project_shapes import PROJECTS
from tests.conformance import watched
from tests.long_forms import long_case
from tests.waiting import wait_until

CONFIG = PROJECTS / "notes" / "langgraph.json"


@pytest.fixture(scope="module", params=["process", long_case("shared")])
def server(make_server, make_database, request):
    isolation = request.param
    urls = {"NOTES_URL": make_database(f"notes-{isolation}")}
    live = make_server(f"own-{isolation}", config=CONFIG, BELAY_ISOLATION=isolation, **urls)
    yield live.start()
    live.stop()


@pytest.fixture
def client(server):
    with watched(get_sync_client(url=server.url)) as client:
        yield client


def notes_in(url):
    with psycopg.connect(url) as conn:
        return [key for (key,) in conn.execute("SELECT key FROM store ORDER BY key")]


def test_the_api_and_graphs_use_the_projects_store(server, client):
    client.store.put_item(["notes"], "api", {"text": "of the API"})
    for graph, note, found in (
        ("notes", "async", ["api", "async"]),
        ("sync_notes", "sync", ["api", "async", "sync"]),
    ):
        assert client.runs.wait(None, graph, input={"note": note})["found"] == found
    assert client.store.get_item(["notes"], "sync")["value"] == {"text": "sync"}
    found = client.store.search_items(["notes"], filter={"text": "async"})["items"]
    assert [item["key"] for item in found] == ["async"]
    assert client.store.list_namespaces()["namespaces"] == [["notes"]]
    assert notes_in(server.env["NOTES_URL"]) == ["api", "async", "sync"]
    assert notes_in(server.env["DATABASE_URL"]) == []
    client.store.delete_item(["notes"], "api")
    assert notes_in(server.env["NOTES_URL"]) == ["async", "sync"]


def test_a_factory_of_a_graph_gets_the_projects_store(client):
    client.store.put_item(["notes"], "one", {"text": "one"})
    assistant = client.assistants.search(graph_id="made")[0]
    many = len(client.store.search_items(["notes"])["items"])
    graph = client.assistants.get_graph(assistant["assistant_id"])
    assert graph["nodes"]
    assert client.runs.wait(None, "made", input={"note": "one"})["found"]
    assert many >= 1


def test_a_cancelled_run_leaves_the_store_usable(client):
    thread_id = client.threads.create()["thread_id"]
    run = client.runs.create(thread_id, "notes", input={"note": "stopped", "seconds": 60})

    def written():
        return client.store.search_items(["notes"], filter={"text": "stopped"})["items"]

    wait_until(written, 30, "the note")
    client.runs.cancel(thread_id, run["run_id"], wait=True)
    assert client.runs.get(thread_id, run["run_id"])["status"] == "interrupted"
    assert "after" in client.runs.wait(None, "notes", input={"note": "after"})["found"]


@pytest.mark.parametrize("key", ["hangs", "blocks"])
def test_a_cancel_does_not_wait_for_a_call_that_is_not_answered(server, client, key):
    """Its time limit is a minute. One that cannot be cancelled costs the process."""
    thread_id = client.threads.create()["thread_id"]
    run = client.runs.create(thread_id, "notes", input={"note": key})
    wait_until(
        lambda: client.runs.get(thread_id, run["run_id"])["status"] == "running", 30, "the run"
    )
    with watched(get_sync_client(url=server.url, timeout=30)) as patient:
        patient.runs.cancel(thread_id, run["run_id"], wait=True)
    assert client.runs.get(thread_id, run["run_id"])["status"] == "interrupted"
    assert "next" in client.runs.wait(None, "notes", input={"note": "next"})["found"]

    def was_killed():
        return any("did not stop" in one and run["run_id"] in one for one in server.log_lines())

    if key == "blocks":
        wait_until(was_killed, 30, "the log's line")
    assert was_killed() is (key == "blocks")


@pytest.mark.long
def test_a_store_that_fails_is_reported(make_server):
    url = "postgresql://nobody@127.0.0.1:1/nothing"
    live = make_server("own-failing", config=CONFIG, NOTES_URL=url).start()
    try:
        with watched(get_sync_client(url=live.url)) as client:
            with pytest.raises(APIStatusError) as raised:
                client.store.get_item(["notes"], "x")
            assert raised.value.status_code == 503
            assert "The project's store failed: OperationalError" in str(raised.value.body)
            thread_id = client.threads.create()["thread_id"]
            run = client.runs.create(thread_id, "notes", input={"note": "x"})
            client.runs.join(thread_id, run["run_id"])
            assert client.runs.get(thread_id, run["run_id"])["status"] == "error"
    finally:
        live.stop()
