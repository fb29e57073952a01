"""Authorize the creation of runs: a single run, a batch, and the runs of a cron."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import unquote
from uuid import UUID

from flask import current_app, request
from werkzeug.exceptions import MethodNotAllowed, NotFound
from werkzeug.routing import RequestRedirect

from belay_server.api.context import context, parts
from belay_server.api.http.request_context import request_id
from belay_server.api.security.authentication import caller, parent_run
from belay_server.api.security.authorization import authorize, is_confined
from belay_server.api.security.limits import asker
from belay_server.domain.access import EVERYTHING, Access, Caller
from belay_server.domain.errors import BadRequest, InvalidRequest
from belay_server.domain.ids import parse_uuid
from belay_server.domain.run_options import MultitaskStrategy, RunOptions
from belay_server.domain.webhooks import is_path
from belay_server.services.runs.creation import RunRequest
from belay_server.services.webhooks.calls import refuse_bad_webhook

_LONGEST_KEY = 255
#: The options that an authorization handler sees as `kwargs`.
_KWARGS = ("input", "command", "config", "context", "checkpoint", "webhook", "durability")


def idempotency_key() -> str | None:
    """Return the Idempotency-Key header, which makes a create safe to retry; None without one.

    Raises InvalidRequest.
    """
    key = request.headers.get("idempotency-key", "").strip()
    if len(key) > _LONGEST_KEY:
        raise InvalidRequest(f"Idempotency-Key must be at most {_LONGEST_KEY} characters")
    return key or None


def run_request(options: RunOptions, thread_id: UUID | None) -> RunRequest:
    """Authorize a run, and add to its options what the server derives from the request.

    Raises BadRequest when a run without a thread resumes an interrupt, InvalidRequest for its
    webhook or Idempotency-Key, Forbidden, Refused.
    """
    if thread_id is None and options.resumes:
        raise BadRequest("You must provide a thread_id when resuming.")
    check_webhook(options.webhook)
    if (parent := parent_run()) is not None:
        metadata = {**(options.metadata or {}), "parent_run_id": str(parent)}
        options = dataclasses.replace(options, metadata=metadata)
    options, maker = authorize_runs(options, thread_id)
    return RunRequest(
        options=options,
        thread_id=thread_id,
        request_id=request_id(),
        idempotency_key=idempotency_key(),
        headers=parts().graphs.project.configurable_headers.pick(dict(request.headers)),
        caller=maker.caller or (asker() if parts().settings.max_pending_runs else None),
        user=maker.user,
        creator=maker.creator,
        thread_metadata=maker.thread_metadata,
        key_scope=_key_scope(),
    )


def _key_scope() -> str:
    """Return the scope of Idempotency-Keys, the caller's name: equal keys of two callers are
    different keys."""
    who = caller()
    return "" if who is None else who.name


@dataclass(frozen=True, slots=True)
class Maker:
    """The caller and the user that runs are created for, and the metadata of threads that are
    created for them."""

    caller: str | None
    user: Mapping[str, Any] | None
    thread_metadata: dict[str, Any]
    #: What `Caller.as_creator` returns; None without authentication.
    creator: Mapping[str, Any] | None = None
    #: The threads and assistants that the caller may access. A cron's later runs may access no
    #: others.
    access: Access = EVERYTHING

    @classmethod
    def of(cls, who: Caller, thread_metadata: dict[str, Any], access: Access = EVERYTHING) -> Self:
        return cls(who.name, who.user, thread_metadata, who.as_creator(), access)

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def authorize_runs(options: RunOptions, thread_id: UUID | None) -> tuple[RunOptions, Maker]:
    """Authorize runs with these options on this thread. Return the options as the project's
    handlers have changed them, and the Maker of the runs.

    Raises Forbidden, Refused.
    """
    who = caller()
    if who is None:
        return options, Maker(None, None, {})
    if not is_confined():
        return options, Maker.of(who, {})
    options, stamped = _authorize_run(options, thread_id)
    authorize("assistants", "read", {"assistant_id": _id_or_name(options.assistant_id)})
    if thread_id is None or options.if_not_exists == "create":
        created: dict[str, Any] = {"thread_id": thread_id, "metadata": dict(stamped)}
        authorize("threads", "create", created)
        stamped = dict(created.get("metadata") or {})
    access = parts().database.access
    within = Access(threads=access.threads, assistants=access.assistants)
    return options, Maker.of(who, stamped, within)


def _authorize_run(
    options: RunOptions, thread_id: UUID | None
) -> tuple[RunOptions, dict[str, Any]]:
    """Return the options as the handler has changed them, and the metadata that it has added."""
    given = dict(options.metadata or {})
    kwargs = authorized_options(options)
    kwargs.pop("metadata", None)
    value: dict[str, Any] = {
        "thread_id": thread_id,
        "assistant_id": _id_or_name(options.assistant_id),
        "run_id": options.run_id,
        "status": "pending",
        "metadata": dict(given),
        "prevent_insert_if_inflight": options.strategy is MultitaskStrategy.REJECT,
        "multitask_strategy": options.multitask_strategy,
        "if_not_exists": options.if_not_exists,
        "after_seconds": options.after_seconds or 0,
        "kwargs": kwargs,
    }
    authorize("threads", "create_run", value)
    metadata = dict(value.get("metadata") or {})
    changed = {name: kwargs[name] for name in _KWARGS if name in kwargs}
    added = {k: v for k, v in metadata.items() if k not in given or given[k] != v}
    return dataclasses.replace(options, metadata=metadata, **changed), added


def authorized_options(options: RunOptions) -> dict[str, Any]:
    """Return the options that are set and that an authorization handler may change."""
    named = {name: getattr(options, name) for name in ("metadata", *_KWARGS)}
    return {name: value for name, value in named.items() if value is not None}


def _id_or_name(named: str) -> UUID | str:
    try:
        return parse_uuid(named)
    except ValueError:
        return named


def check_webhook(url: str | None) -> None:
    """Raise InvalidRequest for a webhook that may not be called."""
    if not url:
        return
    if not parts().graphs.project.http.serves("webhooks"):
        raise InvalidRequest("webhook: this server has webhooks disabled (http.disable_webhooks)")
    refuse_bad_webhook(parts().webhook_policy, url, context().host_names, asker())
    if is_path(url) and (context().project_routes is None or _is_route_of_belay(url)):
        raise InvalidRequest("A webhook that is a path must be a route of the project's http.app")


def _is_route_of_belay(url: str) -> bool:
    """Return whether a path is one of Belay's own routes, which no webhook may call."""
    path = unquote(url.partition("?")[0])
    try:
        current_app.url_map.bind("").match(path, method="POST")
    except NotFound:
        return False
    except (MethodNotAllowed, RequestRedirect):
        return True
    return True
