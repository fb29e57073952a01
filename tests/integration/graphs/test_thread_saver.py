"""Test the limits of the saver that reads the states of threads."""

from __future__ import annotations

import uuid

import pytest
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.serde.types import TASKS
from langgraph.types import Send

from belay_server.domain.errors import StateUnreadable
from belay_server.graphs.checkpoints.own_checkpointer import OwnApiCheckpointer
from belay_server.graphs.checkpoints.thread_saver import LargeState, ThreadSaver

MANY = 700


@pytest.fixture
def config():
    return {"configurable": {"thread_id": str(uuid.uuid4()), "checkpoint_ns": ""}}


def sends(saver, config):
    """Store a state with many pending tasks."""
    checkpoint = empty_checkpoint()
    checkpoint["channel_values"] = {TASKS: [Send("node", {"n": n}) for n in range(MANY)]}
    checkpoint["channel_versions"] = {TASKS: "1"}
    saver.put(config, checkpoint, {}, {TASKS: "1"})


def writes(saver, config):
    """Store a state whose tasks have written much."""
    stored = saver.put(config, empty_checkpoint(), {}, {})
    for task in range(7):
        saver.put_writes(stored, [("channel", n) for n in range(MANY // 7)], f"task {task}")


@pytest.mark.parametrize("store", [sends, writes])
def test_a_state_with_too_many_tasks_is_refused(conn, config, store):
    store(ThreadSaver(conn), config)
    limited = ThreadSaver(conn, most_bytes=512 * 1024, most_tasks=600)
    with pytest.raises(LargeState, match="tasks"):
        limited.get_tuple(config)
    with pytest.raises(LargeState, match="tasks"):
        list(limited.list(config, limit=10))
    assert ThreadSaver(conn, most_bytes=512 * 1024).get_tuple(config) is not None


def test_a_state_in_a_checkpointer_that_is_not_named_any_more_is_unreadable(conn, config):
    """States from before there was one are read as ever."""
    with_own = ThreadSaver(conn, checkpointer=OwnApiCheckpointer(InMemorySaver()))
    sends(ThreadSaver(conn), config)
    before = with_own.get_tuple(config)
    assert len(before.checkpoint["channel_values"][TASKS]) == MANY
    sends(with_own, before.config)
    assert len(with_own.get_tuple(config).checkpoint["channel_values"][TASKS]) == MANY
    assert ThreadSaver(conn).get_tuple(before.config) == before
    with pytest.raises(StateUnreadable, match="does not name any more"):
        ThreadSaver(conn).get_tuple(config)
