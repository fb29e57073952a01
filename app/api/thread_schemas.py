"""Threads and their states on the wire."""

from __future__ import annotations

import marshmallow as ma

from app.api.fields import Boolean, Integer, Object, StringList, Uuid, one_of
from app.db.threads import SORT_COLUMNS
from app.domain.threads import THREAD_FIELDS, ThreadStatus


class Thread(ma.Schema):
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


class CreateThread(ma.Schema):
    thread_id = Uuid()
    metadata = Object(allow_none=True)
    if_exists = ma.fields.String(validate=one_of("raise", "do_nothing"), load_default="raise")
    graph_id = ma.fields.String(allow_none=True)


class PatchThread(ma.Schema):
    metadata = Object(allow_none=True)


class SearchThreads(ma.Schema):
    ids = ma.fields.List(Uuid(), allow_none=True, validate=ma.validate.Length(max=1000))
    metadata = Object(allow_none=True)
    values = Object(allow_none=True)
    status = ma.fields.String(allow_none=True, validate=one_of(*ThreadStatus))
    limit = Integer(load_default=10, validate=ma.validate.Range(1, 1000))
    offset = Integer(load_default=0, validate=ma.validate.Range(0, 2**31))
    sort_by = ma.fields.String(
        allow_none=True, load_default="updated_at", validate=one_of(*SORT_COLUMNS)
    )
    sort_order = ma.fields.String(
        allow_none=True, load_default="desc", validate=one_of("asc", "desc")
    )
    select = StringList(allow_none=True, validate=ma.validate.ContainsOnly(THREAD_FIELDS))


class Checkpoint(ma.Schema):
    """Where in a thread's history: a checkpoint of the root graph or of a subgraph."""

    class Meta:
        unknown = ma.EXCLUDE

    thread_id = ma.fields.String(allow_none=True)
    checkpoint_ns = ma.fields.String(allow_none=True)
    checkpoint_id = Uuid(allow_none=True)
    checkpoint_map = ma.fields.Dict(
        keys=ma.fields.String(), values=ma.fields.String(), allow_none=True
    )

    @ma.post_load
    def as_strings(self, data: dict, **_: object) -> dict:
        if data.get("checkpoint_id"):
            data["checkpoint_id"] = str(data["checkpoint_id"])
        return data


class ThreadState(ma.Schema):
    values = ma.fields.Raw(required=True)
    next = ma.fields.List(ma.fields.String(), required=True)
    tasks = ma.fields.List(Object(), required=True)
    metadata = Object(required=True, allow_none=True)
    created_at = ma.fields.String(required=True, allow_none=True)
    checkpoint = Object(required=True, allow_none=True)
    parent_checkpoint = Object(required=True, allow_none=True)
    interrupts = ma.fields.List(Object(), required=True)
    checkpoint_id = ma.fields.String(allow_none=True)
    parent_checkpoint_id = ma.fields.String(allow_none=True)


class UpdateState(ma.Schema):
    values = ma.fields.Raw(allow_none=True)
    as_node = ma.fields.String(allow_none=True)
    checkpoint = ma.fields.Nested(Checkpoint, allow_none=True)
    checkpoint_id = Uuid(allow_none=True)


class UpdatedState(ma.Schema):
    checkpoint = Object(required=True)
    configurable = Object(required=True)
    checkpoint_id = ma.fields.String(required=True)


class HistoryQuery(ma.Schema):
    limit = Integer(
        load_default=1, validate=ma.validate.Range(0, 1000), metadata={"in_query": True}
    )
    before = ma.fields.String()


class StateAtCheckpoint(ma.Schema):
    checkpoint = ma.fields.Nested(Checkpoint, required=True)
    subgraphs = Boolean(allow_none=True)


class History(ma.Schema):
    """`before` is a checkpoint, as the SDK sends it, a config, or a checkpoint id."""

    limit = Integer(load_default=1, validate=ma.validate.Range(1, 1000))
    before = ma.fields.Raw(allow_none=True)
    metadata = Object(allow_none=True)
    checkpoint = ma.fields.Nested(Checkpoint, allow_none=True)
