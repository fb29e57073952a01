from __future__ import annotations

import os
import uuid

from belay_server.domain.metrics import CANCEL_LATENCY, CLAIM_LATENCY, RUN_DURATION, RUNS_ENDED
from belay_server.services.runs.endings import RunEnd
from belay_workers.slots import SlotTable


def end(status, **more):
    return RunEnd(uuid.uuid4(), 1, status, **more)


def test_the_counts_of_children_are_summed_and_outlive_them():
    table = SlotTable(2)
    for _ in range(3):
        child = os.fork()
        if child == 0:
            slot = table.take()
            slot.counters.claimed(0.02)
            slot.counters.ended(end("success"), "asked", 1.5)
            os._exit(0)
        os.waitpid(child, 0)
        for reading in table.read_all():
            table.free(reading.slot)
    assert table.counter_table.count(RUNS_ENDED, "success") == 3
    times = table.counter_table.times(RUN_DURATION, "success")
    assert (sum(times.counts), times.sum) == (3, 4.5)
    assert times.counts[RUN_DURATION.buckets.index(2.5)] == 3
    assert table.counter_table.times(CLAIM_LATENCY, "").counts[2] == 3


def test_a_duration_above_every_bucket_is_counted():
    table = SlotTable(1)
    table.counters.claimed(1e6)
    times = table.counter_table.times(CLAIM_LATENCY, "")
    assert times.counts[-1] == 1
    assert len(times.counts) == len(CLAIM_LATENCY.buckets) + 1


def test_only_an_end_by_cancel_has_a_cancel_latency():
    table = SlotTable(1)
    table.counters.ended(end("success"), "asked", 1.0)
    table.counters.ended(end(None, cancel_seconds=0.2), "killed", None)
    assert sum(table.counter_table.times(CANCEL_LATENCY, "asked").counts) == 0
    assert table.counter_table.times(CANCEL_LATENCY, "killed").sum == 0.2
    assert table.counter_table.count(RUNS_ENDED, "rolled_back") == 1
    assert sum(table.counter_table.times(RUN_DURATION, "rolled_back").counts) == 0
