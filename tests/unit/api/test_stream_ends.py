"""Test streams whose end is found in Postgres before the event log has the run's last event."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from uuid import uuid4

import pytest

from belay_server.api.streaming import runs as run_stream
from belay_server.api.streaming.clients import StreamClient
from belay_server.api.streaming.runs import FollowedRun
from belay_server.bus.event_log import Event, Position
from belay_server.db.runs import StoredEnd
from belay_server.domain.runs import RunStatus
from belay_server.runtime.turns import Turns

ERROR = {"error": "TimeoutError", "message": "too long"}
SAID = b'event: error\ndata: {"error":"TimeoutError","message":"too long"}\n\n'
VALUES = Event(Position(1, 1), "values", b"{}")
OF_THE_LOG = Event(Position(1, 2), "error", b'{"error":"TimeoutError","message":"too long"}')


class Ended:
    """A subscription with these remaining events, followed by the end that the sweep found."""

    def __init__(self, *events: Event, status: str | None = None, misses_end: bool = False) -> None:
        self._events = list(events)
        self.end_status = status
        self.misses_end = misses_end
        self.client_left = False

    @property
    def drained(self) -> bool:
        return not self._events

    ended = drained

    def take(self, _until: float) -> list[Event]:
        events, self._events = self._events, []
        return events

    def leave(self) -> None: ...


@pytest.fixture
def stream(monkeypatch):
    """Return a function that returns the whole stream of a run with this end in Postgres."""

    def whole(subscription: Ended, *, is_over: bool = False) -> bytes:
        end = StoredEnd(status=subscription.end_status, error=ERROR, interrupts=None)
        monkeypatch.setattr(run_stream.run_rows, "run_end", lambda *_: end)
        parts = SimpleNamespace(
            settings=SimpleNamespace(heartbeat_seconds=60.0),
            event_log=None,
            database=SimpleNamespace(connection=nullcontext),
            feed=SimpleNamespace(unsubscribe=lambda _: None),
        )
        follow = FollowedRun(uuid4(), uuid4(), resumable=False, cancel_on_disconnect=False)
        share = SimpleNamespace(caller=None, release=lambda: None)
        client = StreamClient(lambda _on_leave: lambda: False, share, Turns())
        chunks = run_stream._stream(parts, follow, client, subscription, is_over)
        return b"".join(chunks)

    return whole


@pytest.mark.parametrize("status", [RunStatus.ERROR, RunStatus.TIMEOUT])
def test_an_error_that_is_missing_from_the_log_is_sent_from_the_row(stream, status):
    assert stream(Ended(VALUES, status=status)) == b"event: values\ndata: {}\n\n" + SAID


def test_an_error_that_is_in_the_log_is_sent_once(stream):
    assert stream(Ended(VALUES, OF_THE_LOG, status=RunStatus.TIMEOUT)).count(SAID) == 1


def test_a_client_that_connects_after_the_end_is_sent_no_error(stream):
    assert stream(Ended(status=RunStatus.TIMEOUT), is_over=True) == b""


def test_a_successful_run_has_no_final_event(stream):
    assert stream(Ended(VALUES, status=RunStatus.SUCCESS)) == b"event: values\ndata: {}\n\n"


def test_a_stream_states_that_events_before_its_end_are_missing(stream):
    whole = stream(Ended(VALUES, status=RunStatus.SUCCESS, misses_end=True))
    assert whole == b"event: values\ndata: {}\n\n: gap\n"
