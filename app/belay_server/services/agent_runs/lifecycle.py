"""Create, read, end and delete agent runs, the runs of the second HTTP API.

Each agent run has its own thread, which is kept with its outcome until the agent run is deleted.
Creating, cancelling and deleting use the same code as for any other run.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import orjson

from belay_server.configuration.settings import Settings
from belay_server.db import agent_runs as agent_run_rows
from belay_server.db.postgres.connection import Connection
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
    announce_accepted,
    create_in_transaction,
)
from belay_server.services.runs.outcomes import NotEnded, end_of, large_answer
from belay_server.services.threads.records import delete_thread
from belay_server.states import jobs as state_jobs

#: The fields of a request that its graph gets as input, under the same names.
GRAPH_INPUT = ("query", "systemPrompt", "input", "outputSchema", "effort", "previousRunId")
#: The longest time limit of an agent run: an hour.
_LONGEST_SECONDS = 3600.0
_CANCELLED = user_cancel_reason(CancelAction.INTERRUPT, "POST /agent/runs/{id}/cancel")


@dataclass(frozen=True, slots=True)
class AgentRunRequest:
    """A validated request of a team, and the run to create for it."""

    team: str
    #: The request's fields, as they are stored and returned.
    fields: dict[str, Any]
    run: RunRequest

    @property
    def id(self) -> str:
        return agent_run_id(self.run.new_run_id)


def options_of_run(parts: Parts, fields: dict[str, Any], run_id: UUID) -> RunOptions:
    """Return the options of an agent run: a run on a thread that is created for it."""
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


def create_agent_run(parts: Parts, request: AgentRunRequest) -> AgentRun:
    """Accept an agent run. Raises PreviousRunNotFound, PreviousRunNotCompleted, TooManyRuns."""

    def create(conn: Connection) -> tuple[Accepted, AgentRun]:
        # The row exists if the connection was lost during the commit of an earlier attempt.
        is_new = agent_run_rows.get_agent_run(conn, request.team, request.id) is None
        if is_new:
            _check_previous(conn, request)
            _refuse_one_too_many(parts.settings, conn, request.team)
        accepted = create_in_transaction(parts, conn, request.run, request.run.new_run_id)
        if is_new:
            agent_run_rows.insert_agent_run(
                conn,
                request.id,
                team=request.team,
                run_id=accepted.run.run_id,
                thread_id=accepted.run.thread_id,
                request=request.fields,
            )
        return accepted, _found(conn, request.team, request.id)

    accepted: Accepted
    run: AgentRun
    accepted, run = ASK_AGAIN(parts.database.transaction, create)
    announce_accepted(parts, request.run, accepted)
    return run


def _check_previous(conn: Connection, request: AgentRunRequest) -> None:
    previous_id = request.fields.get("previousRunId")
    if previous_id is None:
        return
    previous = agent_run_rows.get_agent_run(conn, request.team, previous_id)
    if previous is None:
        raise PreviousRunNotFound
    if previous.status is not AgentRunStatus.COMPLETED:
        raise PreviousRunNotCompleted


def _refuse_one_too_many(settings: Settings, conn: Connection, team: str) -> None:
    """Raise TooManyRuns when the team has reached its limit. Lock the team first: the count is a
    separate statement, so it sees what the previous holder of the lock has committed."""
    agent_run_rows.lock_team(conn, team)
    most = settings.agent_runs_per_team
    if agent_run_rows.count_active_agent_runs(conn, team) >= most:
        raise TooManyRuns(f"Agent run concurrency limit reached: {most} at once.")


def _found(conn: Connection, team: str, agent_run_id: str) -> AgentRun:
    run = agent_run_rows.get_agent_run(conn, team, agent_run_id)
    if run is None:
        raise RunNotFound
    return run


def get_agent_run(parts: Parts, team: str, agent_run_id: str) -> AgentRun:
    """Return an agent run with its outcome. Raises RunNotFound, also for another team's run."""
    with parts.database.connection() as conn:
        run = _found(conn, team, agent_run_id)
    return _with_outcome(parts, team, run)


def _with_outcome(parts: Parts, team: str, run: AgentRun) -> AgentRun:
    """Add an outcome that the row was read without: a large one; or, when the child process was
    killed, the values that the run had reached, which have not been read from its checkpoint yet.

    Raises TooMany, StateTooLarge.
    """
    if run.status is not AgentRunStatus.COMPLETED or run.outcome is not None:
        return run
    try:
        answer = end_of(parts, run.thread_id, run.run_id, team).answer
    except NotEnded:  # cannot happen: a terminal status is final
        return run
    if answer is None:
        answer = large_answer(parts, run.thread_id, run.run_id, team)
    if len(answer) <= parts.settings.large_state_bytes:
        return dataclasses.replace(run, outcome={"values": orjson.loads(answer)})
    encoded = parts.states.run_for(team, state_jobs.agent_output, answer, structured=run.has_schema)
    return dataclasses.replace(run, outcome=EncodedOutput(encoded))


@dataclass(frozen=True, slots=True)
class AgentRunPage:
    """A page of agent runs, and whether there are older ones."""

    runs: list[AgentRun]
    has_more: bool


def list_agent_runs(parts: Parts, team: str, *, after: str | None, limit: int) -> AgentRunPage:
    """Return a page of agent runs, newest first. `after` is the last id of the previous page; it
    need not exist any more. Raises TooMuch."""
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
    """Cancel an agent run, wait until its work has stopped, and return the run."""
    return _interrupted(parts, team, agent_run_id, _CANCELLED)


def stop_agent_run(parts: Parts, team: str, agent_run_id: str) -> AgentRun:
    """Complete an agent run with the output that it has reached: stop its work, wait until that has
    stopped, and return the run."""
    return _interrupted(parts, team, agent_run_id, STOPPED)


def _interrupted(parts: Parts, team: str, agent_run_id: str, reason: dict[str, str]) -> AgentRun:
    """Interrupt an active run with this reason; return a run that has ended unchanged."""
    run = get_agent_run(parts, team, agent_run_id)
    if not run.is_active:
        return run
    stop_runs(parts, CancelFilter(thread_id=run.thread_id, run_ids=[run.run_id]), reason)
    return get_agent_run(parts, team, agent_run_id)


def delete_agent_run(parts: Parts, team: str, agent_run_id: str) -> None:
    """Delete a run with its thread and everything it has written. Stop an active run first.

    Raises RunNotFound.
    """
    run = get_agent_run(parts, team, agent_run_id)
    try:
        delete_thread(parts, run.thread_id, route="DELETE /agent/runs/{id}")
    except NotFound:  # another request has deleted it
        raise RunNotFound from None
