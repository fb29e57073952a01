"""Test which pages may change something on a server, and which host names it accepts."""

from __future__ import annotations

import pytest
from werkzeug.datastructures import Headers

from belay_server.api.security.origins import Origins
from belay_server.configuration.settings import Settings
from belay_server.domain.errors import Forbidden
from belay_server.graphs.project.http_section import CorsRules

URLS = {"DATABASE_URL": "postgresql://x/", "REDIS_URL": "redis://x/"}


def origins(*, is_open=True, **environ: str) -> Origins:
    return Origins(Settings.from_environ({**URLS, **environ}), CorsRules(), is_open=is_open)


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:2024",
        "127.0.0.1",
        "127.9.9.9:1",
        "[::1]",
        "[::1]:2024",
        "LOCALHOST",
        "belay.localhost:80",
        "box",
        "box:2024",
    ],
)
def test_an_open_server_accepts_loopback_and_configured_host_names(host):
    origins(BELAY_HOSTS="box,other").refuse_foreign_host(host)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:2024",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "",
        "0.0.0.0",
        "10.0.0.1",
        "xlocalhost",
        "[fe80::1]",
        "evil.example#localhost",
        "[::1]evil.example",
        "localhost:x",
        "user@evil",
    ],
)
def test_an_open_server_refuses_other_host_names(host):
    with pytest.raises(Forbidden, match="BELAY_HOSTS"):
        origins().refuse_foreign_host(host)
    origins(is_open=False).refuse_foreign_host(host)


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_a_change_from_a_foreign_origin_is_refused(method):
    mine = origins(BELAY_CORS_ORIGINS="https://good.example")
    for origin in ("https://evil.example", "null", "http://box:1", "https://good.example.evil"):
        with pytest.raises(Forbidden, match="may not call"):
            mine.refuse_foreign_change(method, origin, "box:2024")
    for origin in (None, "https://good.example", "http://box:2024"):
        mine.refuse_foreign_change(method, origin, "box:2024")


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_a_safe_method_from_a_foreign_origin_is_accepted(method):
    origins(BELAY_CORS_ORIGINS="").refuse_foreign_change(method, "https://evil.example", "box")


def test_a_stop_on_disconnect_from_a_foreign_origin_is_refused():
    mine = origins(BELAY_CORS_ORIGINS="https://good.example")
    for headers in (
        {"Origin": "https://evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ):
        with pytest.raises(Forbidden, match="may not call"):
            mine.refuse_foreign_stop(Headers({"Host": "box:2024", **headers}))
    for headers in (
        {},
        {"Origin": "https://good.example", "Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
    ):
        mine.refuse_foreign_stop(Headers({"Host": "box:2024", **headers}))
