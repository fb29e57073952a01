"""Test the fenced checkpoint saver with LangGraph on a real Postgres."""

from __future__ import annotations

import asyncio
import operator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Annotated, TypedDict

import pytest
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.graph import END, START, StateGraph
from langgraph.store.memory import InMemoryStore
from langgraph.types import Command

from belay_server.db import run_cancels as cancel_rows
from belay_server.db import run_claims as claim_rows
from belay_server.db.postgres.reconnecting import ReconnectingConnection
from belay_server.db.run_cancels import CancelFilter
from belay_server.domain.runs import CancelAction, Ending, RunStatus
from belay_server.graphs.checkpoints.run_saver import ClaimLost, RunSaver
from belay_server.graphs.checkpoints.thread_saver import ThreadSaver
from belay_server.graphs.project.factories import GraphUse
from belay_server.graphs.project.langgraph_json import read_project
from belay_server.graphs.registry import GraphRegistry
from belay_server.graphs.thread_state import bound
from belay_server.services.runs.cancellation import cancel_locked_runs
from belay_server.services.runs.endings import STOPPED, end_cancelled_run, end_run
from tests.integration.conftest import LEASE
from tests.servers import PROJECT

TABLES = ("checkpoints", "checkpoint_writes", "checkpoint_blobs")


@pytest.fixture(scope="module")
def graphs():
    return GraphRegistry.load(read_project(PROJECT))


@pytest.fixture
def thread_of_execution():
    with ThreadPoolExecutor(1) as pool:
        yield pool


#: None of the graphs here comes from a factory.
USE = GraphUse("threads.read", {}, store=InMemoryStore)


def invoke(conn, graphs, claimed, graph_id, given, pool, durability="sync"):
    saver = RunSaver(ReconnectingConnection(lambda: conn), claimed.claim, pool, lambda: False)
    graph = bound(graphs.read(graph_id, USE), saver)
    config = {"configurable": {"thread_id": str(claimed.thread_id)}}
    return graph.invoke(given, config, durability=durability)


def tables(conn, thread_id):
    return {
        table: sorted(
            map(
                repr, conn.execute(f"SELECT * FROM {table} WHERE thread_id = %s", (str(thread_id),))
            )
        )
        for table in TABLES
    }


def roll_back(conn, claimed) -> None:
    with conn.transaction():
        found = cancel_rows.cancellable_runs(
            conn, CancelFilter(run_ids=[claimed.run_id]), after=None, limit=1
        )
        found = cancel_rows.lock_runs(conn, found)
        cancel_locked_runs(conn, found, CancelAction.ROLLBACK, {"error": "x", "message": "y"})
    assert end_cancelled_run(conn, claimed.thread_id, claimed.claim, STOPPED) is not None


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
def test_rollback_of_a_resume_with_a_new_interrupt_restores_the_first(
    rows, conn, graphs, thread_of_execution, durability
):
    thread_id = rows.thread()
    first = rows.running(thread_id)
    invoke(conn, graphs, first, "questions", {"topic": "t"}, thread_of_execution, durability)
    end_run(conn, thread_id, first.claim, Ending(RunStatus.SUCCESS, values={}, has_next=True))
    before = tables(conn, thread_id)
    second = rows.running(thread_id)
    asked = invoke(
        conn, graphs, second, "questions", Command(resume="one"), thread_of_execution, durability
    )
    assert [i.value["question"] for i in asked["__interrupt__"]] == ["second about t?"]
    assert before != tables(conn, thread_id)
    roll_back(conn, second)
    assert before == tables(conn, thread_id)
    state = bound(graphs.read("questions", USE), ThreadSaver(conn)).get_state(
        {"configurable": {"thread_id": str(thread_id)}}
    )
    assert [i.value["question"] for i in state.interrupts] == ["first about t?"]


def test_a_zombie_writes_no_checkpoint_after_a_takeover(rows, conn, graphs, thread_of_execution):
    zombie = rows.running()
    invoke(conn, graphs, zombie, "counter", {"count": 1}, thread_of_execution)
    claim_rows.put_run_back(conn, zombie.claim, uncharge=True, rering_seconds=5.0)
    claim_rows.claim_run(conn, zombie.run_id, **LEASE)
    before = tables(conn, zombie.thread_id)
    for durability in ("sync", "async", "exit"):
        with pytest.raises(ClaimLost):
            invoke(conn, graphs, zombie, "counter", {"count": 5}, thread_of_execution, durability)
    assert before == tables(conn, zombie.thread_id)


def test_a_zombie_writes_no_checkpoint_after_a_rollback(rows, conn, graphs, thread_of_execution):
    zombie = rows.running()
    invoke(conn, graphs, zombie, "counter", {"count": 1}, thread_of_execution)
    roll_back(conn, zombie)
    with pytest.raises(ClaimLost):
        invoke(conn, graphs, zombie, "counter", {"count": 5}, thread_of_execution)
    assert tables(conn, zombie.thread_id) == {table: [] for table in TABLES}


def test_langgraphs_saver_reads_checkpoints_written_by_belays(
    rows, conn, graphs, thread_of_execution
):
    claimed = rows.running()
    invoke(conn, graphs, claimed, "counter", {"count": 1}, thread_of_execution)
    found = PostgresSaver(conn).get_tuple(
        {"configurable": {"thread_id": str(claimed.thread_id), "checkpoint_ns": ""}}
    )
    assert found.checkpoint["channel_values"]["count"] == 2
    assert found.metadata["run_id"] == str(claimed.run_id)


def test_a_string_with_nul_does_not_stop_a_checkpoint(rows, conn, graphs, thread_of_execution):
    claimed = rows.running()
    invoke(conn, graphs, claimed, "counter", {"count": 1, "note": "a\0b"}, thread_of_execution)
    found = PostgresSaver(conn).get_tuple(
        {"configurable": {"thread_id": str(claimed.thread_id), "checkpoint_ns": ""}}
    )
    assert found.checkpoint["channel_values"]["note"] == "a\ufffdb"


# --- write-behind: writes that return before they are stored --------------------------------------


async def stream(conn, graphs, claimed, graph_id, given, pool, **options):
    """Run a graph on a write-behind saver. Return the saver and the batches of rows it stored."""
    saver = RunSaver(
        ReconnectingConnection(lambda: conn),
        claimed.claim,
        pool,
        lambda: False,
        behind=True,
        **options,
    )
    stored = []
    store = saver._store
    saver._store = lambda rows: (stored.append(rows), store(rows))
    graph = bound(graphs.read(graph_id, USE), saver)
    config = {"configurable": {"thread_id": str(claimed.thread_id)}}
    async for _ in graph.astream(given, config, durability="async"):
        pass
    await saver.flush()
    return saver, [rows for rows in stored if rows]


def test_write_behind_stores_in_batches_what_langgraph_would_store(
    rows, conn, graphs, thread_of_execution
):
    behind, plain = rows.running(), rows.running()
    _, stored = asyncio.run(
        stream(conn, graphs, behind, "sync_steps", {"tag": ""}, thread_of_execution, is_new=True)
    )
    assert len(stored) < 6
    invoke(conn, graphs, plain, "sync_steps", {"tag": ""}, thread_of_execution)
    counts = [
        {table: len(found) for table, found in tables(conn, claimed.thread_id).items()}
        for claimed in (behind, plain)
    ]
    assert counts[0] == counts[1]
    read = [
        [
            (found.metadata["step"], found.checkpoint["channel_values"].get("steps"))
            for found in PostgresSaver(conn).list(
                {"configurable": {"thread_id": str(claimed.thread_id), "checkpoint_ns": ""}}
            )
        ]
        for claimed in (behind, plain)
    ]
    assert read[0] == read[1]


def test_a_write_behind_that_is_refused_stops_the_graph(rows, conn, graphs, thread_of_execution):
    zombie = rows.running()
    claim_rows.put_run_back(conn, zombie.claim, uncharge=True, rering_seconds=5.0)
    claim_rows.claim_run(conn, zombie.run_id, **LEASE)
    with pytest.raises(ClaimLost):
        asyncio.run(stream(conn, graphs, zombie, "counter", {"count": 1}, thread_of_execution))
    assert tables(conn, zombie.thread_id) == {table: [] for table in TABLES}


def test_a_read_waits_for_the_pending_writes_behind(rows, conn, graphs, thread_of_execution):
    claimed = rows.running()

    async def scene():
        saver, _ = await stream(
            conn, graphs, claimed, "counter", {"count": 1}, thread_of_execution, is_new=True
        )
        graph = bound(graphs.read("counter", USE), saver)
        config = {"configurable": {"thread_id": str(claimed.thread_id)}}
        written = await graph.aupdate_state(config, {"count": 7})
        return written, await graph.aget_state(config)

    written, state = asyncio.run(scene())
    assert state.values == {"count": 7}
    assert (
        state.config["configurable"]["checkpoint_id"] == (written["configurable"]["checkpoint_id"])
    )


def test_the_before_store_hook_is_called_before_anything_is_stored(
    rows, conn, graphs, thread_of_execution
):
    claimed = rows.running()
    seen = []

    def before():
        seen.append([len(stored) for stored in tables(conn, claimed.thread_id).values()])

    options = {"before_store": before}
    asyncio.run(
        stream(conn, graphs, claimed, "counter", {"count": 1}, thread_of_execution, **options)
    )
    stored = [len(stored) for stored in tables(conn, claimed.thread_id).values()]
    assert seen
    assert all(before < after for before, after in zip(seen[-1], stored, strict=True))
    assert stored[0] == 3


class Steps(TypedDict, total=False):
    done: Annotated[list[str], operator.add]


def chain(*names, inner=None):
    """Return a graph of nodes in a row, the last of which is the graph `inner`."""

    def node(name):
        async def work(_: Steps) -> Steps:
            await asyncio.sleep(0)
            return {"done": [name]}

        return work

    builder = StateGraph(Steps)
    for name in names:
        builder.add_node(name, node(name))
    if inner is not None:
        builder.add_node("inner", inner)
    for before, after in pairwise([START, *names, *(["inner"] if inner is not None else [])]):
        builder.add_edge(before, after)
    return builder.compile()


async def parts_of(graph, config, how):
    """Yield the parts of a stream that belong to tasks, as runs read it."""
    options = {"durability": "async", "stream_mode": ["tasks"]}
    if how != "events":
        parts = graph.astream({}, config, subgraphs=how == "subgraphs", **options)
        async for part in parts:
            yield part[-1]
        return
    async for event in graph.astream_events({}, config, version="v2", **options):
        if event["event"] == "on_chain_stream" and not event["parent_ids"]:
            yield event["data"]["chunk"][-1]


@pytest.mark.parametrize("how", ["plain", "subgraphs", "events"])
def test_what_a_task_writes_is_stored_after_its_event_was_delivered(
    rows, conn, thread_of_execution, how
):
    """Otherwise a process that dies in between loses the event: the task is not repeated."""
    claimed = rows.running()
    connection = ReconnectingConnection(lambda: conn)
    saver = RunSaver(
        connection,
        claimed.claim,
        thread_of_execution,
        lambda: False,
        behind=True,
        before_store=lambda: True,
    )
    delivered, written = set(), {}
    ask = saver._ask

    def note(rows_of):
        if rows_of.func == saver._rows_of_writes:
            task_id = rows_of.args[2]
            written[task_id] = task_id in delivered
        ask(rows_of)

    async def scene():
        graph = chain("a", "b", "c", inner=chain("d", "e") if how == "subgraphs" else None)
        graph.checkpointer, graph.stream_eager = saver, True  # as runs do
        config = {"configurable": {"thread_id": str(claimed.thread_id)}}
        async for part in parts_of(graph, config, how):
            if "result" in part:
                delivered.add(part["id"])
        await saver.flush()

    saver._ask = note
    asyncio.run(scene())
    assert delivered
    assert {task_id for task_id in delivered if not written.get(task_id)} == set()


def test_an_edge_that_failed_is_repeated_by_the_next_attempt(rows, conn, thread_of_execution):
    """The node's output is stored beside the error of its edge. The process dies before the end."""

    class State(TypedDict):
        steps: Annotated[list[str], operator.add]

    failures = [RuntimeError("of the edge")]

    def route(_state):
        if failures:
            raise failures.pop()
        return "second"

    builder = StateGraph(State)
    builder.add_node("first", lambda _state: {"steps": ["first"]})
    builder.add_node("second", lambda _state: {"steps": ["second"]})
    builder.add_edge(START, "first")
    builder.add_conditional_edges("first", route, ["second", END])
    claimed = rows.running(rows.thread())
    config = {"configurable": {"thread_id": str(claimed.thread_id)}}

    def attempt(given, **options):
        connection = ReconnectingConnection(lambda: conn)
        saver = RunSaver(connection, claimed.claim, thread_of_execution, lambda: False, **options)
        return builder.compile(checkpointer=saver).invoke(given, config, durability="sync")

    with pytest.raises(RuntimeError, match="of the edge"):
        attempt({"steps": []})
    assert attempt(None, is_retry=True)["steps"] == ["first", "second"]
