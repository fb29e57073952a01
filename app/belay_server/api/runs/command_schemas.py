"""The schema of commands to a graph."""

from __future__ import annotations

from typing import Any

import marshmallow as ma

#: LangGraph takes minutes to prepare tens of thousands of tasks.
_MOST_TARGETS = 1_000


class Command(ma.Schema):
    """A command to a graph: resume an interrupt, update the state, go to a node."""

    update = ma.fields.Raw(allow_none=True)
    resume = ma.fields.Raw(allow_none=True)
    goto = ma.fields.Raw(allow_none=True)

    @ma.post_load
    def nothing_is_no_command(self, data: dict[str, Any], **_: object) -> dict[str, Any] | None:
        says = data.get("resume") is not None or data.get("update") or data.get("goto")
        return data if says else None

    @ma.validates_schema
    def goto_names_nodes(self, data: dict[str, Any], **_: object) -> None:
        goto = data.get("goto")
        if isinstance(goto, list) and len(goto) > _MOST_TARGETS:
            raise ma.ValidationError(f"may have at most {_MOST_TARGETS:,} targets", "goto")
        for target in goto if isinstance(goto, list) else [goto]:
            is_send = isinstance(target, dict) and isinstance(target.get("node"), str)
            if target is not None and not isinstance(target, str) and not is_send:
                raise ma.ValidationError("must be a node's name or {node, input}", "goto")

    @ma.validates_schema
    def update_is_a_state(self, data: dict[str, Any], **_: object) -> None:
        update = data.get("update")
        pairs = isinstance(update, list) and all(
            isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)
            for pair in update
        )
        if update is not None and not isinstance(update, dict) and not pairs:
            raise ma.ValidationError("must be an object or a list of [key, value]", "update")
