"""Read and write agent runs. Each function runs the query of its name in `sql/agent_runs.sql`."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from psycopg.types.json import Jsonb

from belay_server.db.postgres.connection import Connection
from belay_server.db.postgres.queries import load_queries
from belay_server.db.postgres.statements import execute, fetch_one, fetch_page, fetch_value
from belay_server.db.runs import SMALL_OUTCOME
from belay_server.domain.agent_runs.runs import AgentRun

SQL = load_queries("agent_runs")


def lock_team(conn: Connection, team: str) -> None:
    """Lock a team's creates until the end of the transaction."""
    execute(conn, SQL.lock_team, {"team": team})


def count_active_agent_runs(conn: Connection, team: str) -> int:
    """Return how many agent runs of a team are pending or running."""
    return int(fetch_value(conn, SQL.count_active_agent_runs, {"team": team}))


def insert_agent_run(
    conn: Connection,
    agent_run_id: str,
    *,
    team: str,
    run_id: UUID,
    thread_id: UUID,
    request: dict[str, Any],
) -> None:
    """Insert an agent run. Its run exists already; `request` is what the client sent."""
    params = {
        "id": agent_run_id,
        "team": team,
        "run_id": run_id,
        "thread_id": thread_id,
        "request": Jsonb(request),
    }
    execute(conn, SQL.insert_agent_run, params)


def get_agent_run(conn: Connection, team: str, agent_run_id: str) -> AgentRun | None:
    """Return a team's agent run; None if there is none. `outcome` is None if it is not small."""
    params = {"team": team, "id": agent_run_id, "small": SMALL_OUTCOME}
    return fetch_one(conn, SQL.get_agent_run, params, AgentRun)


def list_agent_runs(
    conn: Connection, team: str, *, before: str | None, limit: int
) -> list[AgentRun]:
    """Return a page of agent runs, newest first, of those older than the id `before`.

    The run of `before` need not exist any more.
    """
    params = {"team": team, "before": before, "limit": limit, "small": SMALL_OUTCOME}
    return fetch_page(conn, SQL.list_agent_runs, params, AgentRun)
