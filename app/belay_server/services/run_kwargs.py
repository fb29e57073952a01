"""What an attempt is given: the request, the assistant and the thread, merged and made safe.

The shape is the `kwargs` of a run as the reference shows it. Keys that only the server may set are
taken out of what a client sent and put in here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from belay_server.domain.assistants import Assistant
from belay_server.domain.errors import BadRequest

#: A client's metadata may not carry these; the server sets them.
RESERVED_METADATA = frozenset({"assistant_id", "thread_id", "run_id", "cron_id"})
_RESERVED_CONFIGURABLE = frozenset(
    {
        "thread_id",
        "run_id",
        "graph_id",
        "assistant_id",
        "user_id",
        "checkpoint_ns",
        "checkpoint_map",
        "checkpoint_id",
    }
)


@dataclass(frozen=True, slots=True)
class RunKwargs:
    """`kwargs` for the row, the run's metadata, and the config shown on its thread."""

    kwargs: dict[str, Any]
    metadata: dict[str, Any]
    thread_config: dict[str, Any]


def build_run_kwargs(
    body: dict[str, Any],
    *,
    assistant: Assistant,
    thread_id: UUID,
    run_id: UUID,
    request_id: str,
    given: dict[str, str],
    user: Mapping[str, Any] | None,
    temporary: bool,
    defaults: dict[str, Any],
) -> RunKwargs:
    """Merge a create-run body with its assistant; `given` goes into `configurable` as it is. `user`
    is who asks, as the project's own authentication describes them.

    Raises BadRequest for what contradicts itself.
    """
    asked = body.get("config") or {}
    if body.get("context") and asked.get("configurable"):
        raise BadRequest(
            "Cannot specify both configurable and context. Prefer setting context alone. "
            "Context was introduced in LangGraph 0.6.0 and is the long term planned replacement "
            "for configurable."
        )
    metadata = _metadata(body, assistant)
    options = _options(asked, assistant)
    configurable = {
        **(defaults.get("configurable") or {}),
        **_open_configurable(assistant.config),
        **(_open_configurable(asked) or _open(body.get("context") or {})),
    }
    identity = str((user or {}).get("identity") or "")
    of_the_server: dict[str, Any] = {
        "langgraph_auth_user": user,
        "langgraph_auth_user_id": identity,
        "langgraph_auth_permissions": list((user or {}).get("permissions") or []),
        "langgraph_request_id": request_id,
        "__request_start_time_ms__": int(time.time() * 1000),
        "__after_seconds__": body.get("after_seconds") or 0,
        "run_id": str(run_id),
        "thread_id": str(thread_id),
        "graph_id": assistant.graph_id,
        "assistant_id": str(assistant.assistant_id),
        "user_id": identity,
    }
    config = {
        **options,
        "configurable": {**configurable, **given, **_checkpoint_keys(body, asked), **of_the_server},
        "metadata": {**_without(asked.get("metadata") or {}, RESERVED_METADATA), **metadata},
    }
    context = {
        **(defaults.get("context") or defaults.get("configurable") or {}),
        **assistant.context,
        **(body.get("context") or _open_configurable(asked)),
    }
    return RunKwargs(
        kwargs=_kwargs(body, config, context, temporary=temporary),
        metadata=metadata,
        thread_config={**options, "configurable": configurable},
    )


def _metadata(body: dict[str, Any], assistant: Assistant) -> dict[str, Any]:
    return {
        **assistant.metadata,
        "graph_id": assistant.graph_id,
        **_without(body.get("metadata") or {}, RESERVED_METADATA),
        "assistant_id": str(assistant.assistant_id),
    }


def _options(asked: dict[str, Any], assistant: Assistant) -> dict[str, Any]:
    """The config without its `configurable`: tags, recursion limit and the like."""
    options = {
        **{k: v for k, v in assistant.config.items() if k != "configurable"},
        **{k: v for k, v in asked.items() if k not in ("configurable", "metadata")},
    }
    if tags := [*(assistant.config.get("tags") or []), *(asked.get("tags") or [])]:
        options["tags"] = list(dict.fromkeys(tags))
    return options


def _kwargs(
    body: dict[str, Any], config: dict[str, Any], context: dict[str, Any], *, temporary: bool
) -> dict[str, Any]:
    kwargs = {
        "input": body.get("input"),
        "command": body.get("command"),
        "config": config,
        "context": context,
        "stream_mode": body.get("stream_mode") or ["values"],
        "interrupt_before": body.get("interrupt_before"),
        "interrupt_after": body.get("interrupt_after"),
        "webhook": body.get("webhook"),
        "feedback_keys": body.get("feedback_keys"),
        "temporary": temporary,
        "subgraphs": bool(body.get("stream_subgraphs")),
        "resumable": bool(body.get("stream_resumable")),
        "checkpoint_during": body.get("checkpoint_during") is not False,
        "durability": _durability(body),
    }
    if body.get("strict_resume"):
        kwargs["strict_resume"] = True
    if body.get("output_schema") is not None:
        kwargs["output_schema"] = body["output_schema"]
    return kwargs


def _durability(body: dict[str, Any]) -> str:
    if body.get("durability"):
        return str(body["durability"])
    return "exit" if body.get("checkpoint_during") is False else "async"


def _without(mapping: dict[str, Any], keys: frozenset[str]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in keys}


def _open_configurable(config: dict[str, Any]) -> dict[str, Any]:
    """The part of `configurable` that belongs to the client."""
    return _open(config.get("configurable") or {})


def _open(mapping: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in mapping.items()
        if key not in _RESERVED_CONFIGURABLE and not key.startswith(("__", "langgraph_"))
    }


def _checkpoint_keys(body: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """From which checkpoint to go on: `checkpoint`, `checkpoint_id`, or the config's own."""
    configurable = asked.get("configurable") or {}
    checkpoint = body.get("checkpoint") or {}
    checkpoint_id = (
        checkpoint.get("checkpoint_id")
        or body.get("checkpoint_id")
        or configurable.get("checkpoint_id")
    )
    keys = {"checkpoint_id": str(checkpoint_id)} if checkpoint_id else {}
    for key in ("checkpoint_ns", "checkpoint_map"):
        if checkpoint.get(key):
            keys[key] = checkpoint[key]
    return keys
