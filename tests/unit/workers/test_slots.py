from __future__ import annotations

import os
import signal
import uuid

import pytest

from belay_server.domain.runs import Claim
from belay_workers.slots import Kind, Phase, SlotTable, StopReason


def test_a_slot_shows_its_process_and_its_run():
    table = SlotTable(2)
    slot = table.take()
    run_id, thread_id = uuid.uuid4(), uuid.uuid4()
    slot.claiming(run_id)
    (reading,) = table.read_all()
    assert (os.getpid(), Phase.CLAIMING, run_id) == (reading.pid, reading.phase, reading.run_id)
    assert not reading.is_busy
    slot.running(Claim(run_id, 3), thread_id, 12.5)
    (reading,) = table.read_all()
    assert (Claim(run_id, 3), thread_id, 12.5) == (
        reading.claim,
        reading.thread_id,
        reading.deadline,
    )
    assert reading.is_busy
    slot.idle()
    assert table.read_all()[0].phase is Phase.IDLE


def test_a_stop_request_applies_only_to_its_claim():
    table = SlotTable(1)
    slot = table.take()
    claim = Claim(uuid.uuid4(), 1)
    table.ask(0, claim, StopReason.CANCEL)
    assert slot.asked(claim) is StopReason.CANCEL
    assert slot.asked(Claim(claim.run_id, 2)) is StopReason.NONE
    assert slot.asked(Claim(uuid.uuid4(), 1)) is StopReason.NONE


def test_the_slot_of_a_dead_process_is_readable_and_reusable_once_freed():
    table = SlotTable(2)
    claim = Claim(uuid.uuid4(), 7)
    child = os.fork()
    if child == 0:
        slot = table.take()
        slot.claiming(claim.run_id)
        slot.running(claim, uuid.uuid4(), 0.0)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (reading,) = table.read_all()
    assert (child, claim) == (reading.pid, reading.claim)
    table.take()
    with pytest.raises(RuntimeError):
        table.take()
    table.free(reading.slot)
    table.take()
    assert {r.pid for r in table.read_all()} == {os.getpid()}


def test_draining_is_seen_by_a_forked_child():
    table = SlotTable(1)
    child = os.fork()
    if child == 0:
        while not table.draining:
            pass
        os._exit(5)
    table.start_draining()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5


def test_each_word_of_a_record_is_read_as_it_was_written():
    """Records are read by a format that stands beside their structure."""
    table = SlotTable(2)
    record = table._records[1]
    for number, (name, kind) in enumerate(record._fields_, start=10):
        if name in ("run_id", "thread_id", "ask_run_id"):
            getattr(record, name)[:] = (number, number + 1)
        elif name not in ("phase", "kind"):
            setattr(record, name, kind(number).value)
    record.phase, record.kind = Phase.FINISHING, Kind.HOSTED_RUN
    reading = table.read(1)
    assert table.read_all() == [reading]
    assert reading.run_id.int == record.run_id[0] << 64 | record.run_id[1]
    assert reading.thread_id.int == record.thread_id[0] << 64 | record.thread_id[1]
    assert (reading.slot, reading.phase, reading.kind) == (1, Phase.FINISHING, Kind.HOSTED_RUN)
    plain = set(reading._fields) - {"slot", "phase", "kind", "run_id", "thread_id"}
    assert {name: getattr(reading, name) for name in plain} == {
        name: getattr(record, name) for name in plain
    }
    assert table.busy_claims() == [reading.claim]
