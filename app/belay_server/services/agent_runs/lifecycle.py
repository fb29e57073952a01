"""Agent runs: the second HTTP API's way to create, read, end and delete runs.

Each has a thread of its own, which stays with its outcome until the agent run is deleted. Creating,
cancelling and deleting are the ways of any run.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import orjson

from belay_server.db import agent_runs as agent_run_rows
from belay_server.db.connection import Connection
from belay_server.db.run_cancels import CancelFilter
from belay_server.domain.agent_runs.errors import (
    PreviousRunNotCompleted,
    PreviousRunNotFound,
    RunNotFound,
    TooManyRuns,
)
from belay_server.domain.agent_runs.runs import (
    STOPPED,
    AgentRun,
    AgentRunStatus,
    EncodedOutput,
    agent_run_id,
)
from belay_server.domain.errors import NotFound, TooMuch
from belay_server.domain.run_options import RunOptions
from belay_server.domain.runs import CancelAction, user_cancel_reason
from belay_server.services.parts import Parts
from belay_server.services.runs.cancellation import stop_runs
from belay_server.services.runs.creation import (
    ASK_AGAIN,
    Accepted,
    RunRequest,
    accept_run,
    announce_accepted,
)
from belay_server.services.runs.outcomes import NotEnded, end_of, large_answer
from belay_server.services.threads.records import delete_thread
from belay_server.states import jobs as state_jobs

#: What of a request its graph gets, under the same names.
GRAPH_INPUT = ("query", "systemPrompt", "input", "outputSchema", "effort", "previousRunId")
#: An agent run may take an hour.
_LONGEST_SECONDS = 3600.0
_CANCELLED = user_cancel_reason(CancelAction.INTERRUPT, "POST /agent/runs/{id}/cancel")


@dataclass(frozen=True, slots=True)
class AgentRunRequest:
    """A validated request of a team, and the run that it becomes."""

    team: str
    #: The request's fields, as they are kept and shown.
    fields: dict[str, Any]
    run: RunRequest

    @property
    def id(self) -> str:
        return agent_run_id(self.run.new_run_id)


def options_of_run(parts: Parts, fields: dict[str, Any], run_id: UUID) -> RunOptions:
    """Return the options of an agent run: those of a run on a thread that is created for it."""
    graph_id = parts.graphs.project.agent_runs_graph
    assert graph_id is not None, "without a graph there are no routes"
    return RunOptions(
        assistant_id=graph_id,
        input={name: fields[name] for name in GRAPH_INPUT if name in fields},
        metadata={"agent_run_id": agent_run_id(run_id)},
        if_not_exists="create",
        timeout_seconds=min(_LONGEST_SECONDS, parts.settings.run_timeout_seconds),
        output_schema=fields.get("outputSchema"),
    )


def create_agent_run(parts: Parts, asked: AgentRunRequest) -> AgentRun:
    """Accept an agent run. Raises PreviousRunNotFound, PreviousRunNotCompleted, TooManyRuns."""

    def create(conn: Connection) -> tuple[Accepted, AgentRun]:
        # It is there when the connection broke during the commit of a first try.
        is_new = agent_run_rows.get_agent_run(conn, asked.team, asked.id) is None
        if is_new:
            _check_previous(conn, asked)
            _refuse_one_too_many(parts, conn, asked.team)
        accepted = accept_run(parts, conn, asked.run, asked.run.new_run_id)
        if is_new:
            agent_run_rows.insert_agent_run(
                conn,
                asked.id,
                team=asked.team,
                run_id=accepted.run.run_id,
                thread_id=accepted.run.thread_id,
                request=asked.fields,
            )
        return accepted, _found(conn, asked.team, asked.id)

    accepted: Accepted
    run: AgentRun
    accepted, run = ASK_AGAIN(parts.database.transaction, create)
    announce_accepted(parts, asked.run, accepted)
    return run


def _check_previous(conn: Connection, asked: AgentRunRequest) -> None:
    previous_id = asked.fields.get("previousRunId")
    if previous_id is None:
        return
    previous = agent_run_rows.get_agent_run(conn, asked.team, previous_id)
    if previous is None:
        raise PreviousRunNotFound
    if previous.status is not AgentRunStatus.COMPLETED:
        raise PreviousRunNotCompleted


def _refuse_one_too_many(parts: Parts, conn: Connection, team: str) -> None:
    """The lock goes first: the count is a statement of its own, and sees what was committed by
    whoever had the lock before."""
    agent_run_rows.lock_team(conn, team)
    most = parts.settings.agent_runs_per_team
    if agent_run_rows.count_active_agent_runs(conn, team) >= most:
        raise TooManyRuns(f"Agent run concurrency limit reached: {most} at once.")


def _found(conn: Connection, team: str, agent_run_id: str) -> AgentRun:
    run = agent_run_rows.get_agent_run(conn, team, agent_run_id)
    if run is None:
        raise RunNotFound
    return run


def get_agent_run(parts: Parts, team: str, agent_run_id: str) -> AgentRun:
    """Raises RunNotFound, also for another team's."""
    with parts.database.connection() as conn:
        run = _found(conn, team, agent_run_id)
    return _with_outcome(parts, team, run)


def _with_outcome(parts: Parts, team: str, run: AgentRun) -> AgentRun:
    """Read an outcome that the row has not shown: a large one, or, after a stop that had to kill,
    what the run had reached, which nobody has read yet. Raises TooMany, StateTooLarge."""
    if run.status is not AgentRunStatus.COMPLETED or run.outcome is not None:
        return run
    try:
        answer = end_of(parts, run.thread_id, run.run_id, team).answer
    except NotEnded:  # it has: a terminal status is final
        return run
    if answer is None:
        answer = large_answer(parts, run.thread_id, run.run_id, team)
    if len(answer) <= parts.settings.large_state_bytes:
        return dataclasses.replace(run, outcome={"values": orjson.loads(answer)})
    encoded = parts.states.run_for(team, state_jobs.agent_output, answer, structured=run.has_schema)
    return dataclasses.replace(run, outcome=EncodedOutput(encoded))


@dataclass(frozen=True, slots=True)
class AgentRunPage:
    runs: list[AgentRun]
    has_more: bool


def list_agent_runs(parts: Parts, team: str, *, after: str | None, limit: int) -> AgentRunPage:
    """Newest first; `after` is the last one of the page before, and need not be there any more."""
    with parts.database.connection() as conn:
        found = agent_run_rows.list_agent_runs(conn, team, before=after, limit=limit + 1)
    page: list[AgentRun] = []
    size = 0
    for run in found[:limit]:
        page.append(_with_outcome(parts, team, run))
        outcome = page[-1].outcome
        size += len(outcome.encoded) if isinstance(outcome, EncodedOutput) else 0
        if size > parts.settings.max_answer_bytes:
            raise TooMuch(parts.settings.max_answer_bytes)
    return AgentRunPage(page, len(found) > limit)


def cancel_agent_run(parts: Parts, team: str, agent_run_id: str) -> AgentRun:
    """Stop the work, and say what has become of the run when nothing of it runs any more."""
    return _interrupted(parts, team, agent_run_id, _CANCELLED)


def stop_agent_run(parts: Parts, team: str, agent_run_id: str) -> AgentRun:
    """The same, but the run has completed with what it had reached."""
    return _interrupted(parts, team, agent_run_id, STOPPED)


def _interrupted(parts: Parts, team: str, agent_run_id: str, reason: dict[str, str]) -> AgentRun:
    """One that has ended stays as it is."""
    run = get_agent_run(parts, team, agent_run_id)
    if not run.is_active:
        return run
    stop_runs(parts, CancelFilter(thread_id=run.thread_id, run_ids=[run.run_id]), reason)
    return get_agent_run(parts, team, agent_run_id)


def delete_agent_run(parts: Parts, team: str, agent_run_id: str) -> None:
    """Delete a run with its thread and all that it has written. An active one is stopped first."""
    run = get_agent_run(parts, team, agent_run_id)
    try:
        delete_thread(parts, run.thread_id, route="DELETE /agent/runs/{id}")
    except NotFound:  # somebody else was faster
        raise RunNotFound from None
