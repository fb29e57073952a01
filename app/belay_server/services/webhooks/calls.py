"""Validate webhook URLs, and make webhook calls.

A call is a POST request with a JSON body, signed according to the Standard Webhooks specification.
A receiver may get duplicates of a call, always with the same id.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import httpcore

from belay_server.db.webhooks import WebhookCall
from belay_server.domain.access import AUTH_USER, without_secrets
from belay_server.domain.errors import InvalidRequest
from belay_server.domain.runs import RUN_FIELDS
from belay_server.domain.webhooks import (
    LOOPBACK,
    Address,
    WebhookPolicy,
    WebhookTarget,
    check_path,
    is_local_name,
    is_path,
    parse_target,
)
from belay_server.graphs.serde import to_json
from belay_server.services.webhooks.deadline_http import ERRORS, post
from belay_server.services.webhooks.host_names import HostNames

#: The time limit of a call, from connecting to the response headers.
CALL_SECONDS = 10.0
_SECRET_PREFIX = "whsec_"  # noqa: S105  (the specification's prefix of a secret)


class CallFailed(Exception):
    """The call did not get a 2xx response; the message has the reason."""


def refuse_bad_webhook(
    policy: WebhookPolicy, url: str, names: HostNames, caller: str | None = None
) -> None:
    """Raise InvalidRequest for a URL that may not be called. A name that cannot be resolved is
    accepted: it is looked up again when the call is made. `caller` is whose limit of look-ups
    applies."""
    try:
        if is_path(url):
            check_path(url, policy)
            return
        target = parse_target(url, policy)
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
    if policy.allow_private:
        return
    if is_local_name(target.host) and LOOPBACK not in policy.allowed_ranges:
        raise InvalidRequest(f"Webhook host blocked: {LOOPBACK}")
    try:
        addresses = names.look_up(target.host, target.port, caller=caller)
    except OSError:
        return
    for address in addresses:
        if (kind := policy.refuses(address)) is not None:
            raise InvalidRequest(f"Webhook host blocked: {kind}")


def _address_to_call(target: WebhookTarget, policy: WebhookPolicy, names: HostNames) -> Address:
    """Return the address to connect to. The call connects to this address, not to the name, so that
    a second look-up cannot return a blocked one. Raises CallFailed."""
    try:
        addresses = names.look_up(target.host, target.port)
    except OSError as error:
        raise CallFailed(f"cannot resolve '{target.host}': {error}") from error
    blocked = [kind for address in addresses if (kind := policy.refuses(address))]
    if blocked:
        raise CallFailed(f"host blocked: {blocked[0]}")
    return addresses[0]


@dataclass(frozen=True, slots=True)
class CallSettings:
    """How all calls are made."""

    policy: WebhookPolicy
    #: Where the web process is reached, for webhooks that are a path.
    internal_url: str
    secret: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    #: The fields of the payload that are sent. None: all.
    fields: frozenset[str] | None = None


def make_call(call: WebhookCall, settings: CallSettings, names: HostNames) -> None:
    """Make a webhook call. Raises CallFailed."""
    policy = settings.policy
    try:
        if is_path(call.url):
            check_path(call.url, policy)
            policy = WebhookPolicy(allow_private=True)
            target = parse_target(settings.internal_url + call.url, policy)
        else:
            target = parse_target(call.url, policy)
    except ValueError as error:
        raise CallFailed(str(error)) from error
    address = _address_to_call(target, policy, names)
    payload = payload_of(call.run)
    if settings.fields is not None:
        payload = {name: value for name, value in payload.items() if name in settings.fields}
    body = to_json(payload)
    request_headers = {
        **settings.headers,
        "host": target.authority,
        "content-type": "application/json",
        "user-agent": "belay-webhook",
        **signed_headers(call.call_id, body, settings.secret),
    }
    try:
        # Proxies and redirects would send the call to an address that was not checked.
        status = post(
            _url(target, address),
            body=body,
            headers=request_headers,
            sni_hostname=target.host,
            seconds=CALL_SECONDS,
        )
    except ERRORS as error:
        raise CallFailed(f"{type(error).__name__}: {error}") from error
    if not 200 <= status < 300:
        raise CallFailed(f"the receiver returned status {status}")


def _url(target: WebhookTarget, address: Address) -> httpcore.URL:
    """Return the target's URL with the address in place of its host name."""
    return httpcore.URL(
        scheme=target.scheme, host=str(address), port=target.port, target=target.path
    )


def signed_headers(call_id: UUID, body: bytes, secret: str | None) -> dict[str, str]:
    """Return `webhook-id`, `webhook-timestamp` and, with a secret, `webhook-signature`, as the
    Standard Webhooks specification defines them."""
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
    """Return the JSON payload of a run: its fields, its values and its error."""
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
    """Return the kwargs without the user's data from the project's authentication, and without the
    credentials of the request's headers."""
    config = dict(kwargs.get("config") or {})
    configurable = without_secrets(config.get("configurable") or {})
    configurable.pop(AUTH_USER, None)
    return {**kwargs, "config": {**config, "configurable": configurable}}
