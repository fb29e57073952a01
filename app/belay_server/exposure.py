"""A server that anybody may reach and nobody has to say who they are is not started by accident."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from pathlib import Path

import orjson

from belay_server.settings import SettingsError, config_path

OPEN = (
    "{address} can be reached from other machines, and nothing asks who calls. Set BELAY_AUTH=keys "
    "(and make a key with `belay keys create --name me`), or give the project an `auth`, or, where "
    "something in front of this server asks, set BELAY_AUTH=none"
)


def refuse_open_server(addresses: Iterable[str], environ: Mapping[str, str]) -> None:
    """Raises SettingsError when one of the addresses is not loopback and nobody has said who may
    call: BELAY_AUTH is not set, and the project has no `auth` of its own."""
    if environ.get("BELAY_AUTH", "").strip() or _has_auth(config_path(environ)):
        return
    for address in addresses:
        if not is_loopback(address):
            raise SettingsError(OPEN.format(address=address))


def is_loopback(host: str) -> bool:
    if host == "localhost" or host.startswith(("/", "unix:")):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _has_auth(config: Path) -> bool:
    """Whether the project has an `auth`; what is wrong with the file is said when it is loaded."""
    try:
        return bool(orjson.loads(config.read_bytes()).get("auth"))
    except (OSError, orjson.JSONDecodeError, AttributeError):
        return False
