"""A project that brings its own checkpointer: that has the values of checkpoints, Belay's Postgres
has which there are."""

from __future__ import annotations

import os
import signal
from functools import partial

import psycopg
import pytest
from langgraph_sdk import get_sync_client
from langgraph_sdk.errors import APIStatusError

from tests.acceptance.projects.test_project_shapes import PROJECTS
from tests.conformance import watched
from tests.long_forms import long_case
from tests.waiting import wait_until

CONFIG = PROJECTS / "kept" / "langgraph.json"
ANSWERS = ({"command": {"resume": "1"}}, {"command": {"resume": "2"}})


@pytest.fixture(scope="module", params=["auto", long_case("process")])
def server(make_server, make_database, request):
    isolation = request.param
    urls = {"KEPT_URL": make_database(f"theirs-{isolation}")}
    live = make_server(f"kept-{isolation}", config=CONFIG, BELAY_ISOLATION=isolation, **urls)
    yield live.start()
    live.stop()


@pytest.fixture
def client(server):
    with watched(get_sync_client(url=server.url)) as client:
        yield client


@pytest.fixture
def thread_id(client):
    return client.threads.create()["thread_id"]


def rows(url, sql, *params):
    with psycopg.connect(url) as conn:
        return conn.execute(sql, params).fetchall()


def kept_ids(server, thread_id):
    sql = "SELECT checkpoint_id FROM checkpoints WHERE thread_id = %s ORDER BY 1"
    return [one for (one,) in rows(server.env["KEPT_URL"], sql, thread_id)]


def belays_ids(server, thread_id):
    sql = "SELECT checkpoint_id FROM checkpoints WHERE thread_id = %s ORDER BY 1"
    return [one for (one,) in rows(server.env["DATABASE_URL"], sql, thread_id)]


@pytest.mark.parametrize("graph", ["counts", "sync_counts"])
def test_the_values_are_in_the_projects_checkpointer(server, client, thread_id, graph):
    values = client.runs.wait(thread_id, graph, input={"counts": ["given"]})
    again = client.runs.wait(thread_id, graph, input={"counts": ["more"]})
    assert values["counts"] == ["given", "first", "given", "first", "second"]
    assert again["counts"][:6] == [*values["counts"], "more"]
    assert client.threads.get_state(thread_id)["values"] == again
    history = client.threads.get_history(thread_id, limit=100)
    assert [state["values"].get("counts") for state in history][-2:] == [["given"], []]
    # The inner graph has no checkpoints of its own unless it is interrupted.
    assert kept_ids(server, thread_id) == belays_ids(server, thread_id)
    stored = rows(
        server.env["DATABASE_URL"],
        "SELECT checkpoint -> 'channel_values' FROM checkpoints WHERE thread_id = %s",
        thread_id,
    )
    assert stored == [({},)] * len(stored)
    sql = "SELECT count(*) FROM checkpoint_blobs WHERE thread_id = %s"
    assert rows(server.env["DATABASE_URL"], sql, thread_id) == [(0,)]
    assert rows(server.env["KEPT_URL"], sql, thread_id) != [(0,)]


def test_a_run_goes_on_from_an_earlier_checkpoint(client, thread_id):
    values = client.runs.wait(thread_id, "counts", input={"counts": ["given"]})
    client.runs.wait(thread_id, "counts", input={"counts": ["more"]})
    history = client.threads.get_history(thread_id, limit=100)
    (early,) = [one for one in history if one["values"].get("counts") == ["given"]]
    again = {"checkpoint_id": early["checkpoint"]["checkpoint_id"], "input": None}
    assert client.runs.wait(thread_id, "counts", **again)["counts"] == values["counts"]


def test_a_killed_run_goes_on_from_its_last_checkpoint(client, thread_id):
    input_ = {"counts": [], "seconds": 1, "pids": []}
    run = client.runs.create(thread_id, "counts", input=input_)
    find = partial(client.threads.get_state, thread_id)
    state = wait_until(lambda: (found := find())["values"].get("pids") and found, 30, "a step")
    os.kill(state["values"]["pids"][0], signal.SIGKILL)
    values = client.runs.join(thread_id, run["run_id"])
    assert values["counts"] == ["first", "first", "second"]
    assert len(values["pids"]) == 2  # of `first`, with which the inner graph began


def test_a_rollback_is_exact(server, client, thread_id):
    client.runs.wait(thread_id, "counts", input={"counts": [], "asks": True, "seconds": 60})
    client.runs.wait(thread_id, "counts", **ANSWERS[0])
    before = client.threads.get_state(thread_id, subgraphs=True)
    kept = kept_ids(server, thread_id)
    run = client.runs.create(thread_id, "counts", **ANSWERS[1])
    wait_until(
        lambda: client.runs.get(thread_id, run["run_id"])["status"] == "running", 30, "its start"
    )
    client.runs.cancel(thread_id, run["run_id"], wait=True, action="rollback")
    assert client.threads.get_state(thread_id, subgraphs=True) == before
    assert belays_ids(server, thread_id) == kept
    wait_until(lambda: kept_ids(server, thread_id) == kept, 20, "the deletion")


def test_a_state_that_the_api_writes_is_kept_there(server, client, thread_id):
    client.runs.wait(thread_id, "counts", input={"counts": []})
    first = client.threads.get_history(thread_id)[-2]["checkpoint"]
    client.threads.update_state(thread_id, {"counts": ["update"]}, as_node="inner")
    assert client.threads.get_state(thread_id)["values"]["counts"][-1] == "update"
    client.threads.update_state(
        thread_id, {"counts": ["fork"]}, as_node="inner", checkpoint_id=first["checkpoint_id"]
    )
    assert client.threads.get_state(thread_id)["values"]["counts"] == ["fork"]
    assert kept_ids(server, thread_id) == belays_ids(server, thread_id)


def test_a_thread_is_copied_and_deleted_there(server, client, thread_id):
    client.runs.wait(thread_id, "counts", input={"counts": ["given"], "asks": True})
    copy_id = client.threads.copy(thread_id)["thread_id"]
    client.threads.delete(thread_id)
    assert kept_ids(server, thread_id) == []
    state = client.threads.get_state(copy_id)
    assert state["values"]["counts"] == ["given", "first"]
    assert [one["value"] for one in state["interrupts"]] == ["how many?"]
    for answer in ANSWERS:
        values = client.runs.wait(copy_id, "counts", **answer)
    assert values["counts"][-3:] == ["second", "1", "2"]
    client.threads.prune([copy_id], strategy="keep_latest")
    assert client.threads.get_state(copy_id)["values"] == values


def test_stateless_runs_leave_nothing_there(server, client):
    for _ in range(3):
        client.runs.wait(None, "counts", input={"counts": ["stateless"]})

    def is_empty():
        client.runs.wait(None, "counts", input={"counts": []})
        found = rows(server.env["DATABASE_URL"], "SELECT thread_id::text FROM thread")
        threads = {one for (one,) in found}
        kept = rows(server.env["KEPT_URL"], "SELECT DISTINCT thread_id FROM checkpoints")
        return len({one for (one,) in kept} - threads) <= 1  # that of the last run

    wait_until(is_empty, 30, "the deletion")


def test_a_failure_of_the_checkpointer_is_an_error_of_the_run_or_a_503(client, thread_id):
    run = client.runs.create(thread_id, "counts", input={"counts": ["broken"]})
    client.runs.join(thread_id, run["run_id"])
    assert client.runs.get(thread_id, run["run_id"])["status"] == "error"
    assert "out of reach" in str(client.threads.get(thread_id)["error"])
    other = client.threads.create()["thread_id"]
    client.runs.wait(other, "counts", input={"counts": ["unreadable"]})
    with pytest.raises(APIStatusError) as raised:
        client.threads.get_state(other)
    assert raised.value.status_code == 503
