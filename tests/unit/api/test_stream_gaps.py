"""Test that a stream marks missing events with a comment, which both SDKs ignore."""

from __future__ import annotations

import uuid

import pytest
from langgraph_sdk.sse import SSEDecoder

from belay_server.api.streaming import runs as run_stream
from belay_server.api.streaming.frames import GAP, HEARTBEAT
from belay_server.api.streaming.protocol import _ProtocolEncoder, line_frame, sse_frame
from belay_server.api.streaming.runs import (
    FollowedRun,
    _frames,
    follows_directly,
    when_redis_answers,
)
from belay_server.api.streaming.threads import _SseEncoder, _without_gaps
from belay_server.bus.client import RedisError
from belay_server.bus.event_log import END_SEQ, NOT_KNOWN, START, Event, Position
from belay_server.bus.run_feed import Subscription


@pytest.mark.parametrize(
    ("last", "position", "follows"),
    [
        (START, Position(1, 1), True),
        (START, Position(1, 2), False),
        (START, Position(3, 1), True),
        (Position(1, 5), Position(1, 6), True),
        (Position(1, 5), Position(1, 8), False),
        (Position(1, 5), Position(2, 1), True),
        (Position(1, 5), Position(2, 3), False),
        (Position(1, 5), Position(1, END_SEQ - 1), True),
        (Position(1, 5), Position(1, END_SEQ), True),
    ],
)
def test_a_missing_event_is_detected_by_its_position(last, position, follows):
    assert follows_directly(last, position) is follows


def test_a_gap_is_marked_by_a_comment_where_events_are_missing():
    follow = FollowedRun(thread_id=uuid.uuid4(), run_id=uuid.uuid4(), resumable=True)
    events = [Event(Position(1, seq), "values", b'{"n":%d}' % seq) for seq in (1, 2, 5, 6)]
    frames = _frames(events, follow, START)
    assert frames.count(GAP) == 1
    assert frames.index(b'"n":2') < frames.index(GAP) < frames.index(b'"n":5')
    assert GAP not in _frames(events[2:], follow, Position(1, 4))
    decoder = SSEDecoder()
    seen = [decoder.decode(line) for line in frames.splitlines()]
    assert [part.data["n"] for part in seen if part is not None] == [1, 2, 5, 6]


def test_a_gap_in_the_stream_of_a_thread_is_marked():
    events = [Event(Position(1, seq), "values", b"{}") for seq in (1, 2, 5, 6, 9)]
    parts = [
        ([event.position.seq for event in part], is_behind_gap)
        for part, is_behind_gap in _without_gaps(events, START)
    ]
    assert parts == [([1, 2], False), ([5, 6], True), ([9], True)]
    assert list(_without_gaps(events[2:3], Position(1, 4))) == [(events[2:3], False)]
    assert list(_without_gaps([], START)) == []
    assert _SseEncoder(frozenset({"run_modes"}), START).gap() == GAP
    assert _SseEncoder(frozenset({"lifecycle"}), START).gap() == b""
    encoders = [_ProtocolEncoder(None, None, None, one, None) for one in (sse_frame, line_frame)]
    assert [encoder.gap() for encoder in encoders] == [GAP, b'{"type":"gap"}\n']


def test_a_stream_begins_with_what_is_new_when_redis_answers_again(monkeypatch):
    """Its position was not known when it was opened."""
    monkeypatch.setattr(run_stream, "_OUTAGE_SECONDS", 0.0)
    answers = [RedisError("no"), RedisError("no"), Position(2, 7)]

    def ask() -> Position:
        answer = answers.pop(0)
        if isinstance(answer, RedisError):
            raise answer
        return answer

    read_again: list[uuid.UUID] = []
    subscription = Subscription(
        uuid.uuid4(), after=NOT_KNOWN, events=True, on_room=read_again.append
    )
    waiting = when_redis_answers(subscription, ask, NOT_KNOWN)
    assert [next(waiting), next(waiting)] == [HEARTBEAT, HEARTBEAT]
    with pytest.raises(StopIteration) as end:
        next(waiting)
    assert end.value.value == Position(2, 7)
    subscription.begin_after(end.value.value)
    assert read_again == [subscription.run_id]
    subscription.deliver([Event(Position(2, seq), "values", b"{}") for seq in (6, 7, 8)])
    assert [event.position.seq for event in subscription.take(0.0)] == [8]
    assert list(when_redis_answers(Ended(), ask, NOT_KNOWN)) == []


class Ended:
    ended = client_left = True
