"""Test that the deletion of an assistant finds every run that was created for it."""

from __future__ import annotations

import uuid

import psycopg
import pytest

from belay_server.db import assistants, runs
from belay_server.db.assistants import AssistantContent
from belay_server.domain.run_options import RunKwargs

CONTENT = AssistantContent("counter", "a client's", None, {}, {}, {})


@pytest.fixture
def assistant(conn):
    return assistants.insert_assistant(conn, uuid.uuid4(), CONTENT)


def accept(conn, assistant):
    """Create a run and its thread with one statement, as most runs are created."""
    new = runs.NewRun(
        run_id=uuid.uuid4(),
        thread_id=uuid.uuid4(),
        assistant_id=assistant.assistant_id,
        graph_id="counter",
        queue="runs",
        metadata={},
        kwargs=RunKwargs(config={"configurable": {}}),
        thread_config={},
        thread_configurable={},
        multitask_strategy="enqueue",
        temporary=False,
        timeout_seconds=None,
        after_seconds=0.0,
    )
    return runs.accept_run(
        conn,
        new,
        assistant_updated_at=assistant.updated_at,
        new_thread=True,
        thread_metadata={},
        ttl=None,
        rering_seconds=5.0,
    )


@pytest.mark.parametrize("create", [accept, assistants.keep_assistant])
def test_a_deletion_waits_for_the_runs_that_are_being_created(
    conn, assistant, database_url, create
):
    ids = {"assistant_id": assistant.assistant_id, "allowed_assistants": None}
    with psycopg.connect(database_url, autocommit=True) as other:
        other.execute("SET lock_timeout = '100ms'")
        with conn.transaction():
            assert create(conn, assistant)
            with pytest.raises(psycopg.errors.LockNotAvailable):
                other.execute(assistants.SQL.delete_assistant, ids)
            renamed = "UPDATE assistant SET name = 'another' WHERE assistant_id = %(assistant_id)s"
            other.execute(renamed, ids)
    assert assistants.delete_assistant(conn, assistant.assistant_id)
    assert not create(conn, assistant)
