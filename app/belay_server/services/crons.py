"""Create, read, change and delete crons."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any
from uuid import UUID

from belay_server.configuration.settings import Settings
from belay_server.db import crons as cron_rows
from belay_server.db import threads as thread_rows
from belay_server.db.assistants import keep_assistant
from belay_server.db.crons import CronContent
from belay_server.db.postgres.connection import Connection
from belay_server.db.postgres.pool import Database
from belay_server.domain.crons import Cron, LockedCron
from belay_server.domain.errors import (
    BadRequest,
    Forbidden,
    InvalidRequest,
    NotFound,
    OutOfReach,
    TooMany,
)
from belay_server.domain.ids import parse_uuid
from belay_server.domain.run_options import RunOptions
from belay_server.domain.schedules import check_schedule, check_timezone, next_time
from belay_server.services.assistant_cache import resolve_assistant
from belay_server.services.parts import Parts
from belay_server.services.runs.creation import new_id, refuse_unknown_nodes
from belay_server.services.size_limits import refuse_large, refuse_many_keys

#: The number of intervals of a schedule among which the shortest is found.
_TIMES_CHECKED = 12
#: The fields of a body that are the cron's own. The others form the body of the runs it creates.
_OF_THE_CRON = ("timezone", "end_time", "enabled", "on_run_completed")


def create_cron(
    parts: Parts, body: dict[str, Any], thread_id: UUID | None, maker: dict[str, Any]
) -> Cron:
    """Create a cron. `maker` has the caller and the user that its runs are created for.

    Raises NotFound (assistant or thread), InvalidRequest (schedule, timezone, end, node),
    BadRequest, TooLarge, TooMany, OutOfReach.
    """
    cron_id = new_id()

    def create(conn: Connection) -> Cron:
        if thread_id is not None and not thread_rows.lock_thread(conn, thread_id):
            raise NotFound(f"Thread with ID '{thread_id}' not found.")
        try:
            assistant = resolve_assistant(conn, parts.graphs, body["assistant_id"])
        except (NotFound, InvalidRequest):
            raise NotFound(f"Assistant '{body['assistant_id']}' not found") from None
        refuse_unknown_nodes(parts.graphs, assistant, RunOptions.from_document(body))
        if not keep_assistant(conn, assistant):
            raise NotFound(f"Assistant '{body['assistant_id']}' not found")
        content = _content(body, cron_id, assistant.assistant_id, has_thread=thread_id is not None)
        _refuse_large(parts, content)
        _refuse_frequent(parts.settings, content)
        _refuse_too_many(parts.settings, conn, maker.get("caller"))
        created = cron_rows.insert_cron(
            conn,
            cron_id,
            content,
            assistant_id=assistant.assistant_id,
            thread_id=thread_id,
            maker=maker,
        )
        return _within_reach(conn, created)

    return parts.database.transaction(create)


def _refuse_too_many(settings: Settings, conn: Connection, caller: str | None) -> None:
    """Raise TooMany when the caller has reached BELAY_MAX_CRONS. The count takes a lock, so that
    concurrent creates of one caller cannot exceed the limit."""
    most = settings.max_crons
    if most and caller is not None and cron_rows.crons_of(conn, caller) >= most:
        raise TooMany(f"You have {most} crons already; delete one first (BELAY_MAX_CRONS)")


def _refuse_frequent(settings: Settings, content: CronContent) -> None:
    """Raise InvalidRequest for a schedule with intervals below BELAY_CRON_SHORTEST_SECONDS."""
    shortest = settings.cron_shortest_seconds
    times = [datetime.now(UTC)]
    while len(times) <= _TIMES_CHECKED:
        due = next_time(content.schedule, content.timezone, times[-1])
        if due is None:
            break
        times.append(due)
    gaps = [(later - before).total_seconds() for before, later in pairwise(times[1:])]
    if gaps and min(gaps) < shortest:
        raise InvalidRequest(
            f"schedule: has an interval of {min(gaps):.0f} s; the shortest allowed is {shortest} s "
            "(BELAY_CRON_SHORTEST_SECONDS)"
        )


def _refuse_large(parts: Parts, content: CronContent) -> None:
    """Raise TooLarge when the payload or the metadata exceed their limits."""
    settings, payload = parts.settings, content.payload
    refuse_many_keys(
        config=payload.get("config"), context=payload.get("context"), metadata=content.metadata
    )
    limit = min(settings.max_cron_bytes, settings.max_run_bytes)
    refuse_large(limit, "BELAY_MAX_CRON_BYTES", payload=payload)
    refuse_large(settings.max_metadata_bytes, "BELAY_MAX_METADATA_BYTES", metadata=content.metadata)


def _content(
    body: dict[str, Any], cron_id: UUID, assistant_id: UUID, *, has_thread: bool
) -> CronContent:
    schedule, timezone, end_time = body["schedule"], body.get("timezone"), body.get("end_time")
    _check(schedule, timezone)
    payload = {k: v for k, v in body.items() if k not in _OF_THE_CRON and v is not None}
    payload["assistant_id"] = str(assistant_id)
    config = dict(payload.get("config") or {})
    configurable = {k: v for k, v in (config.get("configurable") or {}).items() if k != "cron_id"}
    if payload.get("context") and configurable:
        raise BadRequest("Cannot specify both configurable and context. Use only one.")
    payload["config"] = {**config, "configurable": {**configurable, "cron_id": str(cron_id)}}
    return CronContent(
        schedule=schedule,
        timezone=timezone,
        end_time=end_time,
        enabled=body.get("enabled") is not False,
        on_run_completed=None if has_thread else body.get("on_run_completed") or "delete",
        payload=payload,
        metadata=body.get("metadata") or {},
        next_run_date=_first_time(schedule, timezone, end_time),
    )


def _check(schedule: str, timezone: str | None) -> None:
    try:
        check_schedule(schedule)
    except ValueError as error:
        raise InvalidRequest(f"Invalid cron schedule: '{schedule}'. Reason: {error}") from error
    try:
        if timezone is not None:
            check_timezone(timezone)
    except ValueError as error:
        raise InvalidRequest(
            f"Invalid timezone: '{timezone}'. Use IANA timezone format (e.g. 'America/New_York')."
        ) from error


def _first_time(schedule: str, timezone: str | None, end_time: datetime | None) -> datetime | None:
    now = datetime.now(UTC)
    if end_time is not None and end_time <= now:
        raise InvalidRequest("end_time: must be in the future")
    return time_after(schedule, timezone, end_time, now)


def time_after(
    schedule: str, timezone: str | None, end_time: datetime | None, after: datetime
) -> datetime | None:
    """Return when a cron is next due; None when that would be after its end, or there is no next
    due time."""
    due = next_time(schedule, timezone, after)
    return due if due is None or end_time is None or due <= end_time else None


def get_cron(database: Database, cron_id: UUID) -> Cron:
    """Return a cron. Raises NotFound."""
    with database.connection() as conn:
        cron = cron_rows.get_cron(conn, cron_id)
    if cron is None:
        raise NotFound()
    return cron


def patch_cron(parts: Parts, cron_id: UUID, body: dict[str, Any]) -> Cron:
    """Change a cron: replace the fields that are given, and merge its metadata.

    Raises NotFound, BadRequest, InvalidRequest, TooLarge, OutOfReach; Forbidden if another user
    changes more than its times and its metadata.
    """
    if not body:
        raise BadRequest("Request body cannot be empty")

    def patch(conn: Connection) -> Cron:
        cron = cron_rows.lock_cron(conn, cron_id)
        if cron is None:
            raise NotFound(f"Cron '{cron_id}' not found")
        _refuse_foreign_runs(cron, body, parts.identity)
        assistant = resolve_assistant(conn, parts.graphs, str(cron.assistant_id))
        given = {k: v for k, v in body.items() if k not in _OF_THE_CRON}
        whole = {
            **cron.payload,
            **given,
            **{name: body.get(name, getattr(cron, name)) for name in _OF_THE_CRON},
        }
        refuse_unknown_nodes(parts.graphs, assistant, RunOptions.from_document(whole))
        content = _content(whole, cron_id, cron.assistant_id, has_thread=cron.thread_id is not None)
        merged = _merged(cron, content, body)
        if _is_due_as_before(cron, merged):
            merged = dataclasses.replace(merged, next_run_date=cron.next_run_date)
        _refuse_large(parts, merged)
        if "schedule" in body:
            _refuse_frequent(parts.settings, merged)
        updated = cron_rows.update_cron(conn, cron_id, merged)
        assert updated is not None
        return _within_reach(conn, updated)

    return parts.database.transaction(patch)


def _is_due_as_before(cron: Cron, changed: CronContent) -> bool:
    """Return whether a change leaves the moment at which a cron is next due. That may have passed:
    the cron's run is still to be created then."""
    due, end_time = cron.next_run_date, changed.end_time
    if due is None or (end_time is not None and due > end_time):
        return False
    is_started = changed.enabled and not cron.enabled
    same = (cron.schedule, cron.timezone) == (changed.schedule, changed.timezone)
    return same and not is_started


def _refuse_foreign_runs(cron: LockedCron, body: dict[str, Any], user: str | None) -> None:
    """Raise Forbidden for a change of what a cron's runs do by another than its creator, whose
    access and whose user they have."""
    if user == cron.user:
        return
    allowed = ("schedule", *_OF_THE_CRON, "metadata")
    if changed := sorted(set(body).difference(allowed)):
        raise Forbidden(
            f"{', '.join(changed)}: only the user who created this cron may change what its runs "
            f"do, as they have that user's access. You may change {', '.join(allowed)}."
        )


def _within_reach(conn: Connection, cron: Cron) -> Cron:
    """Return a cron that was just written; raise OutOfReach if the caller's filter does not match
    it, which rolls the change back. Its runs stay those of its creator."""
    if cron_rows.get_cron(conn, cron.cron_id) is None:
        raise OutOfReach("cron")
    return cron


def _merged(cron: Cron, content: CronContent, body: dict[str, Any]) -> CronContent:
    metadata = {**cron.metadata, **(body.get("metadata") or {})}
    return dataclasses.replace(content, metadata=metadata)


def delete_cron(database: Database, cron_id: UUID) -> None:
    """Delete a cron. Raises NotFound."""
    with database.connection() as conn:
        if not cron_rows.delete_cron(conn, cron_id):
            raise NotFound()


def assistant_id_of(parts: Parts, named: str | None) -> UUID | None:
    """Return the assistant id for a filter, from an id or a graph's name; None without one. An
    unknown id matches nothing. Raises InvalidRequest for an unknown name."""
    if named is None:
        return None
    try:
        return parse_uuid(named)
    except ValueError:
        with parts.database.connection() as conn:
            return resolve_assistant(conn, parts.graphs, named).assistant_id
