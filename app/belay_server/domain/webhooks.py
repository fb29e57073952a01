"""Where a webhook may go. No I/O: addresses are looked up elsewhere, and judged here.

A webhook's URL comes from a client, and is called from inside the operator's network. What is only
reachable from there (loopback, private and link-local ranges, the metadata services of clouds) is
refused: when the run is created, and again of the very address that is connected to.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

#: Ranges of IPv6 that carry an IPv4 address, and how many bits are behind it.
_EMBEDDING = (
    (ipaddress.IPv6Network("::ffff:0:0:0/96"), 0),
    (ipaddress.IPv6Network("::/96"), 0),
    (ipaddress.IPv6Network("64:ff9b::/96"), 0),
    (ipaddress.IPv6Network("64:ff9b:1::/48"), 0),
    (ipaddress.IPv6Network("2002::/16"), 80),
)
#: What `is_global` lets pass, or did in some versions of Python, and is not anybody's host.
_NOT_GLOBAL = tuple(
    map(
        ipaddress.ip_network,
        (
            "168.63.129.16/32",  # Azure's own services, from within
            "192.0.0.0/24",
            "192.88.99.0/24",
            "fec0::/10",
            "64:ff9b:1::/48",
            "5f00::/16",
            "::/96",
            "::ffff:0:0:0/96",
            "100::/64",
            "2001::/32",
        ),
    )
)
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class WebhookPolicy:
    """What the operator and the project allow. No domains or ports: any."""

    https_only: bool = False
    allow_private: bool = False
    allowed_domains: tuple[str, ...] = ()
    allowed_ports: tuple[int, ...] = ()
    longest_url: int = 2048


@dataclass(frozen=True, slots=True)
class WebhookTarget:
    """A URL, taken apart."""

    url: str
    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """What the `Host` header says."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


def parse_target(url: str, policy: WebhookPolicy) -> WebhookTarget:
    """Raises ValueError for a URL that the policy does not allow, whatever its address."""
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
    port = parts.port or _PORTS[parts.scheme]
    if policy.allowed_ports and port not in policy.allowed_ports:
        raise ValueError(f"Webhook port {port} is not allowed")
    host = parts.hostname.rstrip(".").lower()
    if "%" in host or not _can_be_looked_up(host):
        raise ValueError(f"Invalid webhook hostname '{host}'")
    if policy.allowed_domains and not _is_within(host, policy.allowed_domains):
        raise ValueError(f"Webhook host '{host}' is not among the allowed domains")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return WebhookTarget(url, parts.scheme, host, port, path)


def _can_be_looked_up(host: str) -> bool:
    """Whether the resolver takes it: labels of 1 to 63 characters, and what IDNA can encode."""
    try:
        return bool(host.encode("idna"))
    except UnicodeError:
        return False


def is_local_name(host: str) -> bool:
    """Whether a name is of this machine, whatever a resolver says (RFC 6761, section 6.3)."""
    return host == "localhost" or host.endswith(".localhost")


def _is_within(host: str, domains: tuple[str, ...]) -> bool:
    """`example.com` is itself, `*.example.com` what is below it."""
    return any(
        host.endswith(domain[1:]) if domain.startswith("*.") else host == domain
        for domain in (domain.lower() for domain in domains)
    )


def blocked_range(address: Address) -> str | None:
    """Why an address may not be called; None when it may. One that carries another is judged as
    both: a translator may be on the way, or not."""
    inner = _embedded(address)
    return _blocked(inner) or (_blocked(address) if _is_nobodys(address) else None)


def _is_nobodys(address: Address) -> bool:
    return any(address.version == net.version and address in net for net in _NOT_GLOBAL)


def _blocked(address: Address) -> str | None:
    kinds = {
        "loopback IP range": address.is_loopback,
        "link-local IP range": address.is_link_local,
        "unspecified address": address.is_unspecified,
        "multicast IP range": address.is_multicast,
        "private IP range": not address.is_global or _is_nobodys(address),
    }
    return next((kind for kind, applies in kinds.items() if applies), None)


def _embedded(address: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.is_loopback or address.is_unspecified:
        return address  # two that the deprecated range of all zeros would take in
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    for network, behind in _EMBEDDING:
        if address in network:
            return ipaddress.IPv4Address((int(address) >> behind) & 0xFFFFFFFF)
    return address
