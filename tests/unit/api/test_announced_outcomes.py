"""Test that a small outcome reaches the clients that wait with the announcement of the end."""

from __future__ import annotations

import uuid
from types import SimpleNamespace

import orjson
import pytest

from belay_server.api.streaming import runs as streams
from belay_server.api.streaming.runs import FollowedRun
from belay_server.bus.event_log import START
from belay_server.bus.run_feed import Subscription
from belay_server.domain.runs import Claim, Ending, RunStatus
from belay_server.services.runs import endings
from belay_server.services.runs.outcomes import End


def ended(monkeypatch, ending):
    """Return the end that is to be announced for an ending that Postgres has accepted."""
    after = SimpleNamespace(ringable=())
    monkeypatch.setattr(endings.claim_rows, "finish_run", lambda *_: after)
    ending = endings.with_small_answer(ending)
    return endings.end_run(None, uuid.uuid4(), Claim(uuid.uuid4(), 1), ending)


@pytest.mark.parametrize("values", [{"count": 1}, {}, None, [1], "text", {"text": "x" * 4_000}])
def test_the_outcome_of_a_successful_run_is_announced(monkeypatch, values):
    end = ended(monkeypatch, Ending(RunStatus.SUCCESS, values=values))
    assert orjson.loads(end.answer) == ({} if values is None else values)


@pytest.mark.parametrize(
    "ending",
    [
        Ending(RunStatus.SUCCESS, values={"text": "x" * 5_000}),
        Ending(RunStatus.SUCCESS, values={"number": 1e16}),
        Ending(RunStatus.SUCCESS, values={}, interrupts={"task": [{"value": 1}]}),
        Ending(RunStatus.INTERRUPTED, values={}),
        Ending(RunStatus.SUCCESS, values_known=False),
        Ending(RunStatus.ERROR, values={}, error={"error": "E", "message": ""}),
    ],
)
def test_other_outcomes_are_read_from_postgres(monkeypatch, ending):
    assert ended(monkeypatch, ending).answer == b""


def test_a_cancel_that_was_accepted_first_replaces_the_outcome(monkeypatch):
    cancelled = object()
    monkeypatch.setattr(endings.claim_rows, "finish_run", lambda *_: None)
    monkeypatch.setattr(endings, "end_cancelled_run", lambda *_: cancelled)
    ending = Ending(RunStatus.SUCCESS, values={"count": 1})
    assert endings.end_run(None, uuid.uuid4(), Claim(uuid.uuid4(), 1), ending) is cancelled


@pytest.fixture
def waiting(monkeypatch):
    """A function that returns what a client gets that waits for a run with this subscription."""

    def wait(subscription, read, *, follows_new_run=True):
        monkeypatch.setattr(streams, "end_of", read)
        parts = SimpleNamespace(
            settings=SimpleNamespace(heartbeat_seconds=60),
            feed=SimpleNamespace(unsubscribe=lambda _: None),
        )
        client = SimpleNamespace(
            watch=lambda _leave: lambda: False,
            share=SimpleNamespace(caller=None, release=lambda: None),
        )
        of_new_run = subscription if follows_new_run else None
        if not follows_new_run:
            parts.feed.subscribe = lambda _run_id, events: subscription
        run_id = subscription.run_id
        followed = FollowedRun(uuid.uuid4(), run_id, resumable=False, subscription=of_new_run)
        return b"".join(streams._wait(parts, followed, client, subscription))

    return wait


def test_an_announced_outcome_is_sent_without_a_read(waiting):
    def read(*_):
        raise AssertionError("the outcome is read")

    subscription = Subscription(uuid.uuid4(), after=START, events=False, on_room=lambda _: None)
    subscription.end(b'{"count":1}')
    assert waiting(subscription, read) == b'{"count":1}'


def test_an_end_without_an_outcome_is_read(waiting):
    subscription = Subscription(uuid.uuid4(), after=START, events=False, on_room=lambda _: None)
    subscription.end()
    assert waiting(subscription, lambda *_: End(b'{"count":2}')) == b'{"count":2}'


def test_an_outcome_announced_for_a_chosen_id_is_read(waiting):
    """It may be that of an earlier run with the same id, which was deleted since."""
    subscription = Subscription(uuid.uuid4(), after=START, events=False, on_room=lambda _: None)
    subscription.end(b'{"count":1}')
    got = waiting(subscription, lambda *_: End(b'{"count":2}'), follows_new_run=False)
    assert got == b'{"count":2}'
