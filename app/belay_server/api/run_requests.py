"""What a request asks for, as a run to create: the same for one, for many, and for a cron."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from flask import request

from belay_server.api.authentication import caller
from belay_server.api.authorization import authorize, is_confined
from belay_server.api.limits import asker
from belay_server.api.parts import parts
from belay_server.api.request_context import request_id
from belay_server.domain.errors import BadRequest, InvalidRequest
from belay_server.domain.ids import parse_uuid
from belay_server.services.run_creates import RunRequest
from belay_server.services.webhooks import refuse_bad_webhook

_LONGEST_KEY = 255
#: Of a create-run body, what an authorization handler sees as `kwargs`.
_KWARGS = ("input", "command", "config", "context", "checkpoint", "webhook", "durability")


def idempotency_key() -> str | None:
    """The header that makes a create safe to send again. Raises InvalidRequest."""
    key = request.headers.get("idempotency-key", "").strip()
    if len(key) > _LONGEST_KEY:
        raise InvalidRequest(f"Idempotency-Key must be at most {_LONGEST_KEY} characters")
    return key or None


def run_request(body: dict[str, Any], thread_id: UUID | None) -> RunRequest:
    """Raises BadRequest for an answer to a question of no thread."""
    if thread_id is None and (body.get("command") or {}).get("resume") is not None:
        raise BadRequest("You must provide a thread_id when resuming.")
    check_webhook(body)
    maker = authorize_runs(body, thread_id)
    return RunRequest(
        body=body,
        thread_id=thread_id,
        request_id=request_id(),
        idempotency_key=idempotency_key(),
        configurable=parts().graphs.project.configurable_headers.pick(dict(request.headers)),
        caller=maker.caller or (asker() if parts().settings.max_pending_runs else None),
        user=maker.user,
        thread_metadata=maker.thread_metadata,
        key_scope=_key_scope(),
    )


def _key_scope() -> str:
    """Whose Idempotency-Keys they are: another's, of the same text, are other keys."""
    who = caller()
    return "" if who is None else who.name


@dataclass(frozen=True, slots=True)
class Maker:
    """Who makes runs, and what the threads that are made for them are marked with."""

    caller: str | None
    user: Mapping[str, Any] | None
    thread_metadata: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        return {"caller": self.caller, "user": self.user, "thread_metadata": self.thread_metadata}


def authorize_runs(body: dict[str, Any], thread_id: UUID | None) -> Maker:
    """May this be run, by this assistant, on this thread? Raises Forbidden, Refused."""
    who = caller()
    if who is None:
        return Maker(None, None, {})
    if not is_confined():
        return Maker(who.name, who.user, {})
    stamped = _authorize_run(body, thread_id)
    authorize("assistants", "read", {"assistant_id": _id_or_name(body["assistant_id"])})
    if thread_id is None or body.get("if_not_exists") == "create":
        made: dict[str, Any] = {"thread_id": thread_id, "metadata": dict(stamped)}
        authorize("threads", "create", made)
        stamped = dict(made.get("metadata") or {})
    return Maker(who.name, who.user, stamped)


def _authorize_run(body: dict[str, Any], thread_id: UUID | None) -> dict[str, Any]:
    """Returns what the handler has put into the metadata."""
    asked = dict(body.get("metadata") or {})
    kwargs = {name: body.get(name) for name in _KWARGS if body.get(name) is not None}
    value: dict[str, Any] = {
        "thread_id": thread_id,
        "assistant_id": _id_or_name(body["assistant_id"]),
        "run_id": body.get("run_id"),
        "status": "pending",
        "metadata": dict(asked),
        "prevent_insert_if_inflight": body.get("multitask_strategy") == "reject",
        "multitask_strategy": body.get("multitask_strategy"),
        "if_not_exists": body.get("if_not_exists"),
        "after_seconds": body.get("after_seconds") or 0,
        "kwargs": kwargs,
    }
    authorize("threads", "create_run", value)
    body["metadata"] = dict(value.get("metadata") or {})
    body.update({name: kwargs[name] for name in _KWARGS if name in kwargs})
    return {k: v for k, v in body["metadata"].items() if k not in asked or asked[k] != v}


def _id_or_name(named: str) -> UUID | str:
    try:
        return parse_uuid(named)
    except ValueError:
        return named


def check_webhook(body: dict[str, Any]) -> None:
    """Raises InvalidRequest for a webhook that may not be called."""
    if not body.get("webhook"):
        return
    if not parts().graphs.project.http.serves("webhooks"):
        raise InvalidRequest("webhook: this server makes no calls (http.disable_webhooks)")
    refuse_bad_webhook(parts().webhook_policy, body["webhook"], parts().host_names)
