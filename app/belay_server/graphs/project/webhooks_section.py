"""The `webhooks` section of `langgraph.json`: which URLs are allowed, and what each call has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from belay_server.domain.webhooks import (
    LOOPBACK,
    PAYLOAD_FIELDS,
    PRIVATE,
    WebhookPolicy,
)
from belay_server.graphs.project.loading import ProjectError

#: `${{ env.NAME }}` in the value of a header.
_TEMPLATE = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")
_VARIABLE = re.compile(r"env\.([A-Za-z_][A-Za-z0-9_]*)")
#: A header's name and its value (RFC 9110, in ASCII).
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[\t\x20-\x7e]*")
_PREFIX = "LG_WEBHOOK_"


@dataclass(frozen=True, slots=True)
class WebhooksConfig:
    """The project's configuration of webhooks."""

    policy: WebhookPolicy = field(default_factory=WebhookPolicy)
    #: Headers that every call has, with lower-case names.
    headers: Mapping[str, str] = field(default_factory=dict)
    #: The fields of the payload that are sent. None: all.
    fields: frozenset[str] | None = None


def read_webhooks_config(path: Path, webhooks: Any, environ: Mapping[str, str]) -> WebhooksConfig:
    """Read the `webhooks` section. `environ` has the variables of the templates in `headers`.

    Raise ProjectError with the name of the entry that is wrong.
    """
    if webhooks is None:
        return WebhooksConfig()
    if not isinstance(webhooks, dict):
        raise ProjectError(f"{path}: 'webhooks' must be an object")
    prefix = webhooks.get("env_prefix", _PREFIX)
    if not isinstance(prefix, str):
        raise ProjectError(f"{path}: 'webhooks.env_prefix' must be a string")
    headers = webhooks.get("headers") or {}
    if not isinstance(headers, dict) or not all(isinstance(v, str) for v in headers.values()):
        raise ProjectError(f"{path}: 'webhooks.headers' must map names to values")
    return WebhooksConfig(
        policy=_policy(path, webhooks.get("url") or {}),
        headers={
            name.lower(): _checked(
                path, name, _resolved(f"{path}: 'webhooks.headers.{name}'", value, prefix, environ)
            )
            for name, value in headers.items()
        },
        fields=_fields(path, webhooks.get("allowed_fields")),
    )


def _policy(path: Path, url: Any) -> WebhookPolicy:
    if not isinstance(url, dict):
        raise ProjectError(f"{path}: 'webhooks.url' must be an object")
    domains, ports = url.get("allowed_domains") or [], url.get("allowed_ports") or []
    if not isinstance(domains, list) or not all(isinstance(d, str) for d in domains):
        raise ProjectError(f"{path}: 'webhooks.url.allowed_domains' must be a list of domains")
    if not isinstance(ports, list) or not all(isinstance(p, int) for p in ports):
        raise ProjectError(f"{path}: 'webhooks.url.allowed_ports' must be a list of ports")
    allows_loopback = _flag(path, url, "disable_loopback") is False
    allowed = {LOOPBACK} if allows_loopback else set()
    if _flag(path, url, "disable_private_ips") is False:
        allowed.add(PRIVATE)
    return WebhookPolicy(
        https_only=bool(url.get("require_https")),
        allowed_ranges=frozenset(allowed),
        allows_paths=allows_loopback,
        allowed_domains=tuple(domains),
        allowed_ports=tuple(ports),
        longest_url=int(url.get("max_url_length") or WebhookPolicy().longest_url),
    )


def _flag(path: Path, url: Mapping[str, Any], name: str) -> bool | None:
    value = url.get(name)
    if value is not None and not isinstance(value, bool):
        raise ProjectError(f"{path}: 'webhooks.url.{name}' must be true or false")
    return value


def _checked(path: Path, name: str, value: str) -> str:
    """Return the value of a header. Raise ProjectError for a header that cannot be sent."""
    if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
        raise ProjectError(f"{path}: 'webhooks.headers.{name}' is no valid HTTP header")
    return value


def _resolved(who: str, value: str, prefix: str, environ: Mapping[str, str]) -> str:
    """Return the value of a header with the values of the variables that its templates name."""

    def variable(found: re.Match[str]) -> str:
        named = _VARIABLE.fullmatch(found[1])
        if named is None:
            raise ProjectError(f"{who}: a template must be ${{{{ env.NAME }}}}, not {found[0]}")
        name = named[1]
        if not name.startswith(prefix):
            raise ProjectError(
                f"{who}: the variable {name} must start with {prefix} (webhooks.env_prefix)"
            )
        if name not in environ:
            raise ProjectError(f"{who}: the variable {name} is not set")
        return environ[name]

    return _TEMPLATE.sub(variable, value)


def _fields(path: Path, fields: Any) -> frozenset[str] | None:
    if fields is None:
        return None
    if not isinstance(fields, list) or not all(isinstance(name, str) for name in fields):
        raise ProjectError(f"{path}: 'webhooks.allowed_fields' must be a list of names")
    if unknown := sorted(set(fields) - PAYLOAD_FIELDS):
        known = ", ".join(sorted(PAYLOAD_FIELDS))
        raise ProjectError(f"{path}: 'webhooks.allowed_fields': {unknown[0]} is none of {known}")
    return frozenset(fields) or None
