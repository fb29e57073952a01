"""Test which URLs a webhook may call, and how a call is signed."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import socket
import threading
import uuid

import pytest

from belay_server.domain.errors import InvalidRequest
from belay_server.domain.webhooks import (
    LOOPBACK,
    PRIVATE,
    WebhookPolicy,
    blocked_range,
    check_path,
    is_path,
    parse_target,
)
from belay_server.services.webhooks.calls import payload_of, refuse_bad_webhook, signed_headers
from belay_server.services.webhooks.host_names import HostNames

ANY = WebhookPolicy()
PATHS = WebhookPolicy(allows_paths=True)


@pytest.mark.parametrize(
    ("url", "host", "port", "path", "authority"),
    [
        ("https://example.com", "example.com", 443, "/", "example.com"),
        ("http://Example.com.:8080/a?b=c#d", "example.com", 8080, "/a?b=c", "example.com:8080"),
        ("http://[2001:4860:4860::8888]/x", "2001:4860:4860::8888", 80, "/x", None),
        ("https://bücher.example/a;b", "xn--bcher-kva.example", 443, "/a;b", None),
        ("http://①②⑦.0.0.1", "127.0.0.1", 80, "/", "127.0.0.1"),
        ("http://127.0.0.1。:80", "127.0.0.1", 80, "/", "127.0.0.1"),
        ("http://e.example/ë?n=ü%20[", "e.example", 80, "/%C3%AB?n=%C3%BC%20[", "e.example"),
    ],
)
def test_a_webhook_url_is_parsed_into_its_parts(url, host, port, path, authority):
    target = parse_target(url, ANY)
    assert (target.host, target.port, target.path) == (host, port, path)
    assert target.authority == (authority or (f"[{host}]" if ":" in host else host))


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("notaurl", "hostname ''"),
        ("/relative", "hostname ''"),
        ("https://", "hostname ''"),
        ("https:///path", "hostname ''"),
        ("ftp://example.com", "scheme 'ftp'"),
        ("file:///etc/passwd", "hostname ''"),
        ("https://user:pass@example.com", "user"),
        ("https://user@example.com", "user"),
        ("https://example.com:99999", "[Pp]ort"),
        ("https://example.com:0", "port 0"),
        ("https://exa mple.com", "Invalid webhook URL"),
        ("https://example.com/\r\nX: y", "Invalid webhook URL"),
        ("https://example.com\\@127.0.0.1", "Invalid webhook URL"),
        ("https://example.com/" + "a" * 2048, "at most 2048"),
    ],
)
def test_an_invalid_webhook_url_is_refused(url, reason):
    with pytest.raises(ValueError, match=reason):
        parse_target(url, ANY)


def test_a_path_is_allowed_only_by_the_project():
    with pytest.raises(ValueError, match="disable_loopback"):
        check_path("/hooks/x", ANY)
    check_path("/hooks/x?a=b/../c", PATHS)
    check_path("/", PATHS)


@pytest.mark.parametrize(
    "url",
    [
        "//example.com/x",
        "/a//b",
        "/a/../threads",
        "/a/%2e%2e/threads",
        "/./threads",
        "/a%2Fb",
        "/a%5cb",
        "/a\\b",
        "/a b",
        "/a\r\nX: y",
        "/ä",
        "/threads#x",
        "/#/threads",
        "/" + "a" * 2048,
    ],
)
def test_a_path_that_may_mean_another_is_refused(url):
    assert is_path(url)
    with pytest.raises(ValueError, match=r"Invalid|at most"):
        check_path(url, PATHS)


@pytest.mark.parametrize(
    ("address", "policy", "refused"),
    [
        ("127.0.0.1", ANY, True),
        ("127.0.0.1", WebhookPolicy(allowed_ranges=frozenset({LOOPBACK})), False),
        ("::ffff:127.0.0.1", WebhookPolicy(allowed_ranges=frozenset({LOOPBACK})), False),
        ("10.0.0.1", WebhookPolicy(allowed_ranges=frozenset({LOOPBACK})), True),
        ("10.0.0.1", WebhookPolicy(allowed_ranges=frozenset({PRIVATE})), False),
        ("fd00::1", WebhookPolicy(allowed_ranges=frozenset({PRIVATE})), False),
        ("169.254.169.254", WebhookPolicy(allowed_ranges=frozenset({PRIVATE, LOOPBACK})), True),
        ("168.63.129.16", WebhookPolicy(allowed_ranges=frozenset({PRIVATE})), True),
        ("fd00:ec2::254", WebhookPolicy(allowed_ranges=frozenset({PRIVATE})), True),
        ("100.100.100.200", WebhookPolicy(allowed_ranges=frozenset({PRIVATE})), True),
        ("192.0.2.1", WebhookPolicy(allowed_ranges=frozenset({PRIVATE})), True),
        ("169.254.169.254", WebhookPolicy(allow_private=True), False),
        ("8.8.8.8", ANY, False),
    ],
)
def test_a_project_may_allow_loopback_and_private_ranges(address, policy, refused):
    assert (policy.refuses(ipaddress.ip_address(address)) is not None) == refused


def test_allowed_domains_may_have_letters_that_are_not_ascii():
    policy = WebhookPolicy(allowed_domains=("bücher.example", "*.ÄRZTE.example"))
    for url in (
        "https://BÜCHER.example",
        "https://xn--bcher-kva.example",
        "https://a.ärzte.example",
    ):
        parse_target(url, policy)
    with pytest.raises(ValueError, match="not among the allowed domains"):
        parse_target("https://ärzte.example", policy)


def test_a_policy_may_require_https_domains_and_ports():
    policy = WebhookPolicy(
        https_only=True, allowed_domains=("example.com", "*.hooks.io"), allowed_ports=(443,)
    )
    for url in ("https://example.com/a", "https://a.hooks.io", "https://b.a.HOOKS.io."):
        assert parse_target(url, policy)
    for url in (
        "http://example.com",
        "https://example.com:8443",
        "https://hooks.io",
        "https://badhooks.io",
        "https://example.com.evil.org",
    ):
        with pytest.raises(ValueError, match=r"https|allowed"):
            parse_target(url, policy)


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("127.0.0.1", "loopback IP range"),
        ("127.9.9.9", "loopback IP range"),
        ("::1", "loopback IP range"),
        ("::ffff:127.0.0.1", "loopback IP range"),
        ("64:ff9b::7f00:1", "loopback IP range"),
        ("2002:7f00:1::", "loopback IP range"),
        ("169.254.169.254", "link-local IP range"),
        ("::ffff:169.254.169.254", "link-local IP range"),
        ("fe80::1", "link-local IP range"),
        ("fd00:ec2::254", "private IP range"),
        ("10.0.0.1", "private IP range"),
        ("172.16.0.1", "private IP range"),
        ("192.168.1.1", "private IP range"),
        ("100.64.0.1", "private IP range"),
        ("64:ff9b::a00:1", "private IP range"),
        ("0.0.0.0", "unspecified address"),
        ("::", "unspecified address"),
        ("224.0.0.1", "multicast IP range"),
        ("255.255.255.255", "private IP range"),
        ("168.63.129.16", "private IP range"),
        ("192.0.0.8", "private IP range"),
        ("fec0::1", "private IP range"),
        ("64:ff9b:1::808:808", "private IP range"),
        ("64:ff9b:1::a00:1", "private IP range"),
        ("::808:808", "private IP range"),
        ("::ffff:0:808:808", "private IP range"),
        ("::ffff:0:7f00:1", "loopback IP range"),
        ("5f00::1", "private IP range"),
        ("3fff::1", "private IP range"),
        ("8.8.8.8", None),
        ("2001:4860:4860::8888", None),
        ("64:ff9b::808:808", None),
    ],
)
def test_private_addresses_are_blocked(address, kind):
    assert blocked_range(ipaddress.ip_address(address)) == kind


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f.1", "0177.0.0.1", "[::1]", "0"],
)
def test_every_spelling_of_loopback_is_blocked(host):
    with pytest.raises(InvalidRequest, match="Webhook host blocked"):
        refuse_bad_webhook(ANY, f"http://{host}:8080/hook", HostNames())
    refuse_bad_webhook(WebhookPolicy(allow_private=True), f"http://{host}:8080/hook", HostNames())


@pytest.mark.parametrize(
    ("secret", "key"),
    [("plain", b"plain"), ("whsec_" + base64.b64encode(b"key").decode(), b"key")],
)
def test_the_signature_of_a_call_covers_its_id_time_and_body(secret, key):
    call_id, body = uuid.uuid4(), b'{"a": 1}'
    headers = signed_headers(call_id, body, secret)
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    digest = hmac.new(key, signed, hashlib.sha256).digest()
    assert headers["webhook-signature"] == f"v1,{base64.b64encode(digest).decode()}"
    assert headers["webhook-id"] == str(call_id)
    assert "webhook-signature" not in signed_headers(call_id, body, None)


def test_slow_host_name_look_ups_time_out_and_are_limited(monkeypatch):
    let_go = threading.Event()

    def slow(*_args, flags=0, **_kwargs):
        if flags:
            raise socket.gaierror("a name")
        let_go.wait(60)
        return [(2, 1, 6, "", ("8.8.8.8", 80))]

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    names = HostNames(at_once=2, seconds=0.05)
    for words in ("within 0 s", "within 0 s", "too many look-ups"):
        with pytest.raises(TimeoutError, match=words):
            names.look_up("slow.example", 80)
    # A name that cannot be resolved now is resolved again when the call is made.
    refuse_bad_webhook(ANY, "http://slow.example/hook", names)
    let_go.set()
    patient = HostNames(seconds=30)
    assert patient.look_up("slow.example", 80) == [ipaddress.ip_address("8.8.8.8")]


def test_a_caller_gets_at_most_half_of_the_look_ups(monkeypatch):
    let_go = threading.Event()

    def slow(host, *_args, flags=0, **_kwargs):
        if flags:
            raise socket.gaierror("a name")
        if host == "slow.example":
            let_go.wait(60)
        return [(2, 1, 6, "", ("8.8.8.8", 80))]

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    names = HostNames(at_once=4, seconds=0.05)
    for words in ("within 0 s", "within 0 s", "too many look-ups"):
        with pytest.raises(TimeoutError, match=words):
            names.look_up("slow.example", 80, caller="mallory")
    assert HostNames(at_once=4, seconds=30).look_up("quick.example", 80, caller="mallory")
    assert names.look_up("quick.example", 80, caller="alice")
    let_go.set()


@pytest.mark.parametrize("host", ["a..b", f"{'a' * 64}.com", "%61.com", "."])
def test_an_invalid_host_name_is_refused_before_it_is_looked_up(host):
    with pytest.raises(InvalidRequest, match="Invalid webhook hostname"):
        refuse_bad_webhook(ANY, f"http://{host}/hook", HostNames())


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.", "api.localhost"])
def test_a_local_name_is_blocked_without_a_resolver(monkeypatch, host):
    def away(*_args, **_kwargs):
        raise OSError("no resolver")

    monkeypatch.setattr(socket, "getaddrinfo", away)
    with pytest.raises(InvalidRequest, match="Webhook host blocked"):
        refuse_bad_webhook(ANY, f"http://{host}/hook", HostNames())


def test_a_payload_has_neither_the_user_nor_credentials():
    configurable = {"x-team": "blue", "cookie": "c", "authorization": "a", "x-api-key": "k"}
    configurable["langgraph_auth_user"] = {"identity": "ann", "token": "t"}
    run = {"run_id": "1", "kwargs": {"input": {}, "config": {"configurable": configurable}}}
    kwargs = payload_of(run)["kwargs"]
    assert kwargs == {"input": {}, "config": {"configurable": {"x-team": "blue"}}}
