"""Decide which URLs and addresses a webhook may call. No I/O: names are resolved elsewhere.

A webhook's URL comes from a client and is called from inside the operator's network. Addresses that
are reachable only from there (loopback, private and link-local ranges, the metadata services of
clouds) are refused: when the run is created, and again when the call connects to its address.
"""

from __future__ import annotations

import ipaddress
import string
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit

from belay_server.domain.runs import RUN_FIELDS

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

#: Ranges of IPv6 that embed an IPv4 address, and how many bits follow it.
_EMBEDDING = (
    (ipaddress.IPv6Network("::ffff:0:0:0/96"), 0),
    (ipaddress.IPv6Network("::/96"), 0),
    (ipaddress.IPv6Network("64:ff9b::/96"), 0),
    (ipaddress.IPv6Network("64:ff9b:1::/48"), 0),
    (ipaddress.IPv6Network("2002::/16"), 80),
)
#: Ranges that hold no public hosts, and that `is_global` allows or did in some Python versions.
_NOT_GLOBAL = tuple(
    map(
        ipaddress.ip_network,
        (
            "168.63.129.16/32",  # Azure's platform services
            "192.0.0.0/24",
            "192.88.99.0/24",
            "fec0::/10",
            "64:ff9b:1::/48",
            "5f00::/16",
            "::/96",
            "::ffff:0:0:0/96",
            "100::/64",
            "2001::/32",
            "3fff::/20",  # for documentation
        ),
    )
)
_PORTS = {"http": 80, "https": 443}
#: Kinds of ranges that a project may allow.
LOOPBACK, PRIVATE = "loopback IP range", "private IP range"
_PRIVATE_NETWORKS = tuple(
    map(
        ipaddress.ip_network,
        ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"),
    )
)
#: The addresses of clouds' metadata in private networks: of AWS over IPv6, and of Alibaba Cloud.
_METADATA = (ipaddress.IPv6Address("fd00:ec2::254"), ipaddress.IPv4Address("100.100.100.200"))
#: The fields of a call's payload.
PAYLOAD_FIELDS = frozenset(
    (*RUN_FIELDS, "run_started_at", "run_ended_at", "webhook_sent_at", "values", "error")
)


@dataclass(frozen=True, slots=True)
class WebhookPolicy:
    """The operator's and the project's rules. Without domains or ports, any are allowed."""

    https_only: bool = False
    allow_private: bool = False
    #: Kinds of ranges that are allowed although they are not public: LOOPBACK, PRIVATE.
    allowed_ranges: frozenset[str] = frozenset()
    #: Whether a webhook may be a path: a route of the project's own app.
    allows_paths: bool = False
    allowed_domains: tuple[str, ...] = ()
    allowed_ports: tuple[int, ...] = ()
    longest_url: int = 2048

    def refuses(self, address: Address) -> str | None:
        """Return the kind of range for which an address is refused. Return None if it is
        allowed."""
        kind = None if self.allow_private else blocked_range(address)
        inner = _embedded(address)
        if kind == PRIVATE and (inner in _METADATA or not _is_private(inner)):
            return kind
        return None if kind in self.allowed_ranges else kind


@dataclass(frozen=True, slots=True)
class WebhookTarget:
    """A webhook's URL and its parts."""

    url: str
    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """The value of the `Host` header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


def parse_target(url: str, policy: WebhookPolicy) -> WebhookTarget:
    """Return the parts of a URL. Raises ValueError if the policy does not allow it.

    The address of its host is not checked here.
    """
    if len(url) > policy.longest_url:
        raise ValueError(f"Webhook URL must be at most {policy.longest_url} characters")
    if any(character <= " " or character == "\x7f" for character in url) or "\\" in url:
        raise ValueError("Invalid webhook URL")
    parts = urlsplit(url)
    if not parts.hostname:
        raise ValueError(f"Invalid webhook hostname '{parts.hostname or ''}'")
    if parts.scheme not in _PORTS:
        raise ValueError(f"Invalid webhook scheme '{parts.scheme}'")
    if policy.https_only and parts.scheme != "https":
        raise ValueError("Webhook URL must be https")
    if parts.username is not None or parts.password is not None:
        raise ValueError("Webhook URL must not hold a user or a password")
    port = _PORTS[parts.scheme] if parts.port is None else parts.port
    if port == 0:
        raise ValueError("Webhook port 0 is not a port")
    if policy.allowed_ports and port not in policy.allowed_ports:
        raise ValueError(f"Webhook port {port} is not allowed")
    host = parts.hostname.rstrip(".").lower()
    if "%" in host or not _can_be_looked_up(host):
        raise ValueError(f"Invalid webhook hostname '{host}'")
    # The resolver's form: ①②⑦.0.0.1 is 127.0.0.1, and the full stop of ideographs is a dot.
    host = host.encode("idna").decode().rstrip(".")
    if policy.allowed_domains and not _is_within(host, policy.allowed_domains):
        raise ValueError(f"Webhook host '{host}' is not among the allowed domains")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    # As a browser does: what is not ASCII is percent-encoded as UTF-8.
    return WebhookTarget(url, parts.scheme, host, port, quote(path, safe=string.punctuation))


def is_path(url: str) -> bool:
    """Return whether a webhook is a path of this server."""
    return url.startswith("/")


def check_path(url: str, policy: WebhookPolicy) -> None:
    """Raise ValueError if the policy does not allow a webhook that is a path."""
    if not policy.allows_paths:
        raise ValueError(
            "Invalid webhook hostname '': a webhook that is a path of this server needs "
            "webhooks.url.disable_loopback to be false in langgraph.json"
        )
    if len(url) > policy.longest_url:
        raise ValueError(f"Webhook URL must be at most {policy.longest_url} characters")
    path = url.partition("?")[0]
    segments = unquote(path).split("/")[1:]
    if "#" in url:
        raise ValueError("Invalid webhook URL")
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in unquote(path):
        raise ValueError("Invalid webhook URL")
    if "%2f" in path.lower() or any(segment in (".", "..") for segment in segments):
        raise ValueError("Invalid webhook URL")
    if not all(segments[:-1]):  # `//host/path` is a URL of another server
        raise ValueError("Invalid webhook URL")


def _is_private(address: Address) -> bool:
    return any(address.version == net.version and address in net for net in _PRIVATE_NETWORKS)


def _can_be_looked_up(host: str) -> bool:
    """Return whether a resolver accepts the host: labels of 1 to 63 characters, valid in IDNA."""
    try:
        return bool(host.encode("idna"))
    except UnicodeError:
        return False


def is_local_name(host: str) -> bool:
    """Return whether a name always means this machine (RFC 6761, section 6.3)."""
    return host == "localhost" or host.endswith(".localhost")


def _is_within(host: str, domains: tuple[str, ...]) -> bool:
    """Return whether a host is among the domains. `*.example.com` is any host below that domain."""
    return any(
        host.endswith(domain[1:]) if domain.startswith("*.") else host == domain
        for domain in map(_in_ascii, domains)
    )


def _in_ascii(domain: str) -> str:
    """Return a domain in the resolver's form, as hosts are compared."""
    if domain.isascii():
        return domain.lower()
    wildcard = "*." if domain.startswith("*.") else ""
    return wildcard + domain.removeprefix("*.").encode("idna").decode().lower()


def blocked_range(address: Address) -> str | None:
    """Return the kind of range for which an address is refused. Return None if it is allowed.

    An IPv6 address with an embedded IPv4 address is checked as both, because a translator may or
    may not be on the path.
    """
    inner = _embedded(address)
    return _blocked(inner) or (_blocked(address) if _is_not_global(address) else None)


def _is_not_global(address: Address) -> bool:
    return any(address.version == net.version and address in net for net in _NOT_GLOBAL)


def _blocked(address: Address) -> str | None:
    kinds = {
        LOOPBACK: address.is_loopback,
        "link-local IP range": address.is_link_local,
        "unspecified address": address.is_unspecified,
        "multicast IP range": address.is_multicast,
        PRIVATE: not address.is_global or _is_not_global(address),
    }
    return next((kind for kind, applies in kinds.items() if applies), None)


def _embedded(address: Address) -> Address:
    """Return the IPv4 address that an IPv6 address embeds. Return any other address as it is."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.is_loopback or address.is_unspecified:
        return address  # both are in the deprecated range ::/96
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    for network, behind in _EMBEDDING:
        if address in network:
            return ipaddress.IPv4Address((int(address) >> behind) & 0xFFFFFFFF)
    return address
