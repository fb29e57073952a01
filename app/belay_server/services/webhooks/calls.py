"""Webhooks: which are accepted, and how a call is made.

A call is a POST of JSON, signed as the Standard Webhooks specification says. Its receiver may get
it more than once, always with the same id.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from belay_server.db.webhooks import WebhookCall
from belay_server.domain.errors import InvalidRequest
from belay_server.domain.runs import RUN_FIELDS
from belay_server.domain.webhooks import (
    Address,
    WebhookPolicy,
    WebhookTarget,
    blocked_range,
    is_local_name,
    parse_target,
)
from belay_server.graphs.serde import to_json
from belay_server.services.webhooks.deadline_http import ERRORS, post
from belay_server.services.webhooks.host_names import HostNames

#: For the whole call, from connecting to the answer's headers.
CALL_SECONDS = 10.0
_SECRET_PREFIX = "whsec_"  # noqa: S105  (what the specification puts before a secret)


class CallFailed(Exception):
    """The call was not answered with 2xx; the message says what came instead."""


def refuse_bad_webhook(
    policy: WebhookPolicy, url: str, names: HostNames, caller: str | None = None
) -> None:
    """Raise InvalidRequest for a URL that may not be called. A name that is not known now may be
    later: it is looked up again when the call is made. `caller` is whose look-up it is."""
    try:
        target = parse_target(url, policy)
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
    if policy.allow_private:
        return
    if is_local_name(target.host):
        raise InvalidRequest("Webhook host blocked: loopback IP range")
    try:
        addresses = names.look_up(target.host, target.port, caller=caller)
    except OSError:
        return
    for address in addresses:
        if (kind := blocked_range(address)) is not None:
            raise InvalidRequest(f"Webhook host blocked: {kind}")


def _address_to_call(target: WebhookTarget, policy: WebhookPolicy, names: HostNames) -> Address:
    """The address itself is connected to, so that nobody can answer the next look-up otherwise."""
    try:
        addresses = names.look_up(target.host, target.port)
    except OSError as error:
        raise CallFailed(f"'{target.host}' was not found: {error}") from error
    blocked = [kind for address in addresses if (kind := blocked_range(address))]
    if blocked and not policy.allow_private:
        raise CallFailed(f"host blocked: {blocked[0]}")
    return addresses[0]


def make_call(
    call: WebhookCall,
    policy: WebhookPolicy,
    names: HostNames,
    *,
    secret: str | None,
    headers: dict[str, str],
) -> None:
    """Raises CallFailed."""
    try:
        target = parse_target(call.url, policy)
    except ValueError as error:
        raise CallFailed(str(error)) from error
    address = _address_to_call(target, policy, names)
    host = f"[{address}]" if address.version == 6 else str(address)
    body = to_json(payload_of(call.run))
    request_headers = {
        **headers,
        "host": target.authority,
        "content-type": "application/json",
        "user-agent": "belay-webhook",
        **signed_headers(call.call_id, body, secret),
    }
    try:
        # No proxy of the environment, no redirects: the call goes where it was checked to go.
        status = post(
            f"{target.scheme}://{host}:{target.port}{target.path}",
            body=body,
            headers=request_headers,
            sni_hostname=target.host,
            seconds=CALL_SECONDS,
        )
    except ERRORS as error:
        raise CallFailed(f"{type(error).__name__}: {error}") from error
    if not 200 <= status < 300:
        raise CallFailed(f"answered with {status}")


def signed_headers(call_id: UUID, body: bytes, secret: str | None) -> dict[str, str]:
    """`webhook-id`, `webhook-timestamp` and, with a secret, `webhook-signature`."""
    timestamp = str(int(datetime.now(UTC).timestamp()))
    headers = {"webhook-id": str(call_id), "webhook-timestamp": timestamp}
    if secret is not None:
        signed = f"{call_id}.{timestamp}.".encode() + body
        digest = hmac.new(_key(secret), signed, hashlib.sha256).digest()
        headers["webhook-signature"] = f"v1,{base64.b64encode(digest).decode()}"
    return headers


def _key(secret: str) -> bytes:
    if secret.startswith(_SECRET_PREFIX):
        return base64.b64decode(secret.removeprefix(_SECRET_PREFIX))
    return secret.encode()


def payload_of(run: dict[str, Any]) -> dict[str, Any]:
    """The run, how it ended, and what it had reached."""
    outcome = run.get("outcome") or {}
    payload = {name: run.get(name) for name in RUN_FIELDS}
    payload["kwargs"] = _without_user(run.get("kwargs") or {})
    payload |= {
        "run_started_at": run.get("started_at"),
        "run_ended_at": run.get("ended_at"),
        "webhook_sent_at": datetime.now(UTC).isoformat(),
        "values": outcome.get("values"),
    }
    if run.get("error") is not None:
        payload["error"] = run["error"]
    return payload


def _without_user(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the project's authentication found out about its user stays here."""
    config = dict(kwargs.get("config") or {})
    configurable = dict(config.get("configurable") or {})
    if configurable.pop("langgraph_auth_user", None) is None:
        return kwargs
    return {**kwargs, "config": {**config, "configurable": configurable}}
