"""Doorbells are lost, duplicated, late and forged; sweepers die, and clocks are wrong."""

from __future__ import annotations

import signal
import uuid
from uuid import UUID

import psycopg
import pytest
import redis
from langgraph_sdk import get_sync_client

from belay_server.configuration.settings import Settings
from belay_server.db.runs import Ringable
from belay_server.doorbell import Doorbell
from tests.faults.conftest import Probe, signal_tree
from tests.long_forms import full_case, long_case
from tests.waiting import wait_until


@pytest.fixture
def doorbell(cluster) -> Doorbell:
    return Doorbell.of(Settings.from_environ(cluster.env))


def test_a_lost_doorbell_is_rung_again(cluster, probe):
    busy = [probe.start(seconds=2.0) for _ in range(6)]  # so that no child is free to take messages
    for run in busy:
        probe.wait_for(run[2], "s1")
    with redis.Redis.from_url(cluster.valkey.url) as bus:
        waiting = []

        def one_is_left() -> bool:
            # Each keeps a child busy for four seconds, should the first ones have ended by now.
            waiting.append(probe.start(seconds=1.0))
            return bus.delete("belay:runs") == 1

        wait_until(one_is_left, what="a doorbell that nobody takes")
    for run in [*busy, *waiting]:
        probe.assert_done_once(*run)
        assert probe.starts(run[2]) == ["s1", "s2", "s3", "s4"]
    assert probe.row(waiting[-1][1])["rings"] >= 1


@pytest.mark.parametrize("times", [2, long_case(100)])
def test_a_doorbell_rung_many_times_starts_one_execution(cluster, probe, doorbell, times):
    run = probe.start(seconds=0.05)
    for _ in range(times):
        assert doorbell.ring(Ringable(UUID(run[1]), "runs", "probe"))
    probe.assert_done_once(*run)
    for _ in range(times):  # and again after its end
        assert doorbell.ring(Ringable(UUID(run[1]), "runs", "probe"))
    other = probe.start()
    probe.assert_done_once(*other)
    assert probe.starts(run[2]) == ["s1", "s2", "s3", "s4"]
    assert probe.row(run[1])["claim_no"] == 1


def test_no_doorbell_is_acknowledged(cluster, probe):
    """On Redis an acknowledgement is a round trip for each message (decision 14)."""
    with redis.Redis.from_url(cluster.valkey.url) as bus:
        bus.config_resetstat()
        for _ in range(3):
            probe.assert_done_once(*probe.start())
        assert "cmdstat_brpop" in bus.info("commandstats")
        assert "cmdstat_zrem" not in bus.info("commandstats")


def test_a_doorbell_for_an_unknown_or_delayed_run_has_no_effect(cluster, probe, doorbell):
    assert doorbell.ring(Ringable(uuid.uuid4(), "runs", "probe"))
    thread_id, run_id, _ = probe.start(after_seconds=60)
    assert doorbell.ring(Ringable(UUID(run_id), "runs", "probe"))
    probe.assert_done_once(*probe.start())
    assert probe.status(thread_id, run_id) == "pending"
    probe.client.runs.cancel(thread_id, run_id)


@pytest.mark.long
@pytest.mark.parametrize("skews", [(600, -600), full_case((-600, 600))])
def test_clocks_that_are_wrong_by_minutes_have_no_effect(make_cluster, tmp_path, skews):
    """A run, and a thread, continue on a worker whose clock differs."""
    cluster = make_cluster(workers=1, FAULT_CLOCK_SKEW=str(skews[0]))
    with get_sync_client(url=cluster.url) as client:
        probe = Probe(cluster, client, tmp_path / "history")
        first = cluster.workers[0]
        thread_id, run_id, tag = probe.start(seconds=0.2)
        probe.wait_for(tag, "s3")
        cluster.plan("P7", "hold")  # after the step, before its writes are stored
        wait_until(cluster.injected, what="the run to be held")
        second = cluster.add_worker(FAULT_CLOCK_SKEW=str(skews[1]))
        second.start()
        cluster.wait_until_up()
        first.kill()
        probe.assert_done_once(thread_id, run_id, tag)
        assert probe.row(run_id)["attempts"] == 2
        assert len(probe.starts(tag)) == 5
        again = probe.start(thread_id=thread_id)
        probe.assert_done_once(*again)
        done = client.threads.get_state(thread_id)["values"]["done"]
        assert done == [f"{t}:s{n}" for t in (tag, again[2]) for n in (1, 2, 3, 4)]
        states = client.threads.get_history(thread_id, limit=100)
        assert states[0]["next"] == []
        assert len(states) == 2 * 6


def sweeper(cluster) -> str | None:
    with psycopg.connect(cluster.postgres.url) as conn:
        row = conn.execute(
            "SELECT owner FROM scheduler_lease WHERE name = 'sweeper' AND expires_at > now()"
        ).fetchone()
    return None if row is None else row[0]


@pytest.mark.parametrize("how", [long_case("dies"), "hangs", long_case("loses its lease")])
def test_another_worker_becomes_the_sweeper_when_the_current_one_fails(cluster, probe, how):
    before = wait_until(lambda: sweeper(cluster), what="a sweeper")
    worker = next(w for w in cluster.workers if f"this worker is {before};" in w.text())
    if how == "dies":
        worker.kill()
    elif how == "loses its lease":
        with psycopg.connect(cluster.postgres.url, autocommit=True) as conn:
            conn.execute("UPDATE scheduler_lease SET owner = 'a thief'")
    else:
        signal_tree(worker, signal.SIGSTOP)
    others = (None, "a thief", *([] if how == "loses its lease" else [before]))
    wait_until(lambda: sweeper(cluster) not in others, 10, "somebody to sweep again")
    due = probe.start(after_seconds=0.5)
    probe.assert_done_once(*due)
    if how == "hangs":
        signal_tree(worker, signal.SIGCONT)
    assert probe.starts(due[2]) == ["s1", "s2", "s3", "s4"]


@pytest.mark.long
def test_due_runs_are_rung_while_every_slot_is_busy_and_start_once(cluster, probe):
    slots = 6
    busy = [probe.start(seconds=2.0) for _ in range(slots)]
    for run in busy:
        probe.wait_for(run[2], "s1")
    due = [probe.start(after_seconds=0.3) for _ in range(5)]

    def rung() -> bool:
        rows = [probe.row(run[1]) for run in due]
        return all(row["rings"] >= 1 for row in rows)

    wait_until(rung, 10, "the due runs to be rung while every slot is busy")
    assert {probe.status(run[0], run[1]) for run in busy} == {"running"}
    for run in [*busy, *due]:
        probe.assert_done_once(*run)
        assert probe.starts(run[2]) == ["s1", "s2", "s3", "s4"]
