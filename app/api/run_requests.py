"""What a request asks for, as a run to create: the same for one, for many, and for a cron."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from flask import request

from app.api.parts import parts
from app.api.request_context import request_id
from app.domain.errors import BadRequest, InvalidRequest
from app.services.runs import RunRequest
from app.services.webhooks import refuse_bad_webhook

_LONGEST_KEY = 255


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
    return RunRequest(
        body=body,
        thread_id=thread_id,
        request_id=request_id(),
        idempotency_key=idempotency_key(),
        configurable=parts().graphs.project.configurable_headers.pick(dict(request.headers)),
    )


def check_webhook(body: dict[str, Any]) -> None:
    """Raises InvalidRequest for a webhook that may not be called."""
    if not body.get("webhook"):
        return
    if not parts().graphs.project.http.serves("webhooks"):
        raise InvalidRequest("webhook: this server makes no calls (http.disable_webhooks)")
    refuse_bad_webhook(parts().webhook_policy, body["webhook"])
