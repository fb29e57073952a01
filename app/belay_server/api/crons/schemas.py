"""The schemas of crons."""

from __future__ import annotations

from datetime import MAXYEAR, UTC, datetime

import marshmallow as ma

from belay_server.api.http.fields import (
    Body,
    Boolean,
    Filter,
    Object,
    Selected,
    StringList,
    Uuid,
    one_of,
)
from belay_server.api.http.page_schemas import Sorted
from belay_server.api.runs.config_schemas import RunConfig
from belay_server.api.runs.schemas import StreamModes
from belay_server.db.crons import SORT_COLUMNS
from belay_server.domain.crons import CRON_FIELDS
from belay_server.domain.run_options import Durability, MultitaskStrategy


class Cron(ma.Schema):
    """A cron. `payload` is the body of its runs; `user_id` is always empty."""

    cron_id = Uuid(required=True)
    assistant_id = Uuid(required=True)
    thread_id = Uuid(allow_none=True)
    user_id = ma.fields.String()
    on_run_completed = ma.fields.String(allow_none=True)
    end_time = ma.fields.DateTime(allow_none=True)
    schedule = ma.fields.String(required=True)
    timezone = ma.fields.String(allow_none=True)
    created_at = ma.fields.DateTime(required=True)
    updated_at = ma.fields.DateTime(required=True)
    payload = Object(required=True)
    next_run_date = ma.fields.DateTime(
        allow_none=True, metadata={"description": "null: no further run is scheduled."}
    )
    metadata = Object(required=True)
    enabled = ma.fields.Boolean(required=True)
    last_error = ma.fields.String(
        metadata={
            "description": "Why the last run was not created; missing when it was created. A cron "
            "whose run cannot be stored is disabled after five tries; a change enables it again."
        }
    )


class SelectedCron(Selected, Cron):
    """A cron with the selected fields; with all, if none are selected."""


class _Moment(ma.fields.DateTime):
    """A date and time; UTC without a timezone."""

    def __init__(self) -> None:
        super().__init__(format="iso", allow_none=True)

    def _deserialize(self, value: object, *args: object, **kwargs: object) -> datetime:
        if not isinstance(value, str):
            raise ma.ValidationError("must be a date and time as a string")
        moment: datetime = super()._deserialize(value, *args, **kwargs)
        if moment.year >= MAXYEAR:  # in another timezone it may be a year later
            raise ma.ValidationError(f"must be before the year {MAXYEAR}")
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


class PatchCron(Body):
    """A change: the given fields are replaced, metadata is merged."""

    schedule = ma.fields.String(
        validate=ma.validate.Length(max=200),
        metadata={"description": "Five fields; six with seconds last; or an alias such as @daily."},
    )
    timezone = ma.fields.String(allow_none=True, validate=ma.validate.Length(max=100))
    end_time = _Moment()
    enabled = Boolean(allow_none=True)
    input = ma.fields.Raw(allow_none=True)
    metadata = Object(allow_none=True)
    config = ma.fields.Nested(RunConfig, allow_none=True)
    context = Object(allow_none=True)
    webhook = ma.fields.String(allow_none=True, validate=ma.validate.Length(min=1))
    interrupt_before = StringList(allow_none=True)
    interrupt_after = StringList(allow_none=True)
    on_run_completed = ma.fields.String(allow_none=True, validate=one_of("delete", "keep"))
    stream_mode = StreamModes(allow_none=True)
    stream_subgraphs = Boolean(allow_none=True)
    stream_resumable = Boolean(allow_none=True)
    durability = ma.fields.String(allow_none=True, validate=one_of(*Durability))


class CreateThreadCron(PatchCron):
    """A cron on a thread, which all of its runs use."""

    assistant_id = ma.fields.String(required=True)
    schedule = ma.fields.String(required=True, validate=ma.validate.Length(max=200))
    checkpoint_during = Boolean(allow_none=True)
    multitask_strategy = ma.fields.String(allow_none=True, validate=one_of(*MultitaskStrategy))


class CreateCron(CreateThreadCron):
    """A cron without a thread. Each run has its own thread, which is deleted when the run has ended
    unless `on_run_completed` is `keep`."""


class CountCrons(Body):
    """The conditions of a count. A null or missing field matches every cron."""

    assistant_id = ma.fields.String(allow_none=True)
    thread_id = Uuid(allow_none=True)
    enabled = Boolean(allow_none=True)
    metadata = Filter()


class SearchCrons(CountCrons, Sorted):
    """The conditions of a search, its page and order, and the fields to return (all if null)."""

    sort_by = ma.fields.String(
        allow_none=True, load_default="created_at", validate=one_of(*SORT_COLUMNS)
    )
    select = StringList(allow_none=True, validate=ma.validate.ContainsOnly(CRON_FIELDS))
