"""Test that the event writer sends events to Redis in order, in batches, and blocks no graph."""

from __future__ import annotations

import threading
import time
import uuid

import pytest
import redis

from belay_server.bus.event_log import Position, Started
from belay_server.domain.runs import Claim
from belay_workers.execution import event_writer
from belay_workers.execution.event_writer import EventWriter


class Log:
    """An event log that records what is appended. It may be slow or unavailable."""

    def __init__(self) -> None:
        self.appends: list[tuple] = []
        self.round_trips = 0
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.is_away = False
        #: How many appends fail before the next one succeeds.
        self.failures = 0

    def append_batches(self, batches) -> None:
        self.may_go_on.wait(10)
        self.failures -= 1
        if self.is_away or self.failures >= 0:
            raise redis.ConnectionError("away")
        self.round_trips += 1
        self.appends += [(batch.run_id, list(batch.events), batch.started) for batch in batches]

    @property
    def events(self):
        return [(e.position, e.name) for _, events, _ in self.appends for e in events]


@pytest.fixture
def log():
    return Log()


@pytest.fixture
def writer(log):
    return EventWriter(log)


def claim(number=1):
    return Claim(uuid.uuid4(), number)


def test_events_are_numbered_and_written_in_order_with_few_appends(writer, log):
    events = writer.of_run(claim(3))
    for n in range(5_000):
        events.emit(f"e{n}", b"{}")
    assert events.flush(10)
    assert log.events == [(Position(3, n + 1), f"e{n}") for n in range(5_000)]
    assert len(log.appends) < 50


def test_the_first_event_does_not_wait_for_others(writer, log):
    events = writer.of_run(claim())
    events.emit("first", b"{}")
    deadline = time.monotonic() + 5
    while not log.appends:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_flush_ends_when_all_is_written_and_not_before(writer, log):
    events = writer.of_run(claim())
    assert events.flush(0.1)
    log.may_go_on.clear()
    events.emit("e", b"{}")
    assert not events.flush(0.2)
    log.may_go_on.set()
    assert events.flush(10)
    assert log.events == [(Position(1, 1), "e")]


def test_flushes_and_emits_from_many_threads_lose_nothing(writer, log):
    events = writer.of_run(claim())
    lock = threading.Lock()
    emitted = 0

    def work():
        nonlocal emitted
        for n in range(300):
            with lock:  # in production only the event loop's thread emits
                events.emit("e", b"{}")
                emitted += 1
            if n % 7 == 0:
                assert events.flush(10)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert events.flush(10)
    assert [position.seq for position, _ in log.events] == list(range(1, emitted + 1))


def test_runs_share_no_append_and_the_start_is_sent_once(writer, log):
    first, second = claim(1), claim(2)
    started = Started(uuid.uuid4(), resumable=True)
    log.may_go_on.clear()
    events = writer.of_run(first, started)
    events.emit("a", b"{}")
    events.emit("b", b"{}")
    log.may_go_on.set()
    assert events.flush(10)
    events.emit("c", b"{}")
    assert events.flush(10)
    others = writer.of_run(second)
    others.emit("d", b"{}")
    assert others.flush(10)
    assert {run_id for run_id, _, _ in log.appends} == {first.run_id, second.run_id}
    assert [said for _, _, said in log.appends if said is not None] == [started]
    assert log.appends[0][2] == started


def test_events_of_many_runs_share_a_round_trip(writer, log):
    log.may_go_on.clear()
    runs = [writer.of_run(claim(number)) for number in range(1, 51)]
    for number in range(20):
        for run in runs:
            run.emit(f"e{number}", b"{}")
    log.may_go_on.set()
    for run in runs:
        assert run.flush(10)
        mine = [
            event
            for run_id, events, _ in log.appends
            if run_id == run.claim.run_id
            for event in events
        ]
        assert [event.name for event in mine] == [f"e{number}" for number in range(20)]
    assert log.round_trips <= 5


def test_a_flush_does_not_wait_for_the_events_of_another_run(writer, log):
    busy, done = writer.of_run(claim()), writer.of_run(claim())
    done.emit("e", b"{}")
    assert done.flush(10)
    log.may_go_on.clear()
    busy.emit("e", b"{}")
    assert done.flush(0)
    assert not busy.flush(0.05)
    log.may_go_on.set()
    assert busy.flush(10)


def test_no_event_is_lost_by_a_short_outage_of_redis(writer, log, monkeypatch):
    monkeypatch.setattr(event_writer, "_KEEP_SECONDS", 60.0)
    events = writer.of_run(claim(3))
    log.failures = 3
    for n in range(100):
        events.emit(f"e{n}", b"{}")
    assert events.flush(10)
    assert log.events == [(Position(3, n + 1), f"e{n}") for n in range(100)]


def test_events_are_dropped_after_a_while_without_redis(writer, log, monkeypatch):
    monkeypatch.setattr(event_writer, "_KEEP_SECONDS", 0.3)
    monkeypatch.setattr(event_writer, "_PAUSE_SECONDS", 60.0)
    events = writer.of_run(claim())
    log.is_away = True
    events.emit("lost", b"{}")
    assert events.flush(10)
    log.is_away = False
    events.emit("lost too", b"{}")  # Redis is not tried again at once
    assert events.flush(10)
    assert log.events == []


def test_the_buffer_of_unwritten_events_is_bounded_in_bytes(writer, log, monkeypatch):
    monkeypatch.setattr(event_writer, "_MOST_BYTES", 1_000)
    events = writer.of_run(claim())
    log.may_go_on.clear()
    for _ in range(100):
        events.emit("e", b"x" * 100)
    log.may_go_on.set()
    assert events.flush(10)
    assert 10 <= len(log.events) <= 20
