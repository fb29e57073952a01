"""Prepare a child or a host before its first run, so that the run does not wait for it.

It opens the connections and executes a small graph through LangGraph, asyncio and the event log's
client. That also copies the memory pages that a forked process copies when it first writes them.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TypedDict
from uuid import UUID

import psycopg
from langgraph.graph import START, StateGraph

from belay_server.bus.client import RedisError
from belay_server.db import run_claims as claim_rows
from belay_server.db.postgres.outages import is_outage
from belay_server.domain.runs import Claim
from belay_server.services.runs.endings import STOPPED
from belay_workers.child.process import Child
from belay_workers.execution.executing_process import ExecutingProcess

log = logging.getLogger(__name__)


class _State(TypedDict, total=False):
    done: bool


async def _work(state: _State) -> _State:  # noqa: ARG001  (a node has one)
    await asyncio.sleep(0)
    return {"done": True}


_UNKNOWN_RUN = Claim(UUID(int=0), 0)
_GRAPH = StateGraph(_State).add_node("work", _work).add_edge(START, "work").compile()


def warm_up(child: Child) -> None:
    """Open connections and execute a graph. If a server is unavailable, the first run waits."""
    prepare_connections(child)
    child.on_loop(run_a_graph())


def prepare_connections(process: ExecutingProcess) -> None:
    """Open the connections, and let Postgres plan the statements of a run."""
    try:
        _prepare_statements(process)
        process.event_log.last_position(_UNKNOWN_RUN.run_id)
    except (RedisError, psycopg.Error) as error:
        if isinstance(error, psycopg.Error) and not is_outage(error):
            raise
        log.info("cannot warm up a process, its first run will connect: %s", error)


def _prepare_statements(process: ExecutingProcess) -> None:
    """Execute the statements without effect. psycopg prepares them at their second use."""
    conn = process.database.get()
    for _ in range(2):
        claim_rows.claim_run(
            conn,
            _UNKNOWN_RUN.run_id,
            owner=process.owner,
            lease_seconds=0.0,
            graph_ids=process.graphs.graph_ids,
        )
        claim_rows.finish_run(conn, _UNKNOWN_RUN.run_id, _UNKNOWN_RUN, STOPPED)


async def run_a_graph() -> None:
    """Execute a small graph."""
    async for _ in _GRAPH.astream({}, stream_mode=["values", "updates", "messages"]):
        pass
