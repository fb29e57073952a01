"""Test the Redis parts on both fakeredis and a real server, so that the fake cannot differ."""

from __future__ import annotations

import threading
import time
import uuid
from contextlib import contextmanager

import fakeredis
import pytest
import redis

from belay_server.bus.cancel_flag import CancelFlags, CancelNudges
from belay_server.bus.client import Keys
from belay_server.bus.event_log import (
    START,
    Event,
    EventBatch,
    EventLog,
    LogEnd,
    Position,
    Written,
)
from belay_server.bus.open_requests import OpenRequests
from belay_server.bus.run_feed import RunFeed
from belay_server.domain.errors import TooMany
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


@contextmanager
def soon_after(seconds, function):
    """Call a function in another thread during the block, and wait until it has returned: the
    clients that it uses are closed after the test."""
    timer = threading.Timer(seconds, function)
    timer.start()
    yield
    timer.join()


def event(claim_no, seq, name="values", data=b"{}"):
    return Event(Position(claim_no, seq), name, data)


def ids(events):
    return [str(event.position) for event in events]


def soon(seconds=5.0):
    return time.monotonic() + seconds


def read_on(subscription):
    """Return the sequence numbers of all events up to the end."""
    seen = []
    while not subscription.drained:
        events = subscription.take(soon(10))
        assert events or subscription.drained, "nothing came"
        seen += [event.position.seq for event in events]
    return seen


def test_events_are_read_in_order_after_a_position(log):
    run_id = uuid.uuid4()
    log.append(run_id, [event(1, n) for n in range(1, 6)])
    assert ids(log.read_after(run_id, Position(1, 2), count=10).events) == ["1-3", "1-4", "1-5"]
    assert str(log.last_position(run_id)) == "1-5"
    assert log.last_position(uuid.uuid4()) == START


def test_events_appended_together_share_an_entry_and_keep_their_names(connect, keys, log):
    run_id = uuid.uuid4()
    names = ["metadata", "values|child:1", "custom"]
    log.append(run_id, [event(1, n, name, b'{"n":%d}' % n) for n, name in enumerate(names, 1)])
    assert connect(5).xlen(keys.event_log(run_id)) == 1
    found, more = log.read_after(run_id, START, count=10)
    assert [(e.name, e.data) for e in found] == [
        (name, b'{"n":%d}' % n) for n, name in enumerate(names, 1)
    ]
    assert not more


def test_an_entry_is_bounded_and_a_large_event_has_its_own(connect, keys, log):
    run_id = uuid.uuid4()
    large = b'"' + b"x" * 10_000_000 + b'"'
    log.append(run_id, [event(1, 1), event(1, 2, data=large), event(1, 3)])
    log.append(run_id, [event(1, n) for n in range(4, 1204)])
    assert connect(5).xlen(keys.event_log(run_id)) == 3 + 3
    found, more = log.read_after(run_id, START, count=2)
    assert (ids(found), more) == (["1-1", "1-2"], True)
    assert found[1] == Event(Position(1, 2), "values", b"", len(large), b"1-2")
    assert log.read_whole(run_id, found[1]) == event(1, 2, data=large)
    assert log.read_whole(run_id, found[0]) is found[0]
    assert ids(log.read_newest(run_id, count=1)) == [f"1-{n}" for n in range(1004, 1204)]


def test_the_log_keeps_approximately_the_newest_events(connect, keys):
    run_id = uuid.uuid4()
    log = EventLog(connect(5), keys, ttl_seconds=60, max_events=1_000)
    for first in range(1, 50_001, 10):
        log.append(run_id, [event(1, n) for n in range(first, first + 10)])
    log.append_ends([LogEnd(run_id, 1, "success")])
    kept = 0
    position, more = START, True
    while more:
        found, more = log.read_after(run_id, position, count=100)
        kept, position = kept + len(found), found[-1].position
    # Redis trims whole nodes of a stream, which hold up to a hundred entries.
    assert 1_000 <= kept <= 3_500


@pytest.mark.parametrize("text", ["", "1", "1-", "-1", "a-b", "1-2-3", "1-²", "1-2\n", "9" * 40])
def test_an_invalid_position_is_refused(text):
    with pytest.raises(ValueError, match="not an event id"):
        Position.parse(text)


def test_events_of_a_zombie_are_refused(log):
    run_id = uuid.uuid4()
    log.append(run_id, [event(1, 1), event(2, 1)])
    log.append(run_id, [event(1, 2), event(2, 2)])
    log.append(run_id, [event(2, 2)])
    assert ids(log.read_after(run_id, START, count=10).events) == ["1-1", "2-1", "2-2"]


def test_cancel_flags_are_seen_by_polling_and_lowered(connect, keys):
    flags = CancelFlags(connect(5), keys)
    up, down = uuid.uuid4(), uuid.uuid4()
    flags.raise_flags([up], "interrupt")
    assert {up} == flags.raised_flags([up, down])
    flags.lower_flags([up])
    assert set() == flags.raised_flags([up, down])
    assert set() == flags.raised_flags([])


def test_a_nudge_is_received_and_garbage_is_ignored(connect, keys):
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


def test_a_subscriber_gets_past_and_new_events_then_the_end(feed, log):
    run_id = uuid.uuid4()
    log.append(run_id, [event(1, 1)])
    subscription = feed.subscribe(run_id)
    assert ids(subscription.take(soon())) == ["1-1"]
    log.append(run_id, [event(1, 2), event(1, 3)])
    assert ids(subscription.take(soon())) == ["1-2", "1-3"]
    log.append_ends([LogEnd(run_id, 1, "success")])
    assert subscription.take(soon()) == []
    assert subscription.drained
    assert subscription.end_status == "success"
    feed.unsubscribe(subscription)


def test_a_wait_ends_at_its_deadline(feed):
    subscription = feed.subscribe(uuid.uuid4())
    begun = time.monotonic()
    assert subscription.take(begun + 1.5) == []
    assert not subscription.ended
    assert not subscription.wait_for_end(time.monotonic() - 1)


def test_subscribers_at_different_positions_get_their_events_once(feed, log):
    run_id = uuid.uuid4()
    log.append(run_id, [event(1, n) for n in range(1, 1201)])
    early, late = feed.subscribe(run_id), feed.subscribe(run_id, after=Position(1, 700))
    log.append_ends([LogEnd(run_id, 1, "success")])
    assert list(range(701, 1201)) == read_on(late)
    assert list(range(1, 1201)) == read_on(early)


@pytest.mark.parametrize(
    ("size", "most"), [(2, 2_000), (2_000, 132)], ids=["many events", "large events"]
)
def test_a_slow_subscriber_has_a_bounded_buffer_and_loses_no_event(feed, log, size, most):
    run_id = uuid.uuid4()
    for first in range(1, 6001, 500):
        events = [event(1, n, data=b"x" * size) for n in range(first, first + 500)]
        for n in range(0, 500, 50):
            log.append(run_id, events[n : n + 50])
    subscription = feed.subscribe(run_id)
    log.append_ends([LogEnd(run_id, 1, "success")])
    wait_until(lambda: subscription._paused)
    assert len(subscription._buffer) <= most
    assert list(range(1, 6001)) == read_on(subscription)


def test_a_subscriber_that_falls_behind_another_misses_no_event(feed, log):
    run_id = uuid.uuid4()
    slow, fast = feed.subscribe(run_id), feed.subscribe(run_id)
    seen = {slow: [], fast: []}
    for first in range(1, 20_001, 100):
        log.append(run_id, [event(1, n, data=b"x" * 100) for n in range(first, first + 100)])
        seen[fast] += [e.position.seq for e in fast.take(soon())]
        if first % 1_000 == 1:
            seen[slow] += [e.position.seq for e in slow.take(soon())]
    log.append_ends([LogEnd(run_id, 1, "success")])
    for subscription, numbers in seen.items():
        assert numbers + read_on(subscription) == list(range(1, 20_001))


def test_waiters_are_released_by_the_end_and_read_no_events(feed, log):
    run_id = uuid.uuid4()
    subscription = feed.subscribe(run_id, events=False)
    assert subscription.wait_for_end(soon(0.05)) is False
    with soon_after(0.05, lambda: log.append_ends([LogEnd(run_id, 1, "success")])):
        assert subscription.wait_for_end(soon(10))
    assert subscription.position == START


def test_a_waiter_gets_the_small_outcome_that_is_announced_with_the_end(feed, log):
    run_id = uuid.uuid4()
    first, second = (feed.subscribe(run_id, events=False) for _ in range(2))
    following = feed.subscribe(run_id)
    assert first.wait_for_end(soon(0.05)) is False
    answer = b'{"text": "a!b"}'
    with soon_after(0.05, lambda: log.append_ends([LogEnd(run_id, 1, "success", answer=answer)])):
        assert first.wait_for_end(soon(10))
    assert second.wait_for_end(soon(10))
    assert (first.answer, second.answer, following.answer) == (answer, answer, b"")


@pytest.mark.parametrize(
    ("emitted", "after", "misses_end"),
    [
        (2, Position(0, 0), False),
        (3, Position(0, 0), True),
        (2, Position(1, 2), False),
        (3, Position(1, 2), True),
        (None, Position(0, 0), False),
    ],
)
def test_a_subscriber_learns_that_events_before_the_end_are_missing(
    feed, log, emitted, after, misses_end
):
    run_id = uuid.uuid4()
    log.append(run_id, [event(1, 1), event(1, 2)])
    log.append_ends([LogEnd(run_id, 1, "success", emitted=emitted)])
    subscription = feed.subscribe(run_id, after=after)
    while not subscription.drained:
        subscription.take(time.monotonic() + 10)
    assert subscription.misses_end is misses_end


def test_all_events_of_the_last_attempt_may_be_missing(feed, log):
    run_id = uuid.uuid4()
    log.append(run_id, [event(1, 1)])
    log.append_ends([LogEnd(run_id, 2, "success", emitted=1)])
    subscription = feed.subscribe(run_id)
    while not subscription.drained:
        subscription.take(time.monotonic() + 10)
    assert subscription.misses_end


def test_events_that_are_written_again_are_in_the_log_once(log):
    run_id, written = uuid.uuid4(), Written()
    batch = EventBatch(run_id, [event(1, 1), event(1, 2)], written)
    log.append_batches([batch])
    log.append_batches([batch, EventBatch(run_id, [event(1, 3)], written)])
    assert ids(log.read_newest(run_id, count=10)) == ["1-1", "1-2", "1-3"]


def test_the_end_is_read_from_the_rows_when_the_log_was_lost(feed, log, ended):
    run_id = uuid.uuid4()
    log.append(run_id, [event(1, 1)])
    subscription = feed.subscribe(run_id)
    assert ids(subscription.take(soon())) == ["1-1"]
    ended[run_id] = "success"
    while not subscription.drained:
        assert subscription.take(soon(10)) == []
    assert subscription.misses_end  # it cannot be known that none is missing


def test_a_run_that_is_not_yet_accepted_is_not_taken_for_a_deleted_one(feed, log, ended):
    run_id = uuid.uuid4()
    ended[run_id] = None
    subscription = feed.subscribe(run_id, has_row=False)
    assert subscription.take(soon(2.5)) == []
    assert not subscription.ended
    subscription.has_row = True
    assert subscription.wait_for_end(soon(10))


def test_a_client_that_disconnects_is_released(feed):
    subscription = feed.subscribe(uuid.uuid4())
    with soon_after(0.05, subscription.leave):
        assert subscription.take(soon(10)) == []
    assert subscription.client_left
    assert not subscription.drained


# --- open requests -----------------------------------------------------------------------------


@pytest.fixture
def new_process(connect, keys):
    """Yield a function that creates the request counter of another web process."""
    made = []

    def make(most=2, place_seconds=0.6):
        made.append(OpenRequests(connect(5), keys, most, place_seconds=place_seconds))
        return made[-1]

    yield make
    for process in made:
        process.close()


def places(connect, keys, caller="ann"):
    return connect(5).zcard(keys.open_requests(caller))


def test_open_requests_are_counted_over_all_processes(connect, keys, new_process):
    one, two = new_process(place_seconds=30), new_process(place_seconds=30)
    leave = one.enter("ann")
    two.enter("ann")
    for process in (one, two):
        with pytest.raises(TooMany, match="2 requests open"):
            process.enter("ann")
    two.enter("bob")
    leave()
    two.enter("ann")
    assert places(connect, keys) == 2


def test_only_the_open_requests_of_a_dead_process_expire(new_process):
    living, dead = new_process(), new_process()
    living.enter("ann")
    dead.enter("ann")
    dead.close()
    wait_until(lambda: _enters(living), 10, "a place to be free")
    assert not _enters(living)


def _enters(process):
    try:
        process.enter("ann")
    except TooMany:
        return False
    return True


def test_open_requests_are_registered_again_after_redis_is_flushed(connect, keys, new_process):
    process = new_process()
    leave = process.enter("ann")
    process.enter("ann")
    connect(5).delete(keys.open_requests("ann"))
    wait_until(lambda: places(connect, keys) == 2, 10, "both places")
    leave()
    assert places(connect, keys) == 1


def test_without_redis_each_process_counts_its_own_open_requests(keys, caplog):
    server = fakeredis.FakeServer()
    with fakeredis.FakeRedis(server=server) as client:
        process = OpenRequests(client, keys, 2, place_seconds=0.3)
        leave = process.enter("ann")
        server.connected = False
        process.enter("ann")
        assert not _enters(process)
        leave()
        assert _enters(process)
        warnings = [r for r in caplog.records if "counting those of this process" in r.message]
        assert len(warnings) == 1
        server.connected = True
        wait_until(lambda: client.zcard(keys.open_requests("ann")) >= 2, 10, "both places")
        process.close()


def sizes(log, run_id) -> int:
    """Return the size of the stored events in bytes."""
    total, position, more = 0, START, True
    while more:
        found, more = log.read_after(run_id, position, count=50)
        total += sum(len(event.data) for event in found)
        position = found[-1].position
    return total


def test_the_log_keeps_approximately_the_newest_bytes_of_an_attempt(connect, keys):
    log = EventLog(connect(5), keys, ttl_seconds=60, max_events=10_000, max_bytes=1_000_000)
    run_id = uuid.uuid4()
    for seq in range(1, 101):
        log.append(run_id, [event(1, seq, data=b'"' + b"x" * 100_000 + b'"')])
    assert sizes(log, run_id) <= 1_200_000
    newest = log.read_newest(run_id, count=1)
    assert ids(newest) == ["1-100"]
    # Another attempt is counted separately.
    log.append(run_id, [event(2, 1, data=b'"' + b"x" * 900_000 + b'"')])
    assert log.last_position(run_id) == Position(2, 1)
    assert ids(log.read_after(run_id, Position(1, 95), count=10).events)[0] == "1-96"
    log.append_ends([LogEnd(run_id, 2, "success")])
    assert log.read_newest(run_id, count=1)[0].name == "__end__"


def test_the_bytes_of_attempts_are_counted_separately(connect, keys):
    """The runs of a host are written in turn."""
    log = EventLog(connect(5), keys, ttl_seconds=60, max_events=10_000, max_bytes=1_000_000)
    written = {uuid.uuid4(): Written() for _ in range(3)}
    large = b'"' + b"x" * 100_000 + b'"'
    for seq in range(1, 51):
        log.append_batches(
            [EventBatch(run_id, [event(1, seq, data=large)], of) for run_id, of in written.items()]
        )
    for run_id in written:
        assert sizes(log, run_id) <= 1_200_000
        assert ids(log.read_newest(run_id, count=1)) == ["1-50"]


def test_an_event_larger_than_the_limit_of_the_log_is_kept(connect, keys):
    log = EventLog(connect(5), keys, ttl_seconds=60, max_events=10_000, max_bytes=1_000_000)
    run_id = uuid.uuid4()
    log.append(run_id, [event(1, 1)])
    log.append(run_id, [event(1, 2, data=b'"' + b"x" * 3_000_000 + b'"')])
    assert ids(log.read_newest(run_id, count=1)) == ["1-2"]


def test_the_data_of_large_events_is_deleted_with_their_entries(connect, keys):
    log = EventLog(connect(5), keys, ttl_seconds=60, max_events=10_000, max_bytes=1_000_000)
    run_id = uuid.uuid4()
    large = b'"' + b"x" * 300_000 + b'"'
    for seq in range(1, 11):
        log.append(run_id, [event(1, seq, data=large)])
    kept = connect(5).hkeys(keys.large_events(run_id))
    assert sorted(kept) == [b"1-%d:%d" % (seq, part) for seq in (10, 8, 9) for part in (0, 1)]
    gone = Event(Position(1, 3), "values", b"", len(large), b"1-3")
    assert log.read_whole(run_id, gone) is None
    assert 0 < connect(5).ttl(keys.large_events(run_id)) <= 60
    log.drop(run_id)
    assert not connect(5).exists(keys.large_events(run_id))


def test_a_thread_keeps_the_newest_of_its_large_events(connect, keys):
    log = EventLog(connect(5), keys, ttl_seconds=60, max_events=10_000)
    thread_id = uuid.uuid4()
    datas = [b'"%d' % number + b"x" * 300_000 + b'"' for number in range(40)]
    for data in datas:
        log.append_to_thread(thread_id, "state_update", data)
    events = log.read_after(thread_id, START, count=100).events
    assert len(events) == 40
    found = [log.read_whole(thread_id, one) for one in events]
    assert found[-1].data == datas[-1]
    assert connect(5).hlen(keys.large_events(thread_id)) <= 4 * 2
    assert all(one is None or one.data == data for one, data in zip(found, datas, strict=True))


def test_the_log_of_a_deleted_run_expires_soon(connect, keys):
    log = EventLog(connect(5), keys, ttl_seconds=3600, max_events=100)
    run_id, other = uuid.uuid4(), uuid.uuid4()
    for one in (run_id, other):
        log.append(one, [event(1, 1)])
    log.forget([])
    log.forget([run_id, uuid.uuid4()])
    client = connect(5)
    assert 0 < client.ttl(keys.event_log(run_id)) <= 30
    assert client.ttl(keys.event_log(other)) > 3_000
    # A client that follows the run can still read the events.
    assert ids(log.read_after(run_id, START, count=10).events) == ["1-1"]


def test_a_subscriber_added_during_the_end_look_up_misses_no_event(connect, keys, log):
    """Such a subscriber once got an empty stream: it was ended with the others before any event."""
    run_id = uuid.uuid4()
    log.append(run_id, [event(1, n) for n in range(1, 6)])
    late = []

    class Log(EventLog):
        def read_many(self, positions, *, count):
            found = super().read_many(positions, count=count)
            if not late:
                late.append(feed.subscribe(run_id))
            return found

    slow = Log(connect(5), keys, ttl_seconds=60, max_events=10_000)
    feed = RunFeed(connect, keys, slow, lambda run_ids: dict.fromkeys(run_ids, "success"))
    feed._threads = [threading.Thread()]  # no threads of its own: the test does their work
    early = feed.subscribe(run_id)
    feed._sweep_ends()
    assert not early.ended  # the log may get its end yet
    feed._sweep_ends()
    assert read_on(early) == [1, 2, 3, 4, 5]
    assert not late[0].ended
    feed._sweep_ends()
    assert read_on(late[0]) == [1, 2, 3, 4, 5]


def test_the_replay_of_a_long_log_does_not_delay_another_run(connect, keys, log):
    long, short = uuid.uuid4(), uuid.uuid4()
    for n in range(1, 1001):
        log.append(long, [event(1, n)])
    reads: list[set[uuid.UUID]] = []

    class Log(EventLog):
        def read_many(self, positions, *, count):
            reads.append(set(positions))
            if len(reads) == 3:
                log.append(short, [event(1, 1)])
                feed._poke(short)
            return super().read_many(positions, count=count)

    read = Log(connect(5), keys, ttl_seconds=60, max_events=10_000)
    feed = RunFeed(connect, keys, read, lambda _run_ids: {})
    waiting = feed.subscribe(short, after=START)
    replaying = feed.subscribe(long)
    try:
        assert ids(waiting.take(soon())) == ["1-1"]
        assert any(short in positions for positions in reads[3:5])
        assert replaying.take(soon())
    finally:
        feed.close()


def test_after_a_failed_drop_no_log_is_dropped_for_a_while(keys, monkeypatch):
    """The caller of `drop` holds a database connection meanwhile."""
    tried = []

    class Away:
        def delete(self, *keys):
            tried.append(keys[0])
            raise redis.ConnectionError("away")

    log = EventLog(Away(), keys, ttl_seconds=60, max_events=100)
    with pytest.raises(redis.ConnectionError):
        log.drop(uuid.uuid4())
    log.drop(uuid.uuid4())
    assert len(tried) == 1
    monkeypatch.setattr("belay_server.bus.event_log._NO_DROP_SECONDS", 0.0)
    log._no_drop_before = 0.0
    for _ in range(2):
        with pytest.raises(redis.ConnectionError):
            log.drop(uuid.uuid4())
    assert len(tried) == 3
