"""The schema of a checkpoint that a run starts from, or a state is read or updated at."""

from __future__ import annotations

from typing import Any

import marshmallow as ma

from belay_server.api.http.fields import Map, Uuid


class Checkpoint(ma.Schema):
    """A checkpoint in a thread's history, of the root graph or of a subgraph."""

    class Meta:
        unknown = ma.EXCLUDE

    thread_id = ma.fields.String(allow_none=True)
    checkpoint_ns = ma.fields.String(allow_none=True)
    checkpoint_id = Uuid(allow_none=True)
    checkpoint_map = Map(keys=ma.fields.String(), values=ma.fields.String(), allow_none=True)

    @ma.post_load
    def as_strings(self, data: dict[str, Any], **_: object) -> dict[str, Any]:
        if data.get("checkpoint_id"):
            data["checkpoint_id"] = str(data["checkpoint_id"])
        return data
