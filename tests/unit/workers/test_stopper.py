"""Test the stopper without a pool: requests to stop, and the detection of dead child processes."""

from __future__ import annotations

import fcntl
import os
import resource
import select
import signal
import subprocess
import sys
import uuid

import pytest

from belay_server.domain.runs import Claim
from belay_workers.slots import Kind, Phase, SlotTable, StopReason
from belay_workers.supervision import processes, stopped_hosts
from belay_workers.supervision.orphans import Orphans
from belay_workers.supervision.stop_requests import StopRequests
from belay_workers.supervision.stopper import Stopper, _is_dead, _Process
from tests.waiting import wait_until


def claim():
    return Claim(uuid.uuid4(), 1)


def test_a_cancel_replaces_a_drain_and_is_not_replaced_by_a_timeout():
    requests = StopRequests()
    one = claim()
    assert requests.add(one, StopReason.DRAIN)
    assert requests.add(one, StopReason.CANCEL)
    assert not requests.add(one, StopReason.TIMEOUT)
    assert requests.reason_for(one) is StopReason.CANCEL
    assert requests.reason_for(claim()) is StopReason.NONE


def test_a_stop_request_is_forgotten_when_its_run_has_left_its_slot():
    requests = StopRequests()
    here, gone, late = claim(), claim(), claim()
    requests.add(here, StopReason.CANCEL)
    requests.add(gone, StopReason.CANCEL)

    def current():
        requests.add(late, StopReason.CANCEL)  # while the slots are being read
        return {here}

    requests.forget_all_but(current)
    assert here in requests
    assert gone not in requests
    assert late in requests


def test_a_death_is_detected_with_a_high_descriptor_number():
    """A worker with many child processes has higher descriptors than `select` supports."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2048)), hard))
    try:
        process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        first = os.pidfd_open(process.pid)
        pidfd = fcntl.fcntl(first, fcntl.F_DUPFD, 1500)
        os.close(first)
        child = _Process(process.pid, pidfd)
        assert not _is_dead(child)
        process.communicate(b"\n")
        assert _is_dead(child)
        os.close(pidfd)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def sleepers():
    """Three processes that only end when killed."""
    started = [subprocess.Popen(["sleep", "600"]) for _ in range(3)]
    yield started
    for process in started:
        process.kill()
        process.wait()


def running(slots, processes):
    """Give each process a slot with a run. Return the claims."""
    claims = []
    for process in processes:
        slot = slots.take()
        slot._record.pid, slot._record.canary = process.pid, -1
        claims.append(claim())
        slot.claiming(claims[-1].run_id)
        slot.running(claims[-1], uuid.uuid4(), 0.0)
    return claims


def stopper_of(slots, requests, on_death=lambda _: None, isolate=lambda _graph, _why: None):
    return Stopper(
        slots,
        requests,
        grace_seconds=0.0,
        orphans=Orphans(list),
        on_death=on_death,
        on_free=lambda: None,
        isolate=isolate,
        share_again=slots.share_again,
    )


def test_a_host_that_is_given_up_is_killed_and_its_runs_are_not_to_blame(sleepers, monkeypatch):
    monkeypatch.setattr(stopped_hosts, "_LONGEST_SECONDS", -1.0)
    slots, deaths = SlotTable(4), []
    for kind in (Kind.HOST, Kind.HOSTED_RUN):
        slot = slots.take(kind)
        slot._record.pid, slot._record.canary = sleepers[0].pid, -1
    its_claim = claim()
    slot.claiming(its_claim.run_id)
    slot.running(its_claim, uuid.uuid4(), 0.0)
    [other] = running(slots, sleepers[1:2])
    for process in sleepers[:2]:
        os.kill(process.pid, signal.SIGSTOP)
    stopper, watched, poller = stopper_of(slots, StopRequests(), deaths.append), {}, select.poll()

    def one_has_died() -> bool:
        stopper._look_at_canaries_at = 0.0
        stopper._run_once(watched, poller)
        return bool(deaths)

    wait_until(one_has_died, 20, "the death")
    assert [(death.reading.claim, death.reason, death.is_fault) for death in deaths] == [
        (its_claim, StopReason.NONE, False)
    ]
    assert slots.busy_claims() == [other]


def test_a_child_is_killed_once(sleepers, monkeypatch):
    """It takes a moment to die, during which it still has its run."""
    slots, requests = SlotTable(3), StopRequests()
    [its_claim] = running(slots, sleepers[:1])
    killed = []
    monkeypatch.setattr(processes, "stop", lambda _pid: True)
    monkeypatch.setattr(processes, "kill_tree", killed.append)
    monkeypatch.setattr(os, "kill", lambda _pid, _signal: None)
    requests.add(its_claim, StopReason.CANCEL)
    deaths = []
    stopper = stopper_of(slots, requests, deaths.append)
    watched, poller = {}, select.poll()
    for _ in range(4):
        stopper._run_once(watched, poller)
    assert killed == [sleepers[0].pid]
    monkeypatch.undo()
    sleepers[0].kill()
    wait_until(lambda: _is_dead(watched[sleepers[0].pid]), 20, "its death")
    stopper._run_once(watched, poller)
    assert [(death.reading.claim, death.reason) for death in deaths] == [
        (its_claim, StopReason.CANCEL)
    ]


def test_every_run_is_asked_before_one_is_killed(sleepers, monkeypatch):
    """Killing a child with many processes takes long; the others must not wait for it."""
    slots = SlotTable(3)
    claims = running(slots, sleepers)
    done = []
    monkeypatch.setattr(processes, "stop", lambda pid: done.append(("kill", pid)))
    monkeypatch.setattr(os, "kill", lambda pid, _signal: done.append(("ask", pid)))
    requests = StopRequests()
    stopper = stopper_of(slots, requests)
    first, second, third = (process.pid for process in sleepers)
    watched, poller = {}, select.poll()
    for one in claims[:2]:
        requests.add(one, StopReason.CANCEL)
    stopper._run_once(watched, poller)
    assert done == [("ask", first), ("ask", second)]
    requests.add(claims[2], StopReason.CANCEL)
    requests.drain_wakeups()
    stopper._run_once(watched, poller)
    assert done[2:] == [("ask", third), ("kill", first)]
    assert select.select([requests], [], [], 0)[0], "the rest is to be done at once"
    # The first cannot be stopped, as `stop` returned None; the others get their turns.
    stopper._run_once(watched, poller)
    stopper._run_once(watched, poller)
    stopper._run_once(watched, poller)
    assert done[4:] == [("kill", second), ("kill", third), ("kill", first)]
    for child in watched.values():
        os.close(child.pidfd)


# --- hosts ----------------------------------------------------------------------------------


class Host:
    """A host with two runs, and a stopper that sends no signals."""

    def __init__(self, process, monkeypatch) -> None:
        self.process, self.monkeypatch = process, monkeypatch
        self.slots, self.requests = SlotTable(3), StopRequests()
        self.claims, self.records = [], []
        for graph in range(2):
            slot = self.slots.take(Kind.HOSTED_RUN)
            slot._record.pid = process.pid
            self.claims.append(claim())
            slot.claiming(self.claims[-1].run_id)
            slot.running(self.claims[-1], uuid.uuid4(), 0.0, graph=graph)
            self.records.append(slot._record)
        self.done, self.deaths, self.isolated = [], [], []
        monkeypatch.setattr(processes, "stop", lambda _pid: True)
        monkeypatch.setattr(processes, "kill_tree", lambda pid: self.done.append("kill"))
        monkeypatch.setattr(os, "kill", lambda pid, _signal: self.done.append("ask"))
        self.stopper = stopper_of(
            self.slots,
            self.requests,
            self.deaths.append,
            lambda graph, _why: self.isolated.append(graph),
        )
        self.watched, self.poller = {}, select.poll()

    def turn(self) -> None:
        self.stopper._run_once(self.watched, self.poller)

    def dies(self) -> None:
        """Kill the process, and let the stopper notice it."""
        self.monkeypatch.undo()
        self.process.kill()
        wait_until(lambda: _is_dead(self.watched[self.process.pid]), 20, "its death")
        self.turn()


@pytest.fixture
def host(sleepers, monkeypatch):
    return Host(sleepers[0], monkeypatch)


LONG_AGO = 1.0  # on the monotonic clock


def test_a_host_that_is_to_freeze_a_run_is_given_the_time(host):
    host.requests.add(host.claims[0], StopReason.CANCEL)
    for _ in range(3):
        host.turn()
    assert host.done == ["ask"]
    host.records[0].left_at = LONG_AGO  # frozen, and a thread is left
    host.turn()
    assert host.done == ["ask", "kill"]
    assert host.isolated == [0]


def test_a_run_that_blocks_its_host_is_interrupted_before_the_host_is_killed(host, monkeypatch):
    monkeypatch.setattr("belay_workers.supervision.stopper._HOST_SECONDS", 0.0)
    monkeypatch.setattr("belay_workers.supervision.stopper._LONGEST_BLOCKING_SECONDS", 10**9)
    host.records[0].stepping_since = LONG_AGO
    host.requests.add(host.claims[0], StopReason.CANCEL)
    host.turn()
    assert not host.records[0].ask_interrupts
    host.turn()
    assert host.records[0].ask_interrupts
    assert host.done == ["ask", "ask"]
    host.turn()
    assert host.done == ["ask", "ask", "kill"]
    assert set(host.isolated) == {0}


def test_a_stop_that_waits_for_a_run_that_blocks_the_host_is_the_others_fault(host, monkeypatch):
    monkeypatch.setattr("belay_workers.supervision.stopper._LONGEST_BLOCKING_SECONDS", 10**9)
    host.records[1].stepping_since = LONG_AGO
    host.requests.add(host.claims[0], StopReason.CANCEL)
    host.turn()
    host.turn()
    assert host.done == ["ask", "kill"]
    assert set(host.isolated) == {1}
    host.dies()
    found = {death.reading.claim: (death.reason, death.is_fault) for death in host.deaths}
    assert found == {
        host.claims[0]: (StopReason.CANCEL, False),
        host.claims[1]: (StopReason.NONE, False),
    }
    assert host.slots.read_all() == []


def test_a_host_that_is_blocked_for_long_is_killed_and_all_its_runs_are_put_back(host):
    host.records[1].stepping_since = LONG_AGO
    host.turn()
    assert host.done == ["kill"]
    assert set(host.isolated) == {1}
    host.dies()
    assert [(death.reason, death.is_fault) for death in host.deaths] == [
        (StopReason.NONE, False),
        (StopReason.NONE, False),
    ]


def test_a_host_is_not_killed_while_it_writes_the_end_of_a_run(host, monkeypatch):
    """It may wait for Postgres or Redis, like its other runs."""
    monkeypatch.setattr("belay_workers.supervision.stopper._FINISHING_SECONDS", 0.0)
    monkeypatch.setattr("belay_workers.supervision.stopper._FREEZE_SECONDS", 0.0)
    host.records[0].phase = Phase.FINISHING
    host.requests.add(host.claims[0], StopReason.CANCEL)
    for _ in range(4):
        host.turn()
    assert host.done == ["ask"]


def test_graphs_are_isolated_for_a_while_after_the_second_death_of_a_host(host, sleepers):
    """One death may be the platform's doing, which needs memory."""
    host.turn()
    host.dies()
    assert host.isolated == []
    host.process = sleepers[1]
    slot = host.slots.take(Kind.HOSTED_RUN)
    slot._record.pid = host.process.pid
    slot.claiming(uuid.uuid4())
    slot.running(claim(), uuid.uuid4(), 0.0, graph=1)
    host.turn()
    host.dies()
    assert host.isolated == [1]
    host.slots.isolate(1)
    host.turn()
    assert host.slots.isolated() == [1]
    host.stopper._suspicions._isolated_until[1] = LONG_AGO
    host.turn()
    assert host.slots.isolated() == []


def test_no_attempt_counts_that_ended_with_its_host_for_an_unknown_reason(host):
    """Or the runs would be lost with several hosts. But one of them may be the cause."""
    host.records[1].claim_no, host.records[1].attempt = 12, 2
    host.turn()
    host.dies()
    assert {death.reading.claim.run_id: death.is_fault for death in host.deaths} == {
        host.claims[0].run_id: False,
        host.claims[1].run_id: True,
    }


def test_no_attempt_counts_of_the_runs_of_a_host_that_is_given_up(sleepers, monkeypatch):
    """However many attempts have not counted before."""
    monkeypatch.setattr(stopped_hosts, "_LONGEST_SECONDS", -1.0)
    host = Host(sleepers[0], monkeypatch)
    itself = host.slots.take(Kind.HOST)
    itself._record.pid, itself._record.canary = host.process.pid, -1
    for record in host.records:
        record.claim_no, record.attempt, record.canary = 12, 2, -1
    monkeypatch.undo()
    monkeypatch.setattr(stopped_hosts, "_LONGEST_SECONDS", -1.0)
    os.kill(host.process.pid, signal.SIGSTOP)

    def has_died() -> bool:
        host.stopper._look_at_canaries_at = 0.0
        host.turn()
        return bool(host.deaths)

    wait_until(has_died, 20, "the death")
    assert [death.is_fault for death in host.deaths] == [False, False]


def test_the_attempt_of_the_only_run_of_a_host_that_died_counts(host):
    host.slots.free_all(host.process.pid)
    slot = host.slots.take(Kind.HOSTED_RUN)
    slot._record.pid = host.process.pid
    slot.claiming(uuid.uuid4())
    slot.running(claim(), uuid.uuid4(), 0.0)
    host.turn()
    host.dies()
    assert [death.is_fault for death in host.deaths] == [True]


def test_a_host_that_died_while_it_executed_a_run_had_the_fault_of_that(host):
    """Such as of a run that calls `os._exit`."""
    host.records[1].stepping_since = LONG_AGO * 10**9
    host.turn()
    host.dies()
    assert {death.reading.claim: death.is_fault for death in host.deaths} == {
        host.claims[0]: False,
        host.claims[1]: True,
    }


def test_the_runs_that_are_left_in_a_worn_host_are_put_back(host):
    """A frozen run may hold a lock that they wait for."""
    itself = host.slots.take(Kind.HOST)
    itself._record.pid = host.process.pid
    host.turn()
    assert host.done == []
    itself._record.worn_at = LONG_AGO
    host.turn()
    assert host.done == ["ask", "ask"]
    assert {record.ask_reason for record in host.records} == {StopReason.DRAIN}
