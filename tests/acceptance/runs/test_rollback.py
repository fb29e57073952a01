"""Rollback is exact: afterwards the thread equals the thread before, byte for byte.

The comparison covers the API (thread, runs, states, histories of the root and of every subgraph
namespace) and LangGraph's tables.
"""

from __future__ import annotations

import json
import random

import httpx
import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langgraph_sdk.errors import NotFoundError

from tests.conftest import Beats

TABLES = {
    "checkpoints": "checkpoint_ns, checkpoint_id",
    "checkpoint_writes": "checkpoint_ns, checkpoint_id, task_id, idx",
    "checkpoint_blobs": "checkpoint_ns, channel, version",
}


@pytest.fixture(scope="module")
def database(server):
    with psycopg.connect(server.database_url, autocommit=True) as conn:
        yield conn


def photograph(client, database, thread_id):
    """Return all visible data of a thread in canonical JSON."""
    thread = client.threads.get(thread_id)
    tables = {
        table: [
            [bytes(v).hex() if isinstance(v, bytes) else v for v in row]
            for row in database.execute(
                f"SELECT * FROM {table} WHERE thread_id = %s ORDER BY {order}", (thread_id,)
            )
        ]
        for table, order in TABLES.items()
    }
    namespaces = sorted({row[1] for row in tables["checkpoints"]} - {""})
    seen = {
        "thread": {k: v for k, v in thread.items() if k not in ("updated_at",)},
        "runs": [r["run_id"] for r in client.runs.list(thread_id, limit=100)],
        "state": client.threads.get_state(thread_id, subgraphs=True),
        "history": client.threads.get_history(thread_id, limit=1000),
        "below": {
            namespace: client.threads.get_history(
                thread_id, limit=1000, checkpoint={"checkpoint_ns": namespace}
            )
            for namespace in namespaces
            if ":" not in namespace
        },
        "tables": tables,
    }
    return json.dumps(seen, sort_keys=True, default=str, indent=1)


def roll_back_midway(client, thread_id, beats, mark, assistant, **options):
    """Start a run, wait for the beat `mark`, and roll it back."""
    run = client.runs.create(thread_id, assistant, **options)
    beats.wait_for(mark)
    client.runs.cancel(thread_id, run["run_id"], action="rollback", wait=True)
    with pytest.raises(NotFoundError):
        client.runs.get(thread_id, run["run_id"])


@pytest.fixture
def thread_id(sync_client):
    return sync_client.threads.create(metadata={"mine": [1, {"a": None}]})["thread_id"]


@pytest.fixture
def unchanged(sync_client, database, thread_id):
    """Return a context manager that checks that the thread is the same before and after."""

    class Unchanged:
        def __init__(self):
            self.before = None

        def __enter__(self):
            self.before = photograph(sync_client, database, thread_id)

        def __exit__(self, *error):
            if error[0] is None:
                assert self.before == photograph(sync_client, database, thread_id)

    return Unchanged()


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
@pytest.mark.parametrize("graph", ["steps", "sync_steps"])
def test_rollback_of_the_first_run_restores_the_thread(
    sync_client, thread_id, beats, unchanged, graph, durability
):
    with unchanged:
        roll_back_midway(
            sync_client,
            thread_id,
            beats,
            "s2:start",
            graph,
            input={"seconds": 0.2, "beats": str(beats)},
            durability=durability,
        )


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
def test_rollback_of_the_third_run_restores_the_thread(
    sync_client, thread_id, beats, unchanged, durability
):
    for count in (1, 10):
        sync_client.runs.wait(thread_id, "counter", input={"count": count})
    with unchanged:
        roll_back_midway(
            sync_client,
            thread_id,
            beats,
            "s3:start",
            "steps",
            input={"seconds": 0.1, "beats": str(beats)},
            durability=durability,
        )
    assert sync_client.runs.wait(thread_id, "counter", input={"count": 5})["count"] == 6


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
def test_rollback_of_a_resume_restores_the_interrupt(
    sync_client, thread_id, beats, unchanged, durability
):
    sync_client.runs.wait(
        thread_id, "questions", input={"topic": "t", "beats": str(beats), "seconds": 60}
    )
    sync_client.runs.wait(thread_id, "questions", command={"resume": "one"})
    with unchanged:
        roll_back_midway(
            sync_client,
            thread_id,
            beats,
            "work:start",
            "questions",
            command={"resume": "two"},
            durability=durability,
        )
    asked = sync_client.threads.get_state(thread_id)["interrupts"]
    assert [i["value"]["question"] for i in asked] == ["second about t?"]


def test_rollback_of_a_fork_restores_the_thread(sync_client, thread_id, beats, unchanged):
    sync_client.runs.wait(thread_id, "steps", input={"seconds": 0.0, "beats": str(beats)})
    history = sync_client.threads.get_history(thread_id, limit=10)
    fork = next(s for s in history if s["next"] == ["s2"])["checkpoint"]
    sync_client.threads.update_state(thread_id, {"seconds": 0.2}, checkpoint=fork)
    forked = sync_client.threads.get_history(thread_id, limit=1)[0]
    sync_client.runs.wait(thread_id, "counter", input={"count": 1})
    started = beats.names().count("s3:start")
    with unchanged:
        run = sync_client.runs.create(
            thread_id, "steps", input=None, checkpoint=forked["checkpoint"]
        )
        beats.wait_for("s3:start", started + 1)
        sync_client.runs.cancel(thread_id, run["run_id"], action="rollback", wait=True)


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
def test_rollback_of_a_run_with_a_subgraph_restores_the_thread(
    sync_client, thread_id, beats, unchanged, durability
):
    sync_client.runs.wait(thread_id, "family", input={"log": ["first"]})
    with unchanged:
        roll_back_midway(
            sync_client,
            thread_id,
            beats,
            "child:start",
            "family",
            input={"seconds": 60, "beats": str(beats)},
            durability=durability,
        )


def test_rollback_of_a_killed_run_restores_the_thread(sync_client, thread_id, beats, unchanged):
    sync_client.runs.wait(thread_id, "counter", input={"count": 1})
    with unchanged:
        roll_back_midway(
            sync_client,
            thread_id,
            beats,
            "beat",
            "nodes",
            input={"kind": "swallow_sync", "beats": str(beats)},
            durability="sync",
        )


def test_rollback_of_one_of_five_queued_runs_leaves_the_others(
    sync_client, thread_id, beats, tmp_path
):
    first = sync_client.runs.create(
        thread_id, "steps", input={"seconds": 0.15, "beats": str(beats)}
    )
    queued = [
        sync_client.runs.create(
            thread_id, "steps", input={"beats": str(tmp_path / "queued"), "tag": f"{n}:"}
        )
        for n in range(5)
    ]
    beats.wait_for("s1:start")
    sync_client.runs.cancel(thread_id, queued[2]["run_id"], action="rollback", wait=True)
    sync_client.runs.join(thread_id, queued[4]["run_id"])
    left = [r["run_id"] for r in sync_client.runs.list(thread_id)]
    wanted = [first, *queued[:2], *queued[3:]]
    assert [r["run_id"] for r in reversed(wanted)] == left
    names = [n for n in Beats(tmp_path / "queued").names() if n.endswith("s1:start")]
    assert names == ["0:s1:start", "1:s1:start", "3:s1:start", "4:s1:start"]


def test_rollback_keeps_concurrent_changes_to_the_thread(sync_client, thread_id, beats):
    run = sync_client.runs.create(thread_id, "steps", input={"seconds": 60, "beats": str(beats)})
    beats.wait_for("s1:start")
    sync_client.threads.update(thread_id, metadata={"meanwhile": True})
    queued = sync_client.runs.create(thread_id, "counter", input={"count": 1})
    sync_client.runs.cancel(thread_id, run["run_id"], action="rollback", wait=True)
    assert sync_client.runs.join(thread_id, queued["run_id"]) == {"count": 2}
    assert sync_client.threads.get(thread_id)["metadata"]["meanwhile"] is True


OPERATIONS = st.lists(
    st.sampled_from(["count", "steps", "family", "ask", "resume", "update", "fork"]), max_size=5
)
ROLLED_BACK = st.sampled_from(["steps", "sync_steps", "family", "resume", "fork"])
DURABILITY = st.sampled_from(["sync", "async", "exit"])


def play(client, thread_id, operation, chance) -> None:
    """Perform one random operation on a thread."""
    if operation == "count":
        client.runs.wait(thread_id, "counter", input={"count": chance.randrange(9)})
    elif operation == "steps":
        client.runs.wait(thread_id, "steps", input={"seconds": 0.0})
    elif operation == "family":
        client.runs.wait(thread_id, "family", input={"ask": chance.random() < 0.3})
    elif operation == "ask":
        client.runs.wait(thread_id, "questions", input={"topic": "t"})
    elif operation == "resume":
        if client.threads.get_state(thread_id)["interrupts"]:
            client.runs.wait(thread_id, "questions", command={"resume": "yes"})
    elif operation == "update":
        if client.threads.get_history(thread_id, limit=1):
            client.threads.update_state(thread_id, {})
    elif operation == "fork":
        history = client.threads.get_history(thread_id, limit=20)
        if history:
            old = chance.choice(history)["checkpoint"]
            client.runs.wait(thread_id, "counter", input={"count": 1}, checkpoint=old)


def check_rollback(client, database, folder, operations, last, durability, seed) -> None:
    chance = random.Random(seed)
    beats = Beats(folder / f"beats-{seed}-{chance.random()}")
    thread_id = client.threads.create()["thread_id"]
    for operation in operations:
        play(client, thread_id, operation, chance)
    options = {"input": {"seconds": 0.05, "beats": str(beats)}, "durability": durability}
    graph = last if last in ("steps", "sync_steps", "family") else "questions"
    if last == "resume":
        client.runs.wait(thread_id, "questions", input={"topic": "t", "seconds": 0.05})
        options = {"command": {"resume": "yes"}, "durability": durability}
    elif last == "fork":
        history = client.threads.get_history(thread_id, limit=20)
        graph = "steps"
        if history:
            options["checkpoint"] = chance.choice(history)["checkpoint"]
    before = photograph(client, database, thread_id)
    run = client.runs.create(thread_id, graph, **options)
    for _ in range(chance.randrange(12)):
        if client.runs.get(thread_id, run["run_id"])["status"] not in ("pending", "running"):
            break
    try:
        client.runs.cancel(thread_id, run["run_id"], action="rollback", wait=True)
    except httpx.HTTPStatusError as error:
        assert error.response.status_code == 404
        return  # the run had ended first; there is nothing to roll back
    after = photograph(client, database, thread_id)
    assert before == after, f"seed {seed}: {operations}, then {last} with {durability}"


@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(OPERATIONS, ROLLED_BACK, DURABILITY, st.integers(0, 10**6))
def test_rollback_is_exact_after_any_history(
    sync_client, database, tmp_path, operations, last, durability, seed
):
    check_rollback(sync_client, database, tmp_path, operations, last, durability, seed)


@pytest.mark.long
@settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(OPERATIONS, ROLLED_BACK, DURABILITY, st.integers(0, 10**6))
def test_rollback_is_exact_after_fifty_histories(
    sync_client, database, tmp_path, operations, last, durability, seed
):
    check_rollback(sync_client, database, tmp_path, operations, last, durability, seed)


@pytest.mark.full
@pytest.mark.timeout(3600)
@settings(
    max_examples=1000,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(OPERATIONS, ROLLED_BACK, DURABILITY, st.integers(0, 10**6))
def test_rollback_is_exact_after_a_thousand_histories(
    sync_client, database, tmp_path, operations, last, durability, seed
):
    check_rollback(sync_client, database, tmp_path, operations, last, durability, seed)
