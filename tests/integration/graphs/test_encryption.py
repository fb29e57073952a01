"""Test that checkpoints are encrypted with LANGGRAPH_AES_KEY, and what is read without it."""

from __future__ import annotations

import uuid

import pytest
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.store.memory import InMemoryStore

from belay_server.domain.errors import StateUnreadable
from belay_server.graphs.checkpoints.thread_saver import ThreadSaver
from belay_server.graphs.project.factories import GraphUse
from belay_server.graphs.project.langgraph_json import read_project
from belay_server.graphs.registry import GraphRegistry
from belay_server.graphs.thread_state import bound
from tests.servers import PROJECT

TABLES = ("checkpoints", "checkpoint_writes", "checkpoint_blobs")
KEY, OTHER = b"0123456789abcdef", b"fedcba9876543210"
USE = GraphUse("threads.read", {}, store=InMemoryStore)


@pytest.fixture(scope="module")
def graphs():
    return GraphRegistry.load(read_project(PROJECT))


@pytest.fixture
def config():
    return {"configurable": {"thread_id": str(uuid.uuid4())}}


def stored(conn, config) -> str:
    """Return all that the tables of checkpoints have of the thread, as text."""
    thread_id = config["configurable"]["thread_id"]
    rows = [
        conn.execute(f"SELECT * FROM {table} WHERE thread_id = %s", (thread_id,)).fetchall()
        for table in TABLES
    ]
    return repr(rows)


def asked(conn, graphs, config, saver, topic):
    """Run a graph up to its question, which is about the topic."""
    graph = bound(graphs.read("questions", USE), saver)
    graph.invoke({"topic": topic}, config)
    return graph


def test_values_writes_and_questions_are_not_in_plain_text(conn, graphs, config):
    canary = f"canary-{uuid.uuid4()}"
    graph = asked(conn, graphs, config, ThreadSaver(conn, aes_key=KEY), canary)
    assert canary not in stored(conn, config)
    state = graph.get_state(config)
    assert state.values["topic"] == canary
    assert canary in state.interrupts[0].value["question"]
    assert next(graph.get_state_history(config)).values["topic"] == canary


def test_what_was_stored_before_there_was_a_key_is_read_and_encrypted_with_the_next_state(
    conn, graphs, config
):
    canary = f"canary-{uuid.uuid4()}"
    asked(conn, graphs, config, ThreadSaver(conn), canary)
    assert canary in stored(conn, config)
    graph = bound(graphs.read("questions", USE), ThreadSaver(conn, aes_key=KEY))
    assert graph.get_state(config).values["topic"] == canary
    written = graph.update_state(config, {"answers": ["more"]}, as_node="ask")
    sql = "SELECT checkpoint::text FROM checkpoints WHERE thread_id = %s AND checkpoint_id = %s"
    where = config["configurable"]["thread_id"], written["configurable"]["checkpoint_id"]
    assert canary not in conn.execute(sql, where).fetchone()[0]
    assert graph.get_state(config).values["topic"] == canary
    assert graph.get_state(config).values["answers"][-1] == "more"


@pytest.mark.parametrize("key", [None, OTHER], ids=["none", "another"])
def test_without_its_key_a_state_cannot_be_read(conn, graphs, config, key):
    asked(conn, graphs, config, ThreadSaver(conn, aes_key=KEY), "secret")
    graph = bound(graphs.read("questions", USE), ThreadSaver(conn, aes_key=key))
    with pytest.raises(StateUnreadable, match=r"encrypted \(msgpack\+aes\), and LANGGRAPH_AES_KEY"):
        graph.get_state(config)


def test_langgraphs_own_saver_reads_it_with_the_key(conn, graphs, config):
    asked(conn, graphs, config, ThreadSaver(conn, aes_key=KEY), "secret")
    serde = EncryptedSerializer.from_pycryptodome_aes(key=KEY)
    theirs = PostgresSaver(conn, serde=serde)
    assert theirs.get_tuple(config).checkpoint["channel_values"]["topic"] == "secret"
