"""Test one tick of the sweeper on real rows, with a doorbell and an event log that only record."""

from __future__ import annotations

import psycopg
import pytest

from belay_server.configuration.settings import Settings
from belay_server.graphs.project.langgraph_json import read_project
from belay_server.graphs.registry import GraphRegistry
from belay_server.services.assistant_cache import AssistantCache
from belay_server.services.parts import RunParts
from belay_workers.background.sweeper import Sweeper
from belay_workers.counters import Counters
from tests.servers import PROJECT


class Doorbell:
    def __init__(self, waiting: int) -> None:
        self.depth = waiting
        self.rung: list = []

    def waiting(self, queue: str) -> int:
        return self.depth

    def queue_of(self, queue: str, graph_id: str) -> str:
        return f"{queue} of {graph_id}"

    def ring(self, run) -> bool:
        self.rung.append(run.run_id)
        return True


class Silent:
    def append_ends(self, ends) -> None: ...

    def lower_flags(self, run_ids) -> None: ...


def sweeper(doorbell: Doorbell, counters: Counters | None = None) -> Sweeper:
    settings = Settings.from_environ(
        {"DATABASE_URL": "postgresql://nowhere/", "REDIS_URL": "redis://nowhere/"}
    )
    parts = RunParts(
        settings=settings,
        graphs=GraphRegistry(read_project(PROJECT)),
        doorbell=doorbell,
        cancel_flags=Silent(),
        event_log=Silent(),
        assistant_cache=AssistantCache(),
        count_unstarted=lambda _status: None,
    )
    return Sweeper(parts, "the test", counters)


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
    # Whether or not a doorbell was sent, the next tick does not return the run again.
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


class AwayDoorbell(Doorbell):
    """A doorbell whose broker is unavailable."""

    def __init__(self) -> None:
        super().__init__(0)

    def waiting(self, queue: str):
        return None

    def ring(self, run) -> bool:
        self.rung.append(run.run_id)
        return False


def test_a_doorbell_that_could_not_be_sent_is_due_again_at_once(rows, overdue):
    for _ in range(10):
        away = AwayDoorbell()
        sweeper(away)._ring_due(rows.conn)
        assert len(away.rung) == 3
    there = Doorbell(0)
    sweeper(there)._ring_due(rows.conn)
    assert sorted(there.rung) == sorted(overdue)


def test_a_queue_that_lost_its_messages_is_rung_again(rows, overdue):
    """Doorbells that were sent often are postponed for long. Then the broker is flushed."""
    rows.conn.execute("UPDATE run SET rings = 9, next_ring_at = now() + interval '60 seconds'")
    busy = Doorbell(3)
    mine = sweeper(busy)
    mine._sweep(rows.conn)
    assert busy.rung == []
    flushed = Doorbell(0)
    sweeper(flushed)._sweep(rows.conn)
    assert sorted(flushed.rung) == sorted(overdue)


def test_a_sweeper_that_cannot_ring_gives_up_its_lease(rows, overdue):
    away, there = sweeper(AwayDoorbell()), sweeper(Doorbell(0))
    away._owner, there._owner = "away", "there"
    rows.conn.execute("DELETE FROM scheduler_lease")
    assert away._holds_lease(rows.conn)
    assert not there._holds_lease(rows.conn)
    away._sweep(rows.conn)
    assert there._holds_lease(rows.conn)
    there._sweep(rows.conn)
    assert not away._holds_lease(rows.conn)
    there._stopping.set()
    rows.conn.execute("DELETE FROM scheduler_lease")


PARTS = (
    "fire_due_crons",
    "_find_lost_doorbells",
    "_ring_due",
    "_take_from_the_gone",
    "_delete_hidden",
    "_expire_threads",
    "delete_expired_items",
)
#: One of each class of errors that a statement may raise, except outages.
STATES = ("0A000", "21000", "22P05", "23505", "40001", "42601", "53200", "54000", "55P03", "57014")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("state", STATES)
def test_an_error_in_one_part_of_a_tick_does_not_stop_the_others(rows, monkeypatch, part, state):
    import belay_workers.background.sweeper

    called = []

    def noting(name, error=None):
        def call(*_args, **_kwargs):
            called.append(name)
            if error is not None:
                raise error("it fails")

        return call

    mine = sweeper(Doorbell(0))
    for name in PARTS:
        error = psycopg.errors.lookup(state) if name == part else None
        where = mine if name.startswith("_") else belay_workers.background.sweeper
        monkeypatch.setattr(where, name, noting(name, error))
    mine._sweep(rows.conn)
    assert called == list(PARTS)


def test_a_lost_run_that_cannot_be_recovered_does_not_delay_the_others(rows, monkeypatch):
    import belay_workers.background.sweeper

    rows.conn.execute("DELETE FROM thread")
    bad, good = rows.running(), rows.running()
    recover = belay_workers.background.sweeper.recover_run

    def refusing(conn, claim, **how):
        if claim.run_id == bad.run_id:
            conn.execute("SELECT jsonb_build_array(repeat('x', 300000000))")
        return recover(conn, claim, **how)

    monkeypatch.setattr(belay_workers.background.sweeper, "recover_run", refusing)
    rows.conn.execute("DELETE FROM scheduler_lease")
    mine = sweeper(Doorbell(0), Counters(memoryview(bytearray(8 * 400)).cast("d")))
    assert mine._holds_lease(rows.conn)
    for run in (bad, good):
        rows.conn.execute(
            "UPDATE run SET lease_expires_at = now() - interval '1 s' * %s WHERE run_id = %s",
            (2 if run is bad else 1, run.run_id),
        )
    mine._take_from_the_gone(rows.conn)
    assert rows.status(good.run_id) == "pending"
    assert rows.status(bad.run_id) == "running"
    assert mine._lost_runs.put_off() == [bad.run_id]
    rows.conn.execute("DELETE FROM thread")
    rows.conn.execute("DELETE FROM scheduler_lease")
