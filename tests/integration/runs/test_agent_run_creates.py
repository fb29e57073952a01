"""Test that a retried create makes one agent run, and that a team's limit holds."""

from __future__ import annotations

import dataclasses
import uuid
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import pytest

from belay_server.db import assistants as assistant_rows
from belay_server.db import runs as run_rows
from belay_server.db.assistants import SystemAssistant
from belay_server.db.postgres.pool import Database, open_pool
from belay_server.db.run_cancels import CancelFilter
from belay_server.domain.agent_runs.errors import PreviousRunNotFound, RunNotFound, TooManyRuns
from belay_server.domain.errors import Interrupted
from belay_server.domain.runs import CancelAction
from belay_server.services.agent_runs.lifecycle import (
    AgentRunRequest,
    create_agent_run,
    get_agent_run,
    list_agent_runs,
    options_of_run,
)
from belay_server.services.parts import Parts
from belay_server.services.runs.cancellation import cancel_runs
from belay_server.services.runs.creation import RunRequest, new_id
from belay_server.services.runs.deletion import delete_run
from belay_server.services.threads.records import delete_thread


@pytest.fixture
def parts(run_parts, database_url):
    pool = open_pool(database_url, size=8, pgbouncer=False, name="test")
    database = Database(pool)
    database.transaction(
        lambda conn: assistant_rows.put_system_assistants(
            conn, [SystemAssistant("research", "research")]
        )
    )
    shared = {f.name: getattr(run_parts, f.name) for f in dataclasses.fields(run_parts)}
    states = SimpleNamespace(here=SimpleNamespace(checkpointer=None))
    yield cast(Parts, SimpleNamespace(**shared, database=database, states=states))
    pool.close()


@pytest.fixture
def team():
    return uuid.uuid4().hex


def limited(parts: Any, most: int) -> Any:
    settings = dataclasses.replace(parts.settings, agent_runs_per_team=most)
    return SimpleNamespace(**{**vars(parts), "settings": settings})


def asked(parts: Parts, team: str, **fields: Any) -> AgentRunRequest:
    run_id = new_id()
    fields = {"query": "q", "effort": "auto", **fields}
    options = options_of_run(parts, fields, run_id)
    run = RunRequest(options=options, thread_id=new_id(), request_id="test", new_run_id=run_id)
    return AgentRunRequest(team, fields, run)


class AnswersLost:
    """A database that loses the connection after each of its first commits."""

    def __init__(self, database: Database, lost: int) -> None:
        self.database = database
        self.access = database.access
        self.lost = lost

    def transaction(self, work: Any) -> Any:
        done = self.database.transaction(work)
        if self.lost:
            self.lost -= 1
            raise Interrupted
        return done


def test_a_create_retried_after_a_lost_commit_creates_one_run(parts, team):
    patchy: Any = limited(parts, 1)
    patchy.database = AnswersLost(parts.database, lost=2)
    request = asked(parts, team)
    run = create_agent_run(patchy, request)
    assert (run.id, run.run_id) == (request.id, request.run.new_run_id)
    assert list_agent_runs(parts, team, after=None, limit=10).runs == [run]
    with pytest.raises(TooManyRuns):
        create_agent_run(limited(parts, 1), asked(parts, team))


def test_concurrent_creates_are_accepted_up_to_the_limit_of_the_team(parts, team):
    few = limited(parts, 5)

    def create(_n: int) -> bool:
        try:
            create_agent_run(few, asked(few, team))
        except TooManyRuns:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        accepted = list(pool.map(create, range(40)))
    assert accepted.count(True) == 5
    assert len(list_agent_runs(parts, team, after=None, limit=40).runs) == 5
    # Another team has its own limit.
    create_agent_run(few, asked(few, uuid.uuid4().hex))


def test_a_refused_create_leaves_no_run_and_no_thread(parts, team):
    refusals = (
        (PreviousRunNotFound, parts, asked(parts, team, previousRunId="agent_run_x")),
        (TooManyRuns, limited(parts, 0), asked(parts, team)),
    )
    for error, where, request in refusals:
        with pytest.raises(error):
            create_agent_run(where, request)
        with parts.database.connection() as conn:
            assert run_rows.get_run(conn, request.run.new_run_id) is None
            found = conn.execute(
                "SELECT count(*) FROM thread WHERE thread_id = %s", (request.run.thread_id,)
            ).fetchone()
        assert found == (0,)
    assert list_agent_runs(parts, team, after=None, limit=10).runs == []


def test_an_agent_run_is_deleted_with_its_thread_or_its_run(parts, team):
    first, second = (create_agent_run(parts, asked(parts, team)) for _ in range(2))
    delete_thread(parts, first.thread_id)
    delete_run(parts, second.thread_id, second.run_id)
    for run in (first, second):
        with pytest.raises(RunNotFound):
            get_agent_run(parts, team, run.id)
    assert list_agent_runs(parts, team, after=None, limit=10).runs == []


def test_a_rolled_back_agent_run_is_cancelled_and_frees_its_place(parts, team):
    few = limited(parts, 1)
    run = create_agent_run(few, asked(few, team))
    filter_ = CancelFilter(run_ids=[run.run_id])
    cancel_runs(parts, filter_, CancelAction.ROLLBACK, {"error": "UserRollback", "message": "x"})
    gone = get_agent_run(parts, team, run.id)
    assert (gone.status, gone.stop_reason) == ("cancelled", "cancelled")
    assert gone.ended_at is not None
    create_agent_run(few, asked(few, team))


def test_pages_are_in_the_order_of_creation_under_concurrent_creates(parts, team):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: create_agent_run(parts, asked(parts, team)), range(20)))
    seen, after = [], None
    while True:
        page = list_agent_runs(parts, team, after=after, limit=3)
        seen += [run.id for run in page.runs]
        if not page.has_more:
            break
        after = seen[-1]
    assert seen == sorted((run.id for run in made), reverse=True)
