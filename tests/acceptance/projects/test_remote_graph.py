"""LangGraph's RemoteGraph: Belay's graphs called from outside, and from a graph that Belay runs."""

from __future__ import annotations

import asyncio

import pytest
from langgraph.pregel.remote import RemoteException, RemoteGraph

from tests.acceptance.playing import new_thread, play, wait_for


@pytest.fixture
def remote(sync_client):
    """Return a RemoteGraph with the test's client; it does not close clients that it creates."""
    return RemoteGraph("steps", sync_client=sync_client)


def on(thread_id):
    return {"configurable": {"thread_id": thread_id}}


def test_a_remote_graph_is_invoked_and_its_state_read_and_written(http, remote):
    thread_id = new_thread(http)
    steps = ["s1", "s2", "s3", "s4"]
    assert remote.invoke({"tag": ""}, on(thread_id))["steps"] == steps
    assert remote.get_state(on(thread_id)).values["steps"] == steps
    assert len(list(remote.get_state_history(on(thread_id), limit=10))) == 6
    remote.update_state(on(thread_id), {"steps": ["by hand"]}, as_node="s4")
    assert remote.get_state(on(thread_id)).values["steps"] == [*steps, "by hand"]


def test_a_remote_graph_is_streamed_in_its_modes(remote):
    parts = list(remote.stream({"tag": ""}, stream_mode=["values", "updates"]))
    parts = [tuple(part)[:2] for part in parts]
    assert [mode for mode, _ in parts] == ["values", *["updates", "values"] * 4]
    assert parts[1] == ("updates", {"s1": {"steps": ["s1"]}})


def test_a_remote_graph_is_called_concurrently(make_client):
    async def scene(client):
        remote = RemoteGraph("counter", client=client)
        found = await asyncio.gather(*(remote.ainvoke({"count": n}) for n in range(20)))
        assert [values["count"] for values in found] == [n + 1 for n in range(20)]

    play(make_client, scene)


def test_a_remote_graph_that_fails_raises(sync_client):
    with pytest.raises(RemoteException, match="boom from bad node"):
        RemoteGraph("bad", sync_client=sync_client).invoke({"count": 1})


def test_a_graph_run_by_belay_calls_a_remote_graph(server, http):
    given = {"url": server.url, "graph": "counter", "count": 41}
    thread_id = new_thread(http)
    assert wait_for(http, thread_id, "parent", given)["count"] == 42
