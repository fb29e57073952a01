"""The schemas of runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

import marshmallow as ma

from belay_server.api.http.fields import (
    Body,
    Boolean,
    Integer,
    JsonObject,
    List,
    Number,
    Object,
    Selected,
    StringList,
    Uuid,
    one_of,
    query_list,
    validate_filter,
)
from belay_server.api.runs.checkpoint_schemas import Checkpoint
from belay_server.api.runs.command_schemas import Command
from belay_server.api.runs.config_schemas import RunConfig
from belay_server.domain.errors import InvalidRequest
from belay_server.domain.run_options import Durability, MultitaskStrategy, RunOptions
from belay_server.domain.runs import CancelAction, RunStatus
from belay_server.services.runs.creation import KEY_VERSION

STREAM_MODES = (
    "values",
    "updates",
    "messages",
    "messages-tuple",
    "custom",
    "events",
    "debug",
    "tasks",
    "checkpoints",
)


class StreamModes(StringList):
    """One stream mode or several."""

    choices = STREAM_MODES

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> Any:
        modes = super()._deserialize(value, attr, data, **kwargs)
        for mode in modes:
            if mode not in STREAM_MODES:
                raise ma.ValidationError(f"'{mode}' is not one of {', '.join(STREAM_MODES)}")
        return list(dict.fromkeys(modes))


class Run(ma.Schema):
    """A run, with the fields of List Runs in LangGraph's documentation."""

    run_id = Uuid(required=True)
    thread_id = Uuid(required=True)
    assistant_id = Uuid(required=True)
    created_at = ma.fields.DateTime(required=True)
    updated_at = ma.fields.DateTime(required=True)
    status = ma.fields.String(required=True, validate=one_of(*RunStatus))
    metadata = Object(required=True)
    kwargs = Object(required=True)
    multitask_strategy = ma.fields.String(required=True, validate=one_of(*MultitaskStrategy))


class SelectedRun(Selected, Run):
    """A run with the selected fields; with all, if none are selected."""


def validate_run_id(run_id: UUID) -> None:
    """Raise ValidationError for a UUID of version 8, which stands for an Idempotency-Key."""
    if run_id.version == KEY_VERSION:
        raise ma.ValidationError("a UUID of version 8 cannot be chosen; use another version")


class LangsmithTracer(ma.Schema):
    """The LangSmith project, and the dataset example, that a run is traced under."""

    project_name = ma.fields.String(allow_none=True)
    example_id = ma.fields.String(allow_none=True)


class _RunCreate(Body):
    """The common fields of all bodies that create a run."""

    assistant_id = ma.fields.String(required=True)
    run_id = Uuid(
        validate=validate_run_id,
        metadata={"description": "A retried create with the same id returns the same run."},
    )
    input = ma.fields.Raw(allow_none=True)
    command = ma.fields.Nested(Command, allow_none=True)
    config = ma.fields.Nested(RunConfig, allow_none=True)
    context = Object(allow_none=True)
    metadata = Object(allow_none=True)
    checkpoint = ma.fields.Nested(Checkpoint, allow_none=True)
    checkpoint_id = Uuid(allow_none=True)
    interrupt_before = StringList(allow_none=True)
    interrupt_after = StringList(allow_none=True)
    stream_mode = StreamModes(allow_none=True)
    stream_subgraphs = Boolean(allow_none=True)
    stream_resumable = Boolean(allow_none=True)
    multitask_strategy = ma.fields.String(
        load_default="enqueue", validate=one_of(*MultitaskStrategy)
    )
    after_seconds = Number(allow_none=True, validate=ma.validate.Range(max=10 * 365 * 86400))
    timeout_seconds = Number(
        allow_none=True,
        validate=ma.validate.Range(min=0, min_inclusive=False, max=10 * 365 * 86400),
        metadata={"description": "The run's time limit; then it ends with status `timeout`."},
    )
    durability = ma.fields.String(allow_none=True, validate=one_of(*Durability))
    checkpoint_during = Boolean(allow_none=True)
    webhook = ma.fields.String(
        allow_none=True,
        validate=ma.validate.Length(min=1),
        metadata={"description": "The URL to send the run to when it has ended."},
    )
    strict_resume = Boolean(
        allow_none=True,
        metadata={"description": "Fail the run if it resumes an interrupt that is not pending."},
    )
    langsmith_tracer = ma.fields.Nested(
        LangsmithTracer,
        allow_none=True,
        metadata={"description": "Where LangSmith records the run, if tracing is on."},
    )
    feedback_keys = List(ma.fields.String(), allow_none=True, validate=ma.validate.Length(max=1000))
    on_disconnect = ma.fields.String(allow_none=True, validate=one_of("cancel", "continue"))

    @ma.post_load
    def as_options(self, data: dict[str, Any], **_: object) -> Any:
        return RunOptions(**data)


class CreateThreadRun(_RunCreate):
    """The body of a create on a thread. By default the thread must exist."""

    if_not_exists = ma.fields.String(load_default="reject", validate=one_of("create", "reject"))


class CreateStatelessRun(_RunCreate):
    """The body of a stateless create. By default its thread is deleted when the run has ended."""

    on_completion = ma.fields.String(load_default="delete", validate=one_of("delete", "keep"))


@dataclass(frozen=True, slots=True)
class BatchRun:
    """A run of a batch; without a `thread_id`, a stateless run."""

    options: RunOptions
    thread_id: UUID | None


class CreateBatchRun(CreateStatelessRun, CreateThreadRun):
    """The body of a run in a batch, with or without a `thread_id`."""

    thread_id = Uuid(allow_none=True)

    @ma.post_load
    def as_options(self, data: dict[str, Any], **_: object) -> Any:
        thread_id = data.pop("thread_id", None)
        return BatchRun(RunOptions(**data), thread_id)


class CancelRuns(Body):
    """Payload for cancelling runs: by `status`, or by `thread_id` and `run_ids`, or both."""

    status = ma.fields.String(
        validate=one_of("pending", "running", "all"),
        metadata={
            "description": "Filter runs by status to cancel. "
            "Must be one of 'pending', 'running', or 'all'."
        },
    )
    thread_id = Uuid(metadata={"description": "The ID of the thread containing runs to cancel."})
    run_ids = List(
        Uuid(),
        validate=ma.validate.Length(max=10_000),
        metadata={"description": "List of run IDs to cancel."},
    )

    @ma.validates_schema
    def names_what_to_cancel(self, data: dict[str, Any], **_: object) -> None:
        if ("thread_id" in data) != ("run_ids" in data):
            raise ma.ValidationError("thread_id and run_ids must be given together")
        if not data:
            raise ma.ValidationError("either status, or thread_id and run_ids, is required")


class CancelQuery(ma.Schema):
    """The query of a cancel. The default action is `interrupt`."""

    action = ma.fields.String(
        load_default="interrupt",
        validate=one_of(*CancelAction),
        metadata={
            "description": "Action to take when cancelling the run. `interrupt` will simply "
            "cancel the run. `rollback` will cancel the run and delete the run and associated "
            "checkpoints afterwards."
        },
    )


class CancelRunQuery(CancelQuery):
    """The query of a cancel of one run. By default the response does not wait for its end."""

    wait = ma.fields.String(
        load_default="0",
        metadata={"description": "1, true or yes: respond when the work has stopped."},
    )


class ListRunsQuery(ma.Schema):
    """The query of a list of runs: its page, its filters, and the fields to return."""

    limit = Integer(
        load_default=10, validate=ma.validate.Range(0, 2**31), metadata={"in_query": True}
    )
    offset = Integer(
        load_default=0, validate=ma.validate.Range(0, 2**31), metadata={"in_query": True}
    )
    status = ma.fields.String(validate=one_of(*RunStatus))
    metadata = JsonObject(
        load_default=dict,
        validate=validate_filter,
        metadata={"description": "Return only runs whose metadata contains this JSON object."},
    )
    select = ma.fields.List(
        ma.fields.String(),
        metadata={
            "description": "Specify which fields to return, one at a time or as a JSON list. "
            "If not provided, all are returned."
        },
    )


class DisconnectQuery(ma.Schema):
    """Whether to cancel the run at a disconnect. `on_disconnect` of the body has precedence."""

    on_disconnect = ma.fields.String(validate=one_of("cancel", "continue"))


class JoinQuery(DisconnectQuery):
    """The query of a join. Either parameter can request a cancel at the client's disconnect."""

    cancel_on_disconnect = ma.fields.String(
        metadata={
            "description": "1, true, yes or cancel: cancel the run if this client disconnects."
        }
    )


class JoinStreamQuery(JoinQuery):
    """The query of a join of a stream, with the stream modes to send."""

    stream_mode = ma.fields.List(
        ma.fields.String(),
        metadata={"description": "Only these modes; by default, all that the run streams."},
    )


def stream_modes(asked: list[str] | None) -> tuple[str, ...] | None:
    """Return the stream modes in the query of a join; None for all. Raises InvalidRequest."""
    modes = query_list(asked)
    if unknown := [mode for mode in modes if mode not in STREAM_MODES]:
        raise InvalidRequest(f"Invalid stream mode: {unknown[0]}")
    return tuple(modes) or None
