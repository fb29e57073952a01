"""Refuse to start a server that other machines can reach without authentication."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from pathlib import Path

import orjson

from belay_server.configuration.settings import SettingsError, config_path

OPEN = (
    "{address} can be reached from other machines, and authentication is off. Set BELAY_AUTH=keys "
    "(and create a key with `belay keys create --name me`), or configure the project's `auth`, or, "
    "if a reverse proxy authenticates the requests, set BELAY_AUTH=none"
)


def refuse_open_server(addresses: Iterable[str], environ: Mapping[str, str]) -> None:
    """Raise SettingsError if a bind address is not loopback and authentication is not configured.

    It is configured when BELAY_AUTH is set or the project's `langgraph.json` has an `auth`.
    """
    if environ.get("BELAY_AUTH", "").strip() or _has_auth(config_path(environ)):
        return
    for address in addresses:
        if not is_loopback(address):
            raise SettingsError(OPEN.format(address=address))


def is_loopback(host: str) -> bool:
    """Return whether a bind address is reachable from this machine only. Unix sockets are."""
    if host == "localhost" or host.startswith(("/", "unix:")):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _has_auth(config: Path) -> bool:
    """Return whether the project has an `auth`. Errors in the file are reported when it loads."""
    try:
        return bool(orjson.loads(config.read_bytes()).get("auth"))
    except (OSError, orjson.JSONDecodeError, AttributeError):
        return False
