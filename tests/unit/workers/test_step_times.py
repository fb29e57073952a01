"""Test that the time in which a host waited for a core, or was stopped, does not count as a step of
a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from belay_server.domain.runs import Claim
from belay_workers.slots import Kind, SlotTable
from belay_workers.supervision.processes import is_stopped, seconds_without_core
from belay_workers.supervision.step_times import StepTimes
from tests.waiting import wait_until


@pytest.fixture
def slots():
    return SlotTable(4)


def stepping(slots, seconds):
    slot, run_id = slots.take(Kind.HOSTED_RUN), uuid.uuid4()
    slot.claiming(run_id)
    slot.running(Claim(run_id, 1), uuid.uuid4(), 0.0)
    slot.stepping(time.monotonic() - seconds)
    return run_id


def test_the_longest_step_of_each_process_is_returned(slots):
    run_id = stepping(slots, 60)
    stepping(slots, 10)
    slots.take(Kind.HOST)
    steps = StepTimes(lambda _pid: 0.0).measure(slots.read_all())
    assert steps.keys() == {os.getpid()}
    assert steps[os.getpid()].run.run_id == run_id
    assert steps[os.getpid()].seconds >= 60


def test_waits_for_a_core_since_the_step_was_first_seen_do_not_count(slots):
    waited = 100.0
    times = StepTimes(lambda _pid: waited)
    stepping(slots, 60)
    assert times.measure(slots.read_all())[os.getpid()].seconds >= 60
    waited = 150.0
    assert 10 <= times.measure(slots.read_all())[os.getpid()].seconds < 60


def test_a_further_step_is_measured_from_its_own_beginning(slots):
    waited = 100.0
    times = StepTimes(lambda _pid: waited)
    stepping(slots, 60)
    times.measure(slots.read_all())
    slots.free(0)
    waited = 150.0
    stepping(slots, 30)
    assert times.measure(slots.read_all())[os.getpid()].seconds >= 30
    slots.free(0)
    assert times.measure(slots.read_all()) == {}


def test_the_time_in_which_the_process_is_stopped_does_not_count(slots):
    is_stopped = False
    times = StepTimes(lambda _pid: 0.0, lambda _pid: is_stopped)
    stepping(slots, 60)
    before = times.measure(slots.read_all())[os.getpid()].seconds
    is_stopped = True
    began = time.monotonic()
    while time.monotonic() < began + 0.2:
        stopped = times.measure(slots.read_all())[os.getpid()].seconds
    assert before == pytest.approx(stopped, abs=0.001)
    is_stopped = False
    wait_until(lambda: times.measure(slots.read_all())[os.getpid()].seconds > stopped, 10)


def test_a_process_stopped_by_a_signal_is_seen():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        try:
            assert not is_stopped(process.pid)
            process.send_signal(signal.SIGSTOP)
            wait_until(lambda: is_stopped(process.pid), 60)
            process.send_signal(signal.SIGCONT)
            wait_until(lambda: not is_stopped(process.pid), 60)
        finally:
            process.kill()
    assert not is_stopped(process.pid)


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the kernel counts no waits")
def test_the_kernel_counts_how_long_a_process_waits_for_a_core():
    """Three processes share one core until one of them has waited for a second."""
    core = min(os.sched_getaffinity(0))
    spin = f"import os; os.sched_setaffinity(0, [{core}])\nwhile True: pass"
    spinning = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(3)]
    try:
        deadline = time.monotonic() + 60
        while seconds_without_core(spinning[0].pid) < 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        for process in spinning:
            process.kill()
            process.wait()
    assert seconds_without_core(spinning[0].pid) == 0.0
