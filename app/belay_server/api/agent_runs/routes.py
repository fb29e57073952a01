"""The routes of agent runs, the second HTTP API, compatible with Exa's clients."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from flask import Response, request

from belay_server.api.agent_runs.blueprint import AgentBlueprint, team
from belay_server.api.agent_runs.schemas import AgentPageQuery, CreateAgentRun, ref
from belay_server.api.context import context, parts
from belay_server.api.http.bodies.json_body import json_response
from belay_server.api.runs.requests import run_request
from belay_server.api.runs.responses import EVENTS, STREAM_HEADERS, STREAM_TYPE, stream_client
from belay_server.api.security.authorization import authorize, authorizes_itself, cancels
from belay_server.api.streaming.agent_runs import replay, stream_new_agent_run
from belay_server.domain.agent_runs.runs import is_any_id, is_our_id, run_id_of
from belay_server.domain.errors import InvalidRequest
from belay_server.services.agent_runs import lifecycle as agent_runs
from belay_server.services.agent_runs.events import events_of
from belay_server.services.agent_runs.lifecycle import AgentRunRequest
from belay_server.services.runs.creation import new_id

blueprint = AgentBlueprint("agent runs", __name__, description="Agent runs, compatible with Exa's")

_EVENT_NUMBER = re.compile(r"[0-9]{1,9}", re.ASCII)
_OR_EVENTS = {200: {"content": {"text/event-stream": {"schema": EVENTS}}}}


def _stream(body: Iterable[bytes]) -> Response:
    return Response(body, 200, STREAM_HEADERS, content_type=STREAM_TYPE)


def _wants_stream() -> bool:
    return "text/event-stream" in request.headers.get("Accept", "")


def _permitted(action: str, agent_run_id: str) -> str:
    """Return a valid id for which the action is permitted. The project's authorization handler gets
    the run's id as a value of `threads`. Raises InvalidRequest, Forbidden, Refused."""
    if not is_any_id(agent_run_id):
        raise InvalidRequest("id: is not an agent run ID")
    authorize("threads", action, {"run_id": run_id_of(agent_run_id)})
    return agent_run_id


def _agent_run_request(fields: dict[str, Any]) -> AgentRunRequest:
    """Return the request with the run to create. Raises Forbidden, Refused."""
    run_id = new_id()
    options = agent_runs.options_of_run(parts(), fields, run_id)
    run = run_request(options, thread_id=new_id())
    # The agent run's id is derived from the run's id, and orders lists. So it must be a new UUIDv7,
    # not one from an Idempotency-Key.
    run = dataclasses.replace(run, new_run_id=run_id, idempotency_key=None)
    return AgentRunRequest(team(), fields, run)


def _page(items: list[dict[str, Any]], *, has_more: bool) -> Response:
    """Return a page. The cursor of the next page is the last item's id."""
    cursor = items[-1]["id"] if has_more else None
    return json_response(
        {"object": "list", "data": items, "hasMore": has_more, "nextCursor": cursor}
    )


@blueprint.post("/agent/runs")
@blueprint.arguments(CreateAgentRun)
@blueprint.response(200, ref("AgentRun"))
@blueprint.doc(operationId="createAgentRun", responses=_OR_EVENTS)
@authorizes_itself
def create_agent_run(body: dict[str, Any]) -> Response:
    """Create a run. With `Accept: text/event-stream`, stream its events until its end."""
    fields = {name: value for name, value in body.items() if value is not None}
    fields.setdefault("effort", "auto")
    if "outputSchema" in fields:
        context().output_schemas.check(fields["outputSchema"])
    creation = _agent_run_request(fields)
    if _wants_stream():
        return _stream(stream_new_agent_run(parts(), creation, stream_client()))
    return json_response(agent_runs.create_agent_run(parts(), creation).document)


@blueprint.get("/agent/runs")
@blueprint.arguments(AgentPageQuery, location="query")
@blueprint.response(200, ref("AgentRunList"))
@blueprint.doc(operationId="listAgentRuns")
@authorizes_itself
def list_agent_runs(query: dict[str, Any]) -> Response:
    """List runs, newest first."""
    after = query.get("cursor")
    if after is not None and not is_our_id(after):
        raise InvalidRequest("cursor: is not the nextCursor of a page")
    authorize("threads", "search", {"limit": query["limit"]})
    page = agent_runs.list_agent_runs(parts(), team(), after=after, limit=query["limit"])
    return _page([run.document for run in page.runs], has_more=page.has_more)


@blueprint.get("/agent/runs/<id>")
@blueprint.response(200, ref("AgentRun"))
@blueprint.doc(operationId="getAgentRun")
@authorizes_itself
def get_agent_run(id: str) -> Response:
    """Get a run."""
    run = agent_runs.get_agent_run(parts(), team(), _permitted("read", id))
    return json_response(run.document)


@blueprint.delete("/agent/runs/<id>")
@blueprint.response(200, ref("DeleteAgentRunResponse"), description="Agent run deleted")
@blueprint.doc(operationId="deleteAgentRun")
@authorizes_itself
def delete_agent_run(id: str) -> Response:
    """Delete a stored Agent run. An active run is stopped first."""
    agent_runs.delete_agent_run(parts(), team(), _permitted("delete", id))
    return json_response({"id": id, "object": "agent_run.deleted", "deleted": True})


@blueprint.post("/agent/runs/<id>/cancel")
@blueprint.response(200, ref("AgentRun"))
@blueprint.doc(operationId="cancelAgentRun")
@cancels
@authorizes_itself
def cancel_agent_run(id: str) -> Response:
    """Cancel a run, and respond when its work has stopped. A run that has ended is unchanged."""
    return json_response(
        agent_runs.cancel_agent_run(parts(), team(), _permitted("update", id)).document
    )


@blueprint.post("/agent/runs/<id>/stop")
@blueprint.response(200, ref("AgentRun"))
@blueprint.doc(operationId="stopAgentRun")
@cancels
@authorizes_itself
def stop_agent_run(id: str) -> Response:
    """End a run and keep the output it has reached. A run that has ended is unchanged."""
    return json_response(
        agent_runs.stop_agent_run(parts(), team(), _permitted("update", id)).document
    )


@blueprint.get("/agent/runs/<id>/events")
@blueprint.arguments(AgentPageQuery, location="query")
@blueprint.response(200, ref("AgentRunEventList"))
@blueprint.doc(operationId="listAgentRunEvents", responses=_OR_EVENTS)
@authorizes_itself
def list_agent_run_events(query: dict[str, Any], id: str) -> Response:
    """List the events so far. With `Accept: text/event-stream`, send the events after
    `Last-Event-ID` as server-sent events, without waiting for an active run."""
    streams = _wants_stream()
    after = _event_number("cursor", query.get("cursor"))
    if streams:
        last = request.headers.get("Last-Event-ID", "").strip()
        after = max(after, _event_number("Last-Event-ID", last or None))
    run = agent_runs.get_agent_run(parts(), team(), _permitted("read", id))
    if streams:
        return _stream(replay(run, after))
    events = [event.document for event in events_of(run) if event.number > after]
    limit = query["limit"]
    return _page(events[:limit], has_more=len(events) > limit)


def _event_number(name: str, text: str | None) -> int:
    """Return the number in an event's id; 0 for None. Raises InvalidRequest for an invalid id."""
    if text is None:
        return 0
    if _EVENT_NUMBER.fullmatch(text) is None:
        raise InvalidRequest(f"{name}: {text[:100]!r} is not the id of an event")
    return int(text)
