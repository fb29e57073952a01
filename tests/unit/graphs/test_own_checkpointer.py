"""Which of a project's checkpointers are used, and what is done about one that fails."""

from __future__ import annotations

import pytest
from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple
from langgraph.checkpoint.memory import InMemorySaver

from belay_server.db.own_checkpoints import Garbage
from belay_server.domain.errors import StateUnreadable, Unavailable
from belay_server.graphs.checkpoints.own_checkpointer import (
    OwnApiCheckpointer,
    OwnCheckpointer,
    api_checkpointer,
    run_checkpointer,
)

FOUND = CheckpointTuple(
    {"configurable": {"thread_id": "t", "checkpoint_ns": "", "checkpoint_id": "1"}},
    {"id": "1", "channel_values": {}, "own_values": True},
    {},
)


class Kept(BaseCheckpointSaver):
    """Notes what is deleted, and has no checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.deleted: list[object] = []

    async def aget_tuple(self, _config):
        return None

    async def adelete_thread(self, thread_id):
        self.deleted.append(thread_id)

    async def adelete_for_runs(self, run_ids):
        self.deleted.append(list(run_ids))


class Broken(Kept):
    async def aget_tuple(self, _config):
        raise SystemExit(3)

    async def adelete_thread(self, _thread_id):
        raise ConnectionError


def refuse():
    raise ConnectionError("not yet")


def test_one_that_other_processes_cannot_read_is_not_used(caplog):
    assert api_checkpointer(InMemorySaver()) is None
    assert "in memory: Belay's Postgres is used instead" in caplog.text
    assert run_checkpointer(InMemorySaver) is None
    assert api_checkpointer(None) is run_checkpointer(None) is None


def test_one_that_cannot_be_opened_yet_is_opened_later(caplog):
    checkpointer = run_checkpointer(refuse)
    assert "cannot be opened yet" in caplog.text
    with pytest.raises(ConnectionError, match="not yet"):
        checkpointer.fill(FOUND)


def test_values_that_are_gone_are_an_unreadable_state():
    with pytest.raises(StateUnreadable, match="lacks checkpoint 1 of thread t"):
        OwnCheckpointer(Kept()).fill(FOUND)


def test_a_failure_is_unavailable_to_the_api_and_does_not_end_the_process():
    with pytest.raises(Unavailable, match="RuntimeError"):
        OwnApiCheckpointer(Broken()).fill(FOUND)
    with pytest.raises(RuntimeError, match="raised SystemExit: 3"):
        OwnCheckpointer(Broken()).fill(FOUND)


def test_what_is_gone_is_deleted_by_thread_or_by_run():
    kept = Kept()
    OwnCheckpointer(kept).delete(
        [
            Garbage("gone", "r1", is_thread_gone=True, is_run_gone=True),
            Garbage("gone", "", is_thread_gone=True, is_run_gone=True),
            Garbage("left", "r2", is_thread_gone=False, is_run_gone=True),
            Garbage("left", "r3", is_thread_gone=False, is_run_gone=False),
            Garbage("left", "", is_thread_gone=False, is_run_gone=True),
        ]
    )
    assert kept.deleted == ["gone", ["r2"]]


def test_a_checkpointer_that_deletes_no_runs_keeps_them_until_their_thread_is_deleted():
    run = [Garbage("left", "r", is_thread_gone=False, is_run_gone=True)]
    OwnCheckpointer(InMemorySaver()).delete(run)
    with pytest.raises(ConnectionError):
        OwnCheckpointer(Broken()).delete([Garbage("t", "", is_thread_gone=True, is_run_gone=True)])
