"""The events of an agent run: it is created, it starts, it ends.

Events are not stored: they are derived from the run's row, and an event keeps its number. The
generators here yield server-sent events in the form that clients of Exa's API need: line feeds
only, and one `data` line of ASCII (some of them treat U+2028 as the end of a line).
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import orjson

from belay_server.bus.run_feed import Subscription
from belay_server.domain.agent_runs.errors import RunNotFound
from belay_server.domain.agent_runs.runs import AgentRun, AgentRunStatus, written
from belay_server.services.agent_runs.lifecycle import (
    AgentRunRequest,
    create_agent_run,
    get_agent_run,
)
from belay_server.services.parts import Parts
from belay_server.services.runs.stream import Following, through_outages
from belay_server.services.stream_clients import HEARTBEAT, StreamClient


@dataclass(frozen=True, slots=True)
class AgentRunEvent:
    """One event of an agent run."""

    #: Starts at 1 within the run.
    number: int
    name: str
    data: dict[str, Any]
    created_at: datetime

    @property
    def document(self) -> dict[str, Any]:
        return {
            "id": str(self.number),
            "event": self.name,
            "data": self.data,
            "createdAt": written(self.created_at),
        }

    @property
    def frame(self) -> bytes:
        return b"id: %d\nevent: %b\ndata: %b\n\n" % (
            self.number,
            self.name.encode("ascii"),
            self._encoded_data,
        )

    @property
    def _encoded_data(self) -> bytes:
        """Return the data as ASCII: some clients treat U+2028 as the end of a line."""
        output = self.data.get("output")
        if not isinstance(output, orjson.Fragment):
            return _ascii_json(self.data)
        others = {name: value for name, value in self.data.items() if name != "output"}
        return _ascii_json(others)[:-1] + b',"output":' + orjson.dumps(output) + b"}"


def _ascii_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode("ascii")


def events_of(run: AgentRun) -> list[AgentRunEvent]:
    """Return the events so far, in order."""
    events = [_created(run)]
    if run.started_at is not None:
        events.append(_started(run, run.started_at))
    if not run.is_active:
        events.append(_terminal(run, len(events) + 1))
    return events


def _created(run: AgentRun) -> AgentRunEvent:
    data = {
        "id": run.id,
        "status": AgentRunStatus.QUEUED,
        "createdAt": written(run.created_at),
    }
    return AgentRunEvent(1, "agent_run.created", data, run.created_at)


def _started(run: AgentRun, started_at: datetime) -> AgentRunEvent:
    data = {"id": run.id, "status": AgentRunStatus.RUNNING}
    return AgentRunEvent(2, "agent_run.started", data, started_at)


def _terminal(run: AgentRun, number: int) -> AgentRunEvent:
    data: dict[str, Any] = {"id": run.id, "status": run.status}
    if run.status is AgentRunStatus.COMPLETED:
        data = run.document
    elif run.status is AgentRunStatus.FAILED:
        data["error"] = run.error
    else:
        data["stopReason"] = run.stop_reason
    return AgentRunEvent(number, f"agent_run.{run.status}", data, run.ended_at or run.created_at)


def replay(run: AgentRun, after: int) -> Iterator[bytes]:
    """Yield the frames of the events so far whose number is greater than `after`. Do not wait for
    an active run."""
    return (event.frame for event in events_of(run) if event.number > after)


def stream_new_agent_run(parts: Parts, asked: AgentRunRequest, client: StreamClient) -> Following:
    """Create an agent run, and follow it from before its start. The run continues when the client
    disconnects. Raises what `create_agent_run` raises."""
    subscription = parts.feed.subscribe(asked.run.new_run_id, has_row=False)
    try:
        run = create_agent_run(parts, asked)
    except BaseException:
        parts.feed.unsubscribe(subscription)
        raise
    subscription.has_row = True
    return Following(parts, subscription, _stream(parts, asked.team, run, client, subscription))


def _stream(
    parts: Parts, team: str, run: AgentRun, client: StreamClient, subscription: Subscription
) -> Generator[bytes]:
    stop_watching = client.watch(subscription.leave)
    heartbeat = parts.settings.heartbeat_seconds
    said = 1
    try:
        yield _created(run).frame
        beat_at = time.monotonic() + heartbeat
        while not subscription.client_left:
            if subscription.drained:
                ask = partial(_now, parts, team, run)
                now = yield from through_outages(HEARTBEAT, ask)
                if not now.is_active:
                    yield from _unsent(now, said)
                    return
                subscription.rearm()  # the row is still active: the announced end was wrong
            # A worker appends the first event to the run's log when it has claimed the run.
            has_said = subscription.take(beat_at)
            if has_said and said == 1:
                said = 2
                yield _started(run, run.created_at).frame
            elif not has_said and not subscription.ended and not subscription.client_left:
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


def _unsent(run: AgentRun, said: int) -> Iterator[bytes]:
    """Yield the events that have not been sent, and in any case the terminal event: the row of a
    run that was rolled back no longer shows that it had started."""
    events = events_of(run)
    rest = events[said:] or [dataclasses.replace(events[-1], number=said + 1)]
    return (event.frame for event in rest)
