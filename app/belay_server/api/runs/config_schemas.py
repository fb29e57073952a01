"""The schema of LangChain's RunnableConfig, for assistants and runs."""

from __future__ import annotations

from typing import Any

import marshmallow as ma

from belay_server.api.http.fields import Integer, List, Object, Uuid


class RunConfig(ma.Schema):
    """The part of a RunnableConfig that a client may set."""

    class Meta:
        unknown = ma.EXCLUDE

    tags = List(ma.fields.String(), allow_none=True, validate=ma.validate.Length(max=1000))
    recursion_limit = Integer(allow_none=True, validate=ma.validate.Range(1, 1_000_000))
    max_concurrency = Integer(allow_none=True, validate=ma.validate.Range(1, 10_000))
    configurable = Object(allow_none=True)
    metadata = Object(allow_none=True)
    run_name = ma.fields.String(allow_none=True)

    @ma.validates("configurable")
    def checkpoint_is_an_id(self, value: dict[str, Any] | None, **_: object) -> None:
        checkpoint_id = (value or {}).get("checkpoint_id")
        if checkpoint_id is not None:
            Uuid().deserialize(checkpoint_id)

    @ma.post_load
    def without_nulls(self, data: dict[str, Any], **_: object) -> dict[str, Any]:
        return {key: value for key, value in data.items() if value is not None}
