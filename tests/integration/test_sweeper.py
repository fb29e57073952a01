"""What the sweeper does in one tick, on real rows, with an announcer that only listens."""

from __future__ import annotations

import pytest

from app.graphs.project import read_project
from app.graphs.registry import GraphRegistry
from app.services.known_assistants import KnownAssistants
from app.services.parts import RunParts
from app.settings import Settings
from tests.servers import PROJECT
from workers.sweeper import Sweeper
from workers.tallies import Tally


class Doorbell:
    def __init__(self, waiting: int) -> None:
        self.depth = waiting
        self.rung: list = []

    def waiting(self, queue: str) -> int:
        return self.depth

    def ring(self, run_id, queue: str) -> bool:
        self.rung.append(run_id)
        return True


class Silent:
    def append_ends(self, ends) -> None: ...

    def lower_flags(self, run_ids) -> None: ...


def sweeper(doorbell: Doorbell, tally: Tally | None = None) -> Sweeper:
    settings = Settings.from_environ(
        {"DATABASE_URL": "postgresql://nowhere/", "REDIS_URL": "redis://nowhere/"}
    )
    parts = RunParts(
        settings=settings,
        graphs=GraphRegistry(read_project(PROJECT)),
        doorbell=doorbell,
        cancel_flags=Silent(),
        event_log=Silent(),
        known_assistants=KnownAssistants(),
        count_unstarted=lambda _status: None,
    )
    return Sweeper(parts, "the test", tally)


@pytest.fixture
def overdue(rows):
    rows.conn.execute("DELETE FROM thread")
    made = [rows.pending().run_id for _ in range(3)]
    rows.conn.execute("UPDATE run SET next_ring_at = now()")
    return made


@pytest.mark.parametrize(("waiting", "rings"), [(0, 3), (999, 3), (1_000, 0), (100_000, 0)])
def test_a_queue_whose_workers_are_busy_is_not_rung_again(rows, overdue, waiting, rings):
    doorbell = Doorbell(waiting)
    sweeper(doorbell)._ring_due(rows.conn)
    assert len(doorbell.rung) == rings
    # Rung or not, it is not looked at again at once.
    sweeper(doorbell)._ring_due(rows.conn)
    assert len(doorbell.rung) == rings


def test_a_tick_takes_a_bounded_number_of_a_large_backlog(rows, overdue):
    rows.conn.execute(
        """
        WITH t AS (INSERT INTO thread (thread_id)
                   SELECT gen_random_uuid() FROM generate_series(1, 1000) RETURNING thread_id)
        INSERT INTO run (run_id, thread_id, assistant_id, graph_id, queue, multitask_strategy,
                         next_ring_at)
        SELECT gen_random_uuid(), t.thread_id, gen_random_uuid(), 'counter', 'runs', 'enqueue',
            now()
        FROM t
        """
    )
    doorbell = Doorbell(0)
    sweeper(doorbell)._ring_due(rows.conn)
    assert len(doorbell.rung) == 200
    rows.conn.execute("DELETE FROM thread")
