"""Test when the pool has children forked, which of them gets a run, and when they end."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
import uuid
from types import SimpleNamespace

import pytest

from belay_server.doorbell import PING_TASK, RUN_TASK, hosted_queue
from belay_workers.pool import run_pool
from belay_workers.pool.child_process import RunSource
from belay_workers.pool.run_pool import RunPool
from belay_workers.pool.zygote import HOST
from tests.waiting import wait_until


class Slots:
    draining = False
    is_supervised = False

    def __init__(self) -> None:
        self.in_use: set[int] = set()

    def note_supervised(self):
        self.is_supervised = True

    def pids(self):
        return list(self.in_use)


class Zygote:
    """Forks nothing: the child's end of each connection is kept for the test."""

    pid = 1

    def __init__(self) -> None:
        self.theirs: list[socket.socket] = []
        self.hosts: list[socket.socket] = []
        self.dead = self.stopped = False

    def fork(self, kind: bytes) -> socket.socket:
        ours, theirs = socket.socketpair()
        theirs.settimeout(5)
        (self.hosts if kind == HOST else self.theirs).append(theirs)
        return ours

    def has_died(self) -> bool:
        return self.dead

    def stop(self) -> None:
        self.stopped = True


class Hub:
    """Celery's event loop: `turn` calls the readers that have something to read."""

    def __init__(self) -> None:
        self.readers = {}

    def add_reader(self, descriptor, reader):
        self.readers[descriptor] = reader

    def remove_reader(self, descriptor):
        self.readers.pop(descriptor, None)

    def call_repeatedly(self, seconds, function):
        pass


class Child:
    """What a child process does, on its end of the connection."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self.connection, self.pid = connection, pid
        connection.sendall(pid.to_bytes(8, sys.byteorder))

    def is_ready(self, *, with_work: bool = False) -> None:
        self.connection.sendall(b"*" if with_work else b"+")

    def run(self) -> uuid.UUID:
        return uuid.UUID(bytes=self.connection.recv(16))

    def has_no_run(self) -> bool:
        self.connection.setblocking(False)
        try:
            return not self.connection.recv(16, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        finally:
            self.connection.settimeout(5)

    def is_told_to_end(self) -> bool:
        return self.connection.recv(16) == b""


class Pool:
    """A pool of three children with an event loop, which the test turns."""

    def __init__(
        self, limit: int = 3, *, threads: bool = False, hosted: int = 0, hosts: int = 0
    ) -> None:
        self.slots, self.zygotes = Slots(), []
        self.done: list[uuid.UUID] = []
        self.accepted: list[int] = []
        shared = ["shared"] if hosted else []
        placement = SimpleNamespace(shared_graphs=shared, hosts=hosts, hosted_of=lambda _: hosted)
        app = SimpleNamespace(slots=self.slots, placement=placement, needs_children=True)
        self.pool = RunPool(limit, app=app, threads=threads)
        self.pool._new_zygote = self._new_zygote
        self.hub = Hub()
        self.pool.start()
        if not threads:
            self.pool.register_with_event_loop(self.hub)
        self.children: list[Child] = []

    def _new_zygote(self) -> Zygote:
        self.was_supervised = self.slots.is_supervised
        self.zygotes.append(Zygote())
        return self.zygotes[-1]

    def forked(self) -> list[Child]:
        """Return the children forked since the last call."""
        theirs = self.zygotes[-1].theirs
        new = [Child(one, 100 + n) for n, one in enumerate(theirs) if n >= len(self.children)]
        self.children += new
        return new

    def ring(self, queue: str | None = None) -> uuid.UUID:
        """Hand over a doorbell from a queue; by default from that of hosts, if there are any."""
        run_id = uuid.uuid4()
        default = hosted_queue("runs") if self.pool.app.placement.shared_graphs else "runs"
        request = {"delivery_info": {"routing_key": queue or default}}
        self.pool.apply_async(
            None,
            args=(RUN_TASK, "id", request, json.dumps([[str(run_id)], {}, {}])),
            accept_callback=lambda pid, _at: self.accepted.append(pid),
            callback=lambda _result: self.done.append(run_id),
        )
        return run_id

    def close(self) -> None:
        self.pool.stop()
        for zygote in self.zygotes:
            for connection in (*zygote.theirs, *zygote.hosts):
                connection.close()

    def turn(self) -> None:
        for _ in range(2):  # the process id, then what follows it
            for reader in list(self.hub.readers.values()):
                reader()
        self.pool.maintain_pool()


@pytest.fixture
def pool():
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture
def clock(monkeypatch):
    """Return a clock that goes forward as the test wants."""
    now = SimpleNamespace(ahead=0.0)
    real = time.monotonic
    monkeypatch.setattr(run_pool.time, "monotonic", lambda: real() + now.ahead)
    return now


def test_the_guardian_does_not_count_the_time_before_the_first_fork(pool):
    """It killed the first child of a worker whose graphs took more than five seconds to load."""
    assert pool.was_supervised


def ready(pool, number=1):
    """Have `number` further children started, and return them."""
    started = []
    for _ in range(number):
        [child] = pool.forked()
        pool.slots.in_use.add(child.pid)
        started.append(child)
        child.is_ready()
        pool.turn()
    return started


def three_children(pool):
    """Return three children: two that have a run, and one that is ready."""
    pool.ring(), pool.ring()
    children = pool.forked()
    for child in children:
        child.is_ready()
        pool.turn()
    children[0].run(), children[1].run()
    return children


def test_one_child_is_kept_ready(pool):
    [first] = ready(pool)
    assert pool.forked() == []
    run_id = pool.ring()
    assert first.run() == run_id
    assert pool.accepted == [100]
    assert len(pool.forked()) == 1


def test_no_more_children_are_forked_than_runs_may_be_executed_at_once(pool):
    rung = [pool.ring() for _ in range(5)]
    children = pool.forked()
    assert len(children) == 3
    for child in children:
        child.is_ready()
    pool.turn()
    assert [child.run() for child in children] == rung[:3]
    children[1].is_ready()
    pool.turn()
    assert pool.done == [rung[1]]
    assert children[1].run() == rung[3]
    assert children[0].has_no_run()


def test_a_ping_needs_no_child(pool):
    done = []
    pool.pool.apply_async(
        None,
        args=(PING_TASK, "id", {}, "[[], {}, {}]"),
        accept_callback=lambda _pid, _at: done.append("accepted"),
        callback=lambda _result: done.append("done"),
    )
    assert done == ["accepted", "done"]


@pytest.mark.parametrize(
    "body", ["", "[]", "[[], {}, {}]", '[["x"], {}, {}]', "[[1], {}, {}]", "null"]
)
def test_a_message_that_is_no_doorbell_is_ignored(pool, body, caplog):
    done = []
    pool.pool.apply_async(
        None,
        args=(RUN_TASK, "id", {}, body),
        accept_callback=lambda _pid, _at: done.append("accepted"),
        callback=lambda _result: done.append("done"),
    )
    assert done == ["accepted", "done"]
    assert "not a doorbell" in caplog.text


def test_the_child_that_was_idle_for_the_shortest_time_gets_the_run(pool):
    children = three_children(pool)
    children[1].is_ready()
    pool.turn()
    children[0].is_ready()
    pool.turn()
    run_id = pool.ring()
    assert children[0].run() == run_id
    assert children[1].has_no_run()


def test_all_but_one_child_end_when_they_are_idle_for_a_minute(pool, clock):
    children = three_children(pool)
    for child in children[:2]:
        child.is_ready()
        pool.turn()
    clock.ahead = 59
    pool.turn()
    assert all(child.has_no_run() for child in children)
    clock.ahead = 61
    pool.turn()
    pool.turn()
    pool.turn()
    assert children[2].is_told_to_end()
    assert children[0].is_told_to_end()
    assert children[1].has_no_run()
    run_id = pool.ring()
    assert children[1].run() == run_id


def test_a_run_is_in_hand_until_the_supervisor_has_seen_to_its_childs_death(pool):
    run_id = pool.ring()
    child, other = pool.forked()
    pool.slots.in_use.add(child.pid)
    child.is_ready()
    pool.turn()
    assert child.run() == run_id
    child.connection.close()
    pool.turn()
    assert pool.done == []
    pool.slots.in_use.clear()
    pool.turn()
    other.is_ready()
    pool.turn()
    assert other.run() == run_id, "it may have died before it claimed the run"
    assert pool.accepted == [child.pid]
    assert pool.done == []
    other.is_ready()
    pool.turn()
    assert pool.done == [run_id]
    following = pool.ring()
    assert other.run() == following


def test_a_run_is_given_to_two_children_at_most(pool, clock):
    run_id = pool.ring()
    for number, child in enumerate(pool.forked()):
        child.is_ready()
        pool.turn()
        assert child.run() == run_id
        child.connection.close()
        pool.turn()
        assert pool.done == ([run_id] if number else [])


def test_a_run_that_a_dead_child_was_to_get_goes_to_another(pool):
    [child] = ready(pool)
    child.connection.close()
    run_id = pool.ring()
    [other, *_] = pool.forked()
    other.is_ready()
    pool.turn()
    assert other.run() == run_id


def test_a_child_that_cannot_start_is_replaced_after_a_second(pool, clock, caplog):
    [child] = pool.forked()
    child.connection.close()
    pool.turn()
    assert pool.forked() == []
    assert "ended at its start" in caplog.text
    clock.ahead = 1.1
    pool.turn()
    assert len(pool.forked()) == 1


def test_a_child_with_work_of_earlier_runs_does_not_end(pool, clock):
    children = three_children(pool)
    children[0].is_ready(with_work=True)
    pool.turn()
    children[1].is_ready()
    pool.turn()
    clock.ahead = 61
    pool.turn(), pool.turn(), pool.turn()
    assert children[2].is_told_to_end()
    assert children[0].has_no_run()
    run_id = pool.ring()
    assert children[1].run() == run_id


def test_a_worker_none_of_whose_children_can_start_ends(pool, clock, monkeypatch):
    monkeypatch.setattr(run_pool.state, "should_stop", None)
    for number in range(5):
        assert run_pool.state.should_stop is None
        [child] = pool.forked()
        child.connection.close()
        pool.turn()
        clock.ahead = 1.1 * (number + 1)
        pool.turn()
    assert run_pool.state.should_stop == 3


def test_a_child_that_hangs_at_its_start_is_killed(pool, clock, monkeypatch):
    killed = []
    monkeypatch.setattr(run_pool.processes, "kill_tree", killed.append)
    [child] = pool.forked()
    pool.turn()
    clock.ahead = 61
    pool.turn()
    assert killed == [child.pid]
    clock.ahead = 63
    pool.turn()
    assert len(pool.forked()) == 1


def test_autoscaling_changes_how_many_runs_are_executed_at_once(pool):
    pool.pool.grow(2)
    for _ in range(9):
        pool.ring()
    assert len(pool.forked()) == 5
    pool.pool.shrink(4)
    assert pool.pool.num_processes == 1


def test_a_draining_worker_forks_no_children(pool):
    pool.slots.draining = True
    pool.ring()
    assert len(pool.forked()) == 1  # the one from the start


def test_the_children_of_a_dead_zygote_are_killed(pool, monkeypatch):
    killed = []
    monkeypatch.setattr(run_pool.processes, "kill_tree", killed.append)
    [child] = ready(pool)
    run_id = pool.ring()
    assert child.run() == run_id
    [starting] = pool.forked()
    pool.zygotes[-1].dead = True
    pool.turn()
    assert killed == [child.pid]
    assert starting.is_told_to_end()
    assert len(pool.zygotes) == 2
    pool.children.clear()
    assert len(pool.forked()) == 1


def test_without_an_event_loop_the_pool_has_its_own_thread():
    pool = Pool(threads=True)
    try:
        [theirs] = wait_until(lambda: pool.zygotes[-1].theirs, 20, "a child")
        runs = []

        def work() -> None:
            source = RunSource(theirs)
            while (run_id := source.next_run(has_work=False)) is not None:
                runs.append(run_id)

        threading.Thread(target=work, daemon=True).start()
        rung = [pool.ring() for _ in range(3)]
        wait_until(lambda: pool.done == rung, 20, "the runs to be over")
        assert runs == rung
    finally:
        pool.close()
    assert pool.zygotes[-1].stopped


# --- hosts ----------------------------------------------------------------------------------


class Host:
    """What a host does, on its end of the connection."""

    def __init__(self, pool: Pool, number: int = 0) -> None:
        self.connection, self.pid = pool.zygotes[-1].hosts[number], 500 + number
        pool.slots.in_use.add(self.pid)
        self.pool = pool
        self.send(b"+", self.pid.to_bytes(16))

    def send(self, kind: bytes, of: bytes = bytes(16)) -> None:
        self.connection.sendall(kind + of)
        self.pool.turn()

    def runs(self, number: int) -> list[uuid.UUID]:
        data = self.connection.recv(16 * number, socket.MSG_WAITALL)
        return [uuid.UUID(bytes=data[at : at + 16]) for at in range(0, len(data), 16)]


@pytest.fixture
def shared():
    """A pool of three children and a host for four runs."""
    pool = Pool(7, hosted=4, hosts=2)
    yield pool
    pool.close()


def test_a_host_gets_the_runs_first_and_a_child_those_of_other_graphs(shared):
    rung = [shared.ring(), shared.ring()]
    host = Host(shared)
    assert host.runs(2) == rung
    assert shared.accepted == [500, 500]
    [child] = ready(shared)
    host.send(b"n", rung[0].bytes)
    assert child.run() == rung[0]
    host.send(b"e", rung[1].bytes)
    assert shared.done == [rung[1]]
    child.is_ready()
    shared.turn()
    assert set(shared.done) == set(rung)


def test_a_run_that_a_host_could_not_claim_is_done_where_all_graphs_share_hosts(shared):
    shared.pool.app.needs_children = False
    run_id = shared.ring()
    host = Host(shared)
    host.send(b"n", run_id.bytes)
    assert shared.done == [run_id]


def test_children_get_what_exceeds_the_hosts(shared):
    host = Host(shared)
    [child] = ready(shared)
    rung = [shared.ring() for _ in range(5)]
    assert host.runs(4) == rung[:4]
    assert child.run() == rung[4]


def test_a_run_of_another_graph_is_given_to_a_child(shared):
    host = Host(shared)
    [child] = ready(shared)
    run_id = shared.ring("runs")
    assert child.run() == run_id
    host.connection.setblocking(False)
    with pytest.raises(BlockingIOError):
        host.connection.recv(16)


def test_messages_are_taken_while_there_is_a_place_of_their_kind(shared):
    host = Host(shared)
    for _ in range(4):
        assert shared.pool.takes(hosted=True)
        shared.ring()
    assert (shared.pool.takes(hosted=True), shared.pool.takes(hosted=False)) == (False, True)
    for _ in range(3):
        assert shared.pool.takes(hosted=False)
        shared.ring("runs")
    assert not shared.pool.takes(hosted=False)
    host.send(b"e", host.runs(1)[0].bytes)
    assert (shared.pool.takes(hosted=True), shared.pool.takes(hosted=False)) == (True, False)
    [child, *_] = shared.forked()
    child.is_ready()
    shared.turn()
    child.run()
    assert not shared.pool.takes(hosted=False)
    child.is_ready()  # its run has ended, and it gets the next one
    shared.turn()
    assert shared.pool.takes(hosted=False)


def test_a_pool_without_hosts_takes_all_messages_for_children(pool):
    for queue in ("runs", hosted_queue("runs"), "runs"):
        assert pool.pool.takes(hosted=True)
        pool.ring(queue)
    assert not pool.pool.takes(hosted=True)
    assert not pool.pool.takes(hosted=False)


def test_a_pool_of_hosts_alone_takes_all_messages_for_them(shared):
    shared.pool.app.needs_children = False
    host = Host(shared)
    rung = [shared.ring(queue) for queue in ("runs", hosted_queue("runs"))]
    assert host.runs(2) == rung
    assert shared.pool.takes(hosted=False)
    shared.ring("runs"), shared.ring("runs")
    assert not shared.pool.takes(hosted=False)
    assert not shared.pool.takes(hosted=True)


def test_the_runs_of_a_dead_host_are_given_to_another_one_once(shared):
    host = Host(shared)
    run_id = shared.ring()
    host.connection.close()
    shared.turn()
    shared.slots.in_use.discard(host.pid)  # its runs have been handed over for recovery
    shared.turn()
    second = Host(shared, 1)
    assert second.runs(1) == [run_id]
    assert shared.accepted == [500]
    second.connection.close()
    shared.turn()
    shared.slots.in_use.discard(second.pid)
    shared.turn()
    assert shared.done == [run_id]


def test_a_worn_host_is_replaced_and_ends_when_its_runs_have_ended(shared):
    host = Host(shared)
    first = shared.ring()
    assert host.runs(1) == [first]
    host.send(b"w")
    following = shared.ring()
    second = Host(shared, 1)
    assert second.runs(1) == [following]
    host.connection.setblocking(False)
    with pytest.raises(BlockingIOError):
        host.connection.recv(16)
    host.send(b"e", first.bytes)
    shared.turn()
    assert host.connection.recv(16) == b""


def test_another_host_is_started_while_one_is_stopped(shared, monkeypatch):
    stopped = set()
    monkeypatch.setattr(run_pool.processes, "is_stopped", stopped.__contains__)
    host = Host(shared)
    stopped.add(host.pid)
    shared.turn()
    run_id = shared.ring()
    second = Host(shared, 1)
    assert second.runs(1) == [run_id]
    stopped.clear()
    shared.turn()
    second.connection.close()
    shared.turn()
    following = shared.ring()
    assert host.runs(1) == [following]


def test_another_host_is_started_when_the_first_has_many_runs(shared, monkeypatch):
    monkeypatch.setattr(run_pool, "_RUNS_OF_A_HOST", 2)
    host = Host(shared)
    rung = [shared.ring(), shared.ring()]
    assert host.runs(2) == rung
    second = Host(shared, 1)
    following = shared.ring()
    assert second.runs(1) == [following]
