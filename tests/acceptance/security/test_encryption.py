"""Test a server with LANGGRAPH_AES_KEY: states are used as ever, and stored encrypted."""

from __future__ import annotations

import uuid

import httpx
import psycopg
import pytest
from langgraph_sdk import get_sync_client

from tests.acceptance.playing import refused
from tests.conformance import watched
from tests.servers import LiveServer

pytestmark = pytest.mark.long
TABLES = ("checkpoints", "checkpoint_writes", "checkpoint_blobs")


@pytest.fixture(scope="module")
def server(make_server):
    live = make_server(
        "encrypted", LANGGRAPH_AES_KEY="0123456789abcdef", BELAY_LARGE_STATE_BYTES="20000"
    ).start()
    yield live
    live.stop()


@pytest.fixture(scope="module")
def client(server):
    with watched(get_sync_client(url=server.url)) as made:
        yield made


@pytest.mark.parametrize("padding", ["", "x" * 100_000], ids=["small", "large"])
def test_states_are_encrypted_and_used_as_ever(server, client, padding):
    """A large state is read and written by a process of its own."""
    canary = f"canary-{uuid.uuid4()}"
    thread_id = client.threads.create()["thread_id"]
    client.runs.wait(thread_id, "questions", input={"topic": canary + padding})
    state = client.threads.get_state(thread_id)
    assert state["values"]["topic"] == canary + padding
    assert canary in state["interrupts"][0]["value"]["question"]
    client.threads.update_state(thread_id, {"answers": [f"{canary} updated"]}, as_node="prepare")
    copied = client.threads.copy(thread_id)["thread_id"]
    for one in (thread_id, copied):
        first = client.runs.wait(one, "questions", input={"topic": f"{canary} again"})
        assert "__interrupt__" in first
        client.runs.wait(one, "questions", command={"resume": f"{canary} first"})
        values = client.runs.wait(one, "questions", command={"resume": f"{canary} second"})
        assert values["answers"][-3:] == [f"{canary} first", f"{canary} second", "worked"]
        assert f"{canary} updated" in values["answers"]
        history = client.threads.get_history(one, limit=3)
        assert history[0]["values"] == values
    with psycopg.connect(server.database_url) as conn:
        for table in TABLES:
            rows = conn.execute(f"SELECT * FROM {table}").fetchall()
            assert rows
            assert canary not in repr(rows), table


def test_a_server_without_the_key_says_that_it_cannot_read_a_state(server, client, scratch):
    thread_id = client.threads.create()["thread_id"]
    client.runs.wait(thread_id, "questions", input={"topic": "secret"})
    keyless = LiveServer(scratch / "keyless", DATABASE_URL=server.database_url).start()
    try:
        with watched(httpx.Client(base_url=keyless.url, timeout=60)) as http:
            path = f"/threads/{thread_id}"
            update = {"values": {"topic": "another"}}
            for answer in (
                http.get(f"{path}/state"),
                http.get(f"{path}/history"),
                http.post(f"{path}/state", json=update),
            ):
                assert "encrypted (msgpack+aes), and LANGGRAPH_AES_KEY" in refused(answer, 422)
            run = {"assistant_id": "questions", "input": {"topic": "again"}}
            assert "__error__" in http.post(f"{path}/runs/wait", json=run).json()
    finally:
        keyless.stop()
    assert client.threads.get_state(thread_id)["values"]["topic"] == "secret"
