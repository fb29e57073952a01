"""A webhook call is made for every run that has ended, whichever process dies afterwards."""

from __future__ import annotations

import signal

import pytest

from tests.faults.conftest import mend, signal_tree
from tests.ports import free_port
from tests.receiver import Receiver, receiver

__all__ = ["receiver"]


@pytest.mark.parametrize("point", ["P9", "P10", "P11"])
def test_a_webhook_is_called_although_the_child_dies_at_the_end(cluster, probe, receiver, point):
    cluster.plan(point, "kill")
    _, run_id, _ = probe.start(webhook=f"{receiver.url}/hook")
    assert receiver.wait_for(run_id)["status"] == "success"
    assert cluster.injected()


@pytest.mark.long
def test_a_webhook_call_survives_the_death_of_every_worker(cluster, probe, client):
    port = free_port()
    thread_id, run_id, _ = probe.start(webhook=f"http://127.0.0.1:{port}/hook")
    client.runs.join(thread_id, run_id)
    for worker in cluster.workers:
        signal_tree(worker, signal.SIGKILL)
        worker.kill()
    mend(cluster)
    late = Receiver(port)
    try:
        # Longer than the lease of a call that was in progress.
        assert late.wait_for(run_id, seconds=80)["values"]["done"]
    finally:
        late.close()


@pytest.mark.long
def test_a_webhook_call_survives_a_restart_of_postgres(cluster, probe, receiver):
    receiver.statuses = [500]
    _, run_id, _ = probe.start(webhook=f"{receiver.url}/hook")
    receiver.wait_for(run_id)
    cluster.postgres.stop()
    cluster.postgres.start()
    assert receiver.wait_for(run_id, 2)["status"] == "success"
