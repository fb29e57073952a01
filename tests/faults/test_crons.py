"""Crons fire while every slot of every worker is taken, and after the sweeping worker has died."""

from __future__ import annotations

import signal
from datetime import datetime

import pytest

from tests.faults.conftest import mend, signal_tree
from tests.waiting import wait_until

EVERY_SECOND = "* * * * * *"


@pytest.fixture
def busy(probe, client):
    """Fill every slot of the cluster with a long run."""
    runs = [probe.start(seconds=60, graph="probe") for _ in range(6)]
    for _, _, tag in runs:
        probe.wait_for(tag, "s1")
    yield
    client.runs.cancel_many(status="all")


@pytest.fixture
def cron(client):
    thread_id = client.threads.create()["thread_id"]
    made = client.crons.create_for_thread(
        thread_id, "counter", schedule=EVERY_SECOND, input={"count": 1}
    )
    yield thread_id
    client.crons.delete(made["cron_id"])


def created(client, thread_id):
    """Return when the cron's runs were created, oldest first."""
    runs = client.runs.list(thread_id, limit=100)
    return [datetime.fromisoformat(run["created_at"]) for run in reversed(runs)]


def test_a_cron_fires_while_every_slot_is_busy(client, busy, cron):
    wait_until(lambda: len(created(client, cron)) >= 4, 30, "four runs")


@pytest.mark.long
def test_a_cron_continues_after_every_worker_was_killed(cluster, client, cron):
    wait_until(lambda: created(client, cron), 30, "the first run")
    for worker in cluster.workers:
        signal_tree(worker, signal.SIGKILL)
        worker.kill()
    before = len(created(client, cron))
    mend(cluster)
    wait_until(lambda: len(created(client, cron)) >= before + 2, 60, "two more")
    # The missed due times created one run, not a burst of one per second.
    at = created(client, cron)
    assert len(at) <= (at[-1] - at[0]).total_seconds() + 2
