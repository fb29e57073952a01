"""Runs begin wherever a place of their kind is free: in a host, or in a process of their own."""

from __future__ import annotations

import pytest
from langgraph_sdk import get_sync_client

from tests.faults.conftest import Probe

pytestmark = pytest.mark.long
PROCESSES = 2
WORKERS = 2


@pytest.fixture
def probe(make_cluster, tmp_path):
    """Yield a probe of two workers, whose lost doorbells are not rung again in this test."""
    cluster = make_cluster(
        workers=WORKERS,
        concurrency=PROCESSES,
        BELAY_ISOLATION="auto",
        BELAY_SHARED_CONCURRENCY="4",
        BELAY_RERING_SECONDS="600",
    )
    with get_sync_client(url=cluster.url) as client:
        yield Probe(cluster, client, tmp_path / "history")


def test_a_run_waits_for_no_run_of_the_other_kind(probe):
    # One after the other, so that no worker is chosen because the other one is still busy.
    first = [probe.start(graph="sync_probe", seconds=600) for _ in range(WORKERS * PROCESSES)]
    pids = {probe.wait_for(tag, "s1").pid for _, _, tag in first}
    assert len(pids) == WORKERS * PROCESSES, "each has a process, and none waits beside a free one"
    waiting = [probe.start(graph="sync_probe", seconds=600) for _ in range(20)]
    for run in [probe.start(graph="probe") for _ in range(10)]:
        probe.assert_done_once(*run)
    for thread_id, run_id, _ in waiting:
        assert probe.status(thread_id, run_id) == "pending"
    for thread_id, run_id, _ in [*waiting, *first]:
        probe.client.runs.cancel(thread_id, run_id, wait=True)
        assert probe.status(thread_id, run_id) == "interrupted"
    probe.assert_done_once(*probe.start(graph="sync_probe"))
