"""The schemas of version 2 of the streaming protocol: commands, responses and subscriptions."""

from __future__ import annotations

from typing import Any

import marshmallow as ma

from belay_server.api.http.fields import Body, Integer, List, Object, one_of
from belay_server.api.runs.command_schemas import Command
from belay_server.api.runs.config_schemas import RunConfig
from belay_server.domain.run_options import MultitaskStrategy
from belay_server.graphs.protocol.events import CHANNELS, is_channel

_MOST_SAFE_INTEGER = 2**53 - 1
#: Limits of one subscription, which is held in memory and compared with each event.
_MOST_NAMES = 1_000
_MOST_CHARACTERS = 32 * 1024
_STRATEGY = one_of(*MultitaskStrategy)


class CommandFrame(Body):
    """A command: its id, which the response repeats, its method, and the method's parameters."""

    id = Integer(required=True)
    method = ma.fields.String(required=True)
    params = Object(load_default=dict)


class CommandMeta(ma.Schema):
    """The `meta` of a success. `applied_through_seq` is always 0."""

    applied_through_seq = ma.fields.Integer()


class CommandAnswer(ma.Schema):
    """`success` with a result, or `error` with a code and a message."""

    type = ma.fields.String(required=True, validate=one_of("success", "error"))
    id = ma.fields.Integer(required=True, allow_none=True)
    result = Object()
    error = ma.fields.String()
    message = ma.fields.String()
    meta = ma.fields.Nested(CommandMeta)


class RunStart(Body):
    """The parameters of `run.start`. The multitask strategy may have either of its two names."""

    assistant_id = ma.fields.String(required=True)
    input = ma.fields.Raw(allow_none=True)
    config = ma.fields.Nested(RunConfig, allow_none=True)
    metadata = Object(allow_none=True)
    multitask_strategy = ma.fields.String(validate=_STRATEGY, allow_none=True)
    multitaskStrategy = ma.fields.String(validate=_STRATEGY, allow_none=True)  # noqa: N815  (the protocol's name)


class _Answer(Body):
    interrupt_id = ma.fields.String(required=True)
    response = ma.fields.Raw(required=True, allow_none=True)


class InputRespond(Body):
    """One response to an interrupt, or several in `responses`, and options of the resumed run."""

    interrupt_id = ma.fields.String()
    response = ma.fields.Raw(allow_none=True)
    responses = List(ma.fields.Nested(_Answer), validate=ma.validate.Length(1, 1000))
    update = ma.fields.Raw(allow_none=True)
    goto = ma.fields.Raw(allow_none=True)
    config = ma.fields.Nested(RunConfig, allow_none=True)
    metadata = Object(allow_none=True)

    @ma.validates_schema
    def validate_answer(self, data: dict[str, Any], **_: object) -> None:
        one = "interrupt_id" in data and "response" in data
        if one == ("responses" in data):
            raise ma.ValidationError(
                "input.respond requires interrupt_id and response, or responses."
            )
        Command().load({"update": data.get("update"), "goto": data.get("goto")})

    @ma.post_load
    def by_interrupt(self, data: dict[str, Any], **_: object) -> dict[str, Any]:
        responses = data.pop("responses", None) or [data]
        answers = {answer["interrupt_id"]: answer["response"] for answer in responses}
        return {**data, "answers": answers}


class Channels(ma.fields.Field[tuple[str, ...]]):
    """A list of channel names; duplicates are removed."""

    def _deserialize(self, value: Any, attr: Any, data: Any, **kwargs: Any) -> tuple[str, ...]:
        if not isinstance(value, list) or not value:
            raise ma.ValidationError("is required and must be a non-empty array")
        refuse_many_names(value)
        unknown = [str(one) for one in value if not isinstance(one, str) or not is_channel(one)]
        if unknown:
            raise ma.ValidationError(
                f"contains unsupported entries: {', '.join(unknown)}. Allowed: "
                f"{', '.join(CHANNELS)}, or any `custom:<name>`."
            )
        return tuple(dict.fromkeys(value))


class Namespaces(ma.fields.Field[tuple[tuple[str, ...], ...]]):
    """A list of subgraphs' namespaces, each a list of names; duplicates are removed."""

    def _deserialize(
        self, value: Any, attr: Any, data: Any, **kwargs: Any
    ) -> tuple[tuple[str, ...], ...]:
        if not isinstance(value, list):
            raise ma.ValidationError("Not a valid list.")
        refuse_many_names(value)
        for index, namespace in enumerate(value):
            if not isinstance(namespace, list):
                raise ma.ValidationError({index: ["Not a valid list."]})
        refuse_many_names([name for namespace in value for name in namespace])
        for index, namespace in enumerate(value):
            if not all(isinstance(name, str) for name in namespace):
                raise ma.ValidationError({index: ["Not a list of strings."]})
        return tuple(dict.fromkeys(tuple(namespace) for namespace in value))


def refuse_many_names(names: list[Any]) -> None:
    """Raise ValidationError for more names, or longer ones, than a subscription may have."""
    if len(names) > _MOST_NAMES:
        raise ma.ValidationError(f"has {len(names):,} entries; at most {_MOST_NAMES:,} are allowed")
    characters = sum(len(name) for name in names if isinstance(name, str))
    if characters > _MOST_CHARACTERS:
        raise ma.ValidationError(
            f"has {characters:,} characters in all; at most {_MOST_CHARACTERS:,} are allowed"
        )


class EventStream(Body):
    """The events of a thread to stream."""

    channels = Channels(
        required=True,
        metadata={
            "type": "array",
            "items": {"type": "string"},
            "minItems": 1,
            "description": f"Any of {', '.join(CHANNELS)}, checkpoints, or `custom:<name>`.",
        },
    )
    namespaces = Namespaces(
        allow_none=True,
        metadata={
            "type": "array",
            "items": {"type": "array", "items": {"type": "string"}},
            "description": f"At most {_MOST_NAMES:,} names in all.",
        },
    )
    depth = Integer(allow_none=True, validate=ma.validate.Range(0, 1000))
    since = Integer(allow_none=True, validate=ma.validate.Range(0, _MOST_SAFE_INTEGER))
