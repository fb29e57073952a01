"""The schemas of threads and their states."""

from __future__ import annotations

from typing import Any

import marshmallow as ma

from belay_server.api.http.fields import (
    Body,
    Boolean,
    Filter,
    Integer,
    List,
    Map,
    Number,
    Object,
    Selected,
    StringList,
    Uuid,
    one_of,
)
from belay_server.api.http.page_schemas import Sorted
from belay_server.api.runs.checkpoint_schemas import Checkpoint
from belay_server.api.runs.command_schemas import Command
from belay_server.db.threads import SORT_COLUMNS
from belay_server.domain.json_paths import check_path
from belay_server.domain.threads import THREAD_FIELDS, ThreadStatus, ThreadTtl, TtlStrategy

#: `context` is the `configurable` of the thread's config.
SELECTABLE_FIELDS = (*THREAD_FIELDS, "context")
STATE_FIELDS = (
    "values",
    "next",
    "tasks",
    "checkpoint",
    "metadata",
    "created_at",
    "parent_checkpoint",
    "interrupts",
    "checkpoint_id",
    "parent_checkpoint_id",
)


def validate_extract_path(path: str) -> None:
    """Validate a path for `extract`. Raises ValidationError."""
    try:
        check_path(path)
    except ValueError as error:
        raise ma.ValidationError(str(error)) from error


class Thread(ma.Schema):
    """A thread. A new one has no `interrupts` and no `error`."""

    thread_id = Uuid(required=True)
    created_at = ma.fields.DateTime(required=True)
    updated_at = ma.fields.DateTime(required=True)
    state_updated_at = ma.fields.DateTime()
    metadata = Object(required=True)
    config = Object()
    status = ma.fields.String(required=True, validate=one_of(*ThreadStatus))
    values = ma.fields.Raw(allow_none=True)
    interrupts = Object()
    error = Object(allow_none=True)
    extracted = Object(metadata={"description": "The values at the paths in `extract`, by name."})
    ttl = Object(
        allow_none=True, metadata={"description": "With `include=ttl`: when the thread expires."}
    )


class FoundThread(Selected, Thread):
    """A thread with the selected fields; with all, if none are selected."""

    context = Object(metadata={"description": "The `configurable` of the thread's config."})


class Ttl(ma.Schema):
    """How long an unused thread is kept."""

    ttl = Number(
        required=True,
        validate=ma.validate.Range(min=0, min_inclusive=False, max=100 * 365 * 24 * 60),
        metadata={"description": "In minutes."},
    )
    strategy = ma.fields.String(load_default="delete", validate=one_of(*TtlStrategy))

    @ma.post_load
    def as_ttl(self, data: dict[str, Any], **_: object) -> ThreadTtl:
        return ThreadTtl(float(data["ttl"]), TtlStrategy(data["strategy"]))


class Update(ma.Schema):
    """The update that a node wrote."""

    values = ma.fields.Raw(allow_none=True)
    command = ma.fields.Nested(Command, allow_none=True)
    as_node = ma.fields.String(allow_none=True)


class Superstep(ma.Schema):
    """The updates that the nodes of one step wrote."""

    updates = List(
        ma.fields.Nested(Update), required=True, validate=ma.validate.Length(min=1, max=1000)
    )


class CreateThread(Body):
    """The body of a create. `supersteps` become the thread's history, and need a graph id."""

    thread_id = Uuid()
    metadata = Object(allow_none=True)
    if_exists = ma.fields.String(validate=one_of("raise", "do_nothing"), load_default="raise")
    graph_id = ma.fields.String(allow_none=True)
    ttl = ma.fields.Nested(Ttl, allow_none=True)
    supersteps = List(
        ma.fields.Nested(Superstep), allow_none=True, validate=ma.validate.Length(max=1000)
    )


class GetThreadQuery(ma.Schema):
    """The query of one thread: what to include besides its usual fields."""

    include = ma.fields.List(
        ma.fields.String(), metadata={"description": "ttl: include when the thread expires."}
    )


class PatchThread(Body):
    """A change: metadata is merged, a TTL replaces the current one."""

    metadata = Object(allow_none=True)
    ttl = ma.fields.Nested(Ttl, allow_none=True)


class CountThreads(Body):
    """The conditions of a count. Each thread contains the given `metadata` and `values`."""

    metadata = Filter()
    values = Filter()
    status = ma.fields.String(allow_none=True, validate=one_of(*ThreadStatus))


class PruneThreads(Body):
    """The threads to prune, and whether to delete them or all but their latest states."""

    thread_ids = List(Uuid(), required=True, validate=ma.validate.Length(max=1000))
    strategy = ma.fields.String(load_default="delete", validate=one_of(*TtlStrategy))


class PrunedThreads(ma.Schema):
    """The number of pruned threads, without unknown ones and those left unchanged."""

    pruned_count = ma.fields.Integer(required=True)


class Amount(ma.Schema):
    """A count, and the size in bytes before Postgres compresses it."""

    count = ma.fields.Integer(required=True)
    bytes = ma.fields.Integer(required=True)


class ChannelAmount(Amount):
    """The amount of all channel values, and the amount by channel."""

    by_channel = Object(required=True)


class Storage(ma.Schema):
    """The size of a thread's history in the database."""

    thread_id = Uuid(required=True)
    total_bytes = ma.fields.Integer(required=True)
    checkpoints = ma.fields.Nested(Amount, required=True)
    channel_values = ma.fields.Nested(ChannelAmount, required=True)
    pending_writes = ma.fields.Nested(Amount, required=True)


class SearchThreads(CountThreads, Sorted):
    """The conditions of a search, its page and order, and the fields to return (all if null)."""

    ids = List(Uuid(), allow_none=True, validate=ma.validate.Length(max=1000))
    sort_by = ma.fields.String(
        allow_none=True, load_default="updated_at", validate=one_of(*SORT_COLUMNS)
    )
    select = StringList(allow_none=True, validate=ma.validate.ContainsOnly(SELECTABLE_FIELDS))
    extract = Map(
        keys=ma.fields.String(),
        values=ma.fields.String(validate=validate_extract_path),
        allow_none=True,
        validate=ma.validate.Length(max=10),
        metadata={"description": "Paths by name, such as `values.messages[-1].content`."},
    )


def validate_state_field(name: str) -> None:
    """Validate a field of a state, or a key of its values such as `values.messages`.

    Raises ValidationError.
    """
    if name not in STATE_FIELDS and not (name.startswith("values.") and len(name) > 7):
        raise ma.ValidationError(f"{name!r} is not one of {', '.join(STATE_FIELDS)}, values.<key>")


class SelectState(ma.Schema):
    """The fields of a state to return. By default all are returned."""

    select = List(
        ma.fields.String(validate=validate_state_field),
        metadata={"description": "Return only these fields; `values.<key>` for one value."},
    )


class StateQuery(SelectState):
    """The query for a state. By default subgraphs' states are not included."""

    subgraphs = ma.fields.String(metadata={"description": "true: include the states of subgraphs."})


class ThreadState(ma.Schema):
    """A state. Without a `select`, it has all fields."""

    values = ma.fields.Raw()
    next = ma.fields.List(ma.fields.String())
    tasks = ma.fields.List(Object())
    metadata = Object(allow_none=True)
    created_at = ma.fields.String(allow_none=True)
    checkpoint = Object(allow_none=True)
    parent_checkpoint = Object(allow_none=True)
    interrupts = ma.fields.List(Object())
    checkpoint_id = ma.fields.String(allow_none=True)
    parent_checkpoint_id = ma.fields.String(allow_none=True)


class UpdateState(Body):
    """Values to write as a node, and the checkpoint to write them after (by default the latest).
    `checkpoint_id` has precedence over the id in `checkpoint`."""

    values = ma.fields.Raw(allow_none=True)
    as_node = ma.fields.String(allow_none=True)
    checkpoint = ma.fields.Nested(Checkpoint, allow_none=True)
    checkpoint_id = Uuid(allow_none=True)


class PatchState(Body):
    """Metadata to merge into the thread's."""

    metadata = Object(allow_none=True)


class UpdatedState(ma.Schema):
    """The address of the checkpoint that was written. `configurable` equals `checkpoint`."""

    checkpoint = Object(required=True)
    configurable = Object(required=True)
    checkpoint_id = ma.fields.String(required=True)


class HistoryQuery(SelectState):
    """The query of a history: at most `limit` states, older than the checkpoint id `before`."""

    limit = Integer(
        load_default=1, validate=ma.validate.Range(0, 1000), metadata={"in_query": True}
    )
    before = ma.fields.String()


class StateAtCheckpoint(SelectState, Body):
    """The checkpoint whose state to return, and whether to include subgraphs' states."""

    checkpoint = ma.fields.Nested(Checkpoint, required=True)
    subgraphs = Boolean(allow_none=True)


class History(SelectState, Body):
    """The body of a history search. `before` is a checkpoint as the SDK sends it, a config, or a
    checkpoint id."""

    limit = Integer(load_default=1, validate=ma.validate.Range(1, 1000))
    before = ma.fields.Raw(allow_none=True)
    metadata = Filter()
    checkpoint = ma.fields.Nested(Checkpoint, allow_none=True)
