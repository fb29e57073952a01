"""Test the limits of the saver that reads the states of threads."""

from __future__ import annotations

import uuid

import pytest
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.serde.types import TASKS
from langgraph.types import Send

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
