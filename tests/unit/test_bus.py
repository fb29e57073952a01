"""The Redis side, on fakeredis and on the real server alike, so that the fake cannot drift."""

from __future__ import annotations

import threading
import uuid

import fakeredis
import pytest
import redis

from app.bus.cancel_flag import CancelFlags, CancelNudges
from app.bus.client import Keys
from app.bus.event_log import Event, EventLog, LogEnd
from app.bus.run_feed import RunFeed
from tests.waiting import wait_until


@pytest.fixture(params=["fake", "real"])
def connect(request):
    if request.param == "fake":
        fake = fakeredis.FakeServer()
        clients = []

        def make(_timeout=None):
            clients.append(fakeredis.FakeRedis(server=fake))
            return clients[-1]
    else:
        url = request.getfixturevalue("valkey_url")
        clients = []

        def make(_timeout=None):
            clients.append(redis.Redis.from_url(url, socket_timeout=_timeout))
            return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def keys():
    return Keys(f"{uuid.uuid4().hex}:")


@pytest.fixture
def log(connect, keys):
    return EventLog(connect(5), keys, ttl_seconds=60, max_events=10_000)


def event(claim_no, seq, name="values", data=b"{}"):
    return Event(f"{claim_no}-{seq}", name, data)


def test_events_come_back_in_order_after_a_position(log):
    run_id = uuid.uuid4()
    log.append(run_id, [event(1, n) for n in range(1, 6)])
    assert [e.id for e in log.read_after(run_id, "1-2", count=10)] == ["1-3", "1-4", "1-5"]
    assert [e.id for e in log.read_after(run_id, "0-0", count=1)] == ["1-1"]
    assert log.last_id(run_id) == "1-5"
    assert log.last_id(uuid.uuid4()) == "0-0"


def test_what_a_zombie_writes_is_refused(log):
    run_id = uuid.uuid4()
    log.append(run_id, [event(1, 1), event(2, 1)])
    log.append(run_id, [event(1, 2), event(2, 2), event(2, 2)])
    assert [e.id for e in log.read_after(run_id, "0-0", count=10)] == ["1-1", "2-1", "2-2"]


def test_flags_are_seen_by_poll_and_lowered(connect, keys):
    flags = CancelFlags(connect(5), keys)
    up, down = uuid.uuid4(), uuid.uuid4()
    flags.raise_flags([up], "interrupt")
    assert {up} == flags.raised_flags([up, down])
    flags.lower_flags([up])
    assert set() == flags.raised_flags([up, down])
    assert set() == flags.raised_flags([])


def test_a_nudge_is_heard_and_garbage_is_ignored(connect, keys):
    nudges = CancelNudges(connect(None), keys)
    client = connect(5)
    nudges.wait(0.2)
    run_id = uuid.uuid4()
    client.publish(keys.cancels, "not a run id")
    client.publish(keys.cancels, b"\xff\xfe")
    CancelFlags(client, keys).raise_flags([run_id], "rollback")
    heard = set()
    wait_until(lambda: heard.update(nudges.wait(0.1)) or run_id in heard)
    assert heard == {run_id}
    nudges.close()


@pytest.fixture
def ended():
    return {}


@pytest.fixture
def feed(connect, keys, log, ended):
    def ended_runs(run_ids):
        return {run_id: ended[run_id] for run_id in run_ids if run_id in ended}

    made = RunFeed(connect, keys, log, ended_runs)
    yield made
    made.close()


def test_a_subscriber_gets_what_was_there_and_what_comes_then_the_end(feed, log):
    run_id = uuid.uuid4()
    log.append(run_id, [event(1, 1)])
    subscription = feed.subscribe(run_id)
    assert subscription.next(5).id == "1-1"
    log.append(run_id, [event(1, 2), event(1, 3)])
    assert [subscription.next(5).id for _ in range(2)] == ["1-2", "1-3"]
    log.append_ends([LogEnd(run_id, 1, "success")])
    assert subscription.next(5) is None
    assert subscription.drained
    feed.unsubscribe(subscription)


def test_two_subscribers_at_different_positions_each_get_theirs_once(feed, log):
    run_id = uuid.uuid4()
    log.append(run_id, [event(1, n) for n in range(1, 1201)])
    early, late = feed.subscribe(run_id), feed.subscribe(run_id, after="1-700")
    log.append_ends([LogEnd(run_id, 1, "success")])

    def read(subscription):
        seen = []
        while (found := subscription.next(5)) is not None:
            seen.append(int(found.id[2:]))
        return seen

    assert list(range(701, 1201)) == read(late)
    assert list(range(1, 1201)) == read(early)


def test_a_slow_subscriber_is_bounded_and_loses_nothing(feed, log):
    run_id = uuid.uuid4()
    for first in range(1, 6001, 500):
        log.append(run_id, [event(1, n) for n in range(first, first + 500)])
    subscription = feed.subscribe(run_id)
    log.append_ends([LogEnd(run_id, 1, "success")])
    wait_until(lambda: len(subscription._buffer) >= 2000)
    assert len(subscription._buffer) <= 2500
    seen = []
    while (found := subscription.next(5)) is not None:
        seen.append(int(found.id[2:]))
    assert list(range(1, 6001)) == seen


def test_waiters_are_released_by_the_end_and_read_no_events(feed, log):
    run_id = uuid.uuid4()
    subscription = feed.subscribe(run_id, events=False)
    assert subscription.wait_for_end(0.05) is False
    threading.Timer(0.05, lambda: log.append_ends([LogEnd(run_id, 1, "success")])).start()
    assert subscription.wait_for_end(10)
    assert subscription.position == "0-0"


def test_the_end_is_learned_from_the_rows_when_the_log_was_lost(feed, log, ended):
    run_id = uuid.uuid4()
    log.append(run_id, [event(1, 1)])
    subscription = feed.subscribe(run_id)
    assert subscription.next(5).id == "1-1"
    ended[run_id] = "success"
    assert subscription.next(10) is None
    assert subscription.drained


def test_a_client_that_left_is_released(feed):
    subscription = feed.subscribe(uuid.uuid4())
    threading.Timer(0.05, subscription.leave).start()
    assert subscription.next(10) is None
    assert subscription.client_left
    assert not subscription.drained
