"""Merge the options of a run with its assistant's into the arguments of its attempts.

Keys that only the server may set are removed from the client's options and set here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from belay_server.domain.access import AUTH_USER
from belay_server.domain.assistants import Assistant
from belay_server.domain.errors import BadRequest
from belay_server.domain.run_options import (
    LANGSMITH_EXAMPLE,
    LANGSMITH_PROJECT,
    Durability,
    RunKwargs,
    RunOptions,
)
from belay_server.domain.threads import ThreadDefaults

#: Keys of metadata that only the server sets.
RESERVED_METADATA = frozenset({"assistant_id", "thread_id", "run_id", "cron_id"})
_RESERVED_CONFIGURABLE = frozenset(
    {
        "thread_id",
        "run_id",
        "graph_id",
        "assistant_id",
        "checkpoint_ns",
        "checkpoint_map",
        "checkpoint_id",
    }
)


@dataclass(frozen=True, slots=True)
class MergedRun:
    """The merged options for a new run's row.

    `thread_config` becomes the config of its thread. If the run is the thread's first, later runs
    inherit `thread_configurable`.
    """

    kwargs: RunKwargs
    metadata: dict[str, Any]
    thread_config: dict[str, Any]
    thread_configurable: dict[str, Any]


def build_run_kwargs(
    options: RunOptions,
    *,
    assistant: Assistant,
    thread: ThreadDefaults,
    run_id: UUID,
    request_id: str,
    headers: Mapping[str, str],
    user: Mapping[str, Any] | None,
    temporary: bool,
    defaults: Mapping[str, Any],
) -> MergedRun:
    """Merge a run's options with its thread's defaults and its assistant's config and context.

    The run's options take precedence over the thread's, those over the assistant's, and those over
    `defaults`: the `config` and `context` that the project sets for the graph. `headers` are the
    request headers that the project copies into `configurable`. `user` is the user that the
    project's authentication returned; its identity is the default of `user_id`, which clients may
    set as they like.

    Raises BadRequest when the options have both a context and a `configurable`.
    """
    config = options.config or {}
    if options.context and config.get("configurable"):
        raise BadRequest(
            "Cannot specify both configurable and context. Prefer setting context alone. "
            "Context was introduced in LangGraph 0.6.0 and is the long term planned replacement "
            "for configurable."
        )
    metadata = _metadata(options, assistant, thread)
    shared_config = _config(config, assistant)
    configurable = {
        **(defaults.get("configurable") or {}),
        **_open_configurable(assistant.config),
        **_open(thread.configurable),
        **(_open_configurable(config) or _open(options.context or {})),
    }
    identity = str((user or {}).get("identity") or "")
    of_the_server: dict[str, Any] = {
        AUTH_USER: user,
        "langgraph_auth_user_id": identity,
        "langgraph_auth_permissions": list((user or {}).get("permissions") or []),
        "langgraph_request_id": request_id,
        "__request_start_time_ms__": int(time.time() * 1000),
        "__after_seconds__": options.after_seconds or 0,
        "run_id": str(run_id),
        "thread_id": str(thread.thread_id),
        "graph_id": assistant.graph_id,
        "assistant_id": str(assistant.assistant_id),
    }
    of_the_server |= _langsmith(options)
    merged = {
        **shared_config,
        "configurable": {
            "user_id": identity,
            **configurable,
            **headers,
            **_checkpoint_keys(options),
            **of_the_server,
        },
        "metadata": {**_without(config.get("metadata") or {}, RESERVED_METADATA), **metadata},
    }
    context = {
        **(defaults.get("context") or defaults.get("configurable") or {}),
        **assistant.context,
        **(options.context or _open_configurable(config)),
    }
    return MergedRun(
        kwargs=_kwargs(options, merged, context, temporary=temporary),
        metadata=metadata,
        thread_config={**shared_config, "configurable": configurable},
        thread_configurable=_open_configurable(assistant.config),
    )


def _langsmith(options: RunOptions) -> dict[str, Any]:
    tracer = options.langsmith_tracer or {}
    named = {
        LANGSMITH_PROJECT: tracer.get("project_name"),
        LANGSMITH_EXAMPLE: tracer.get("example_id"),
    }
    return {key: value for key, value in named.items() if value is not None}


def _metadata(options: RunOptions, assistant: Assistant, thread: ThreadDefaults) -> dict[str, Any]:
    return {
        **assistant.metadata,
        **_without(thread.metadata, RESERVED_METADATA),
        "graph_id": assistant.graph_id,
        **_without(options.metadata or {}, RESERVED_METADATA),
        "assistant_id": str(assistant.assistant_id),
    }


def _config(config: Mapping[str, Any], assistant: Assistant) -> dict[str, Any]:
    """Return the merged config without `configurable` and `metadata`: tags, recursion limit and the
    like."""
    merged = {
        **{k: v for k, v in assistant.config.items() if k != "configurable"},
        **{k: v for k, v in config.items() if k not in ("configurable", "metadata")},
    }
    if tags := [*(assistant.config.get("tags") or []), *(config.get("tags") or [])]:
        merged["tags"] = list(dict.fromkeys(tags))
    return merged


def _kwargs(
    options: RunOptions, config: dict[str, Any], context: dict[str, Any], *, temporary: bool
) -> RunKwargs:
    return RunKwargs(
        input=options.input,
        command=options.command,
        config=config,
        context=context,
        stream_mode=options.stream_mode or ["values"],
        interrupt_before=options.interrupt_before,
        interrupt_after=options.interrupt_after,
        webhook=options.webhook,
        feedback_keys=options.feedback_keys,
        temporary=temporary,
        subgraphs=bool(options.stream_subgraphs),
        resumable=bool(options.stream_resumable),
        checkpoint_during=options.checkpoint_during is not False,
        durability=_durability(options),
        strict_resume=bool(options.strict_resume),
        output_schema=options.output_schema,
    )


def _durability(options: RunOptions) -> str:
    if options.durability:
        return options.durability
    return Durability.EXIT if options.checkpoint_during is False else Durability.ASYNC


def _without(mapping: Mapping[str, Any], keys: frozenset[str]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in keys}


def _open_configurable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of `configurable` that clients may set."""
    return _open(config.get("configurable") or {})


def _open(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in mapping.items()
        if key not in _RESERVED_CONFIGURABLE and not key.startswith(("__", "langgraph_"))
    }


def _checkpoint_keys(options: RunOptions) -> dict[str, Any]:
    """Return the checkpoint to start from: `checkpoint`, `checkpoint_id`, or the config's own."""
    configurable = (options.config or {}).get("configurable") or {}
    checkpoint = options.checkpoint or {}
    checkpoint_id = (
        checkpoint.get("checkpoint_id")
        or options.checkpoint_id
        or configurable.get("checkpoint_id")
    )
    keys = {"checkpoint_id": str(checkpoint_id)} if checkpoint_id else {}
    for key in ("checkpoint_ns", "checkpoint_map"):
        if checkpoint.get(key):
            keys[key] = checkpoint[key]
    return keys
