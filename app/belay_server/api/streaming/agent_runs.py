"""Stream the events of an agent run, in the form that clients of Exa's API need: line feeds only,
and one `data` line of ASCII (some of them treat U+2028 as the end of a line)."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Generator, Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any

import orjson

from belay_server.api.streaming.clients import StreamClient
from belay_server.api.streaming.frames import HEARTBEAT, frame
from belay_server.api.streaming.runs import StreamBody, through_outages
from belay_server.bus.run_feed import Subscription
from belay_server.domain.agent_runs.errors import RunNotFound
from belay_server.domain.agent_runs.runs import AgentRun
from belay_server.services.agent_runs.events import AgentRunEvent, created, events_of, started
from belay_server.services.agent_runs.lifecycle import (
    AgentRunRequest,
    create_agent_run,
    get_agent_run,
)
from belay_server.services.parts import Parts


def frame_of(event: AgentRunEvent) -> bytes:
    """Return an event as a server-sent event, its id first as in Exa's documentation."""
    return b"id: %d\n%b" % (event.number, frame(event.name, _encoded(event.data)))


def _encoded(data: dict[str, Any]) -> bytes:
    """Return the data of an event as ASCII. An output that is JSON already is not decoded."""
    output = data.get("output")
    if not isinstance(output, orjson.Fragment):
        return _ascii_json(data)
    others = {name: value for name, value in data.items() if name != "output"}
    return _ascii_json(others)[:-1] + b',"output":' + orjson.dumps(output) + b"}"


def _ascii_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode("ascii")


def replay(run: AgentRun, after: int) -> Iterator[bytes]:
    """Yield the frames of the events so far whose number is greater than `after`. Do not wait for
    an active run."""
    return (frame_of(event) for event in events_of(run) if event.number > after)


def stream_new_agent_run(
    parts: Parts, request: AgentRunRequest, client: StreamClient
) -> StreamBody:
    """Create an agent run, and follow it from before its start. The run continues when the client
    disconnects. Raises what `create_agent_run` raises."""
    subscription = parts.feed.subscribe(request.run.new_run_id, has_row=False)
    try:
        run = create_agent_run(parts, request)
    except BaseException:
        parts.feed.unsubscribe(subscription)
        raise
    subscription.has_row = True
    parts = client.parts_of(parts)
    return StreamBody(parts, subscription, _stream(parts, request.team, run, client, subscription))


def _stream(
    parts: Parts, team: str, run: AgentRun, client: StreamClient, subscription: Subscription
) -> Generator[bytes]:
    stop_watching = client.watch(subscription.leave)
    heartbeat = parts.settings.heartbeat_seconds
    sent = 1
    try:
        yield frame_of(created(run))
        beat_at = time.monotonic() + heartbeat
        while not subscription.client_left:
            if subscription.drained:
                # The row may still be active: the announced end was wrong. An end that is announced
                # while the row is read must not be forgotten.
                subscription.rearm()
                ask = partial(_now, parts, team, run)
                now = yield from through_outages(HEARTBEAT, ask)
                if not now.is_active:
                    yield from _unsent(now, sent)
                    return
            # A worker appends the first event to the run's log when it has claimed the run.
            has_started = subscription.take(beat_at)
            if has_started and sent == 1:
                sent = 2
                yield frame_of(started(run, run.created_at))
            elif not has_started and not subscription.ended and not subscription.client_left:
                yield HEARTBEAT
            if time.monotonic() >= beat_at:
                beat_at = time.monotonic() + heartbeat
    finally:
        stop_watching()
        parts.feed.unsubscribe(subscription)


def _now(parts: Parts, team: str, run: AgentRun) -> AgentRun:
    """Return the run as it is now. A run that has been deleted meanwhile counts as cancelled: a
    delete stops it first."""
    try:
        return get_agent_run(parts, team, run.id)
    except RunNotFound:
        return dataclasses.replace(run, run_status=None, ended_at=datetime.now(UTC))


def _unsent(run: AgentRun, sent: int) -> Iterator[bytes]:
    """Yield the events that have not been sent, and in any case the terminal event: the row of a
    run that was rolled back no longer shows that it had started."""
    events = events_of(run)
    rest = events[sent:] or [dataclasses.replace(events[-1], number=sent + 1)]
    return (frame_of(event) for event in rest)
