"""Test which pages may change something on a server, and which host names it accepts."""

from __future__ import annotations

import pytest
from werkzeug.datastructures import Headers

from belay_server.api.security.origins import Origins
from belay_server.domain.errors import Forbidden
from belay_server.graphs.project.http_section import CorsRules
from belay_server.settings import Settings

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
def test_a_server_that_asks_nobody_answers_to_loopback_and_to_what_it_is_told(host):
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
def test_it_answers_to_no_other_name(host):
    with pytest.raises(Forbidden, match="BELAY_HOSTS"):
        origins().refuse_foreign_host(host)
    origins(is_open=False).refuse_foreign_host(host)


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_a_foreign_page_changes_nothing(method):
    mine = origins(BELAY_CORS_ORIGINS="https://good.example")
    for origin in ("https://evil.example", "null", "http://box:1", "https://good.example.evil"):
        with pytest.raises(Forbidden, match="may not call"):
            mine.refuse_foreign_change(method, origin, "box:2024")
    for origin in (None, "https://good.example", "http://box:2024"):
        mine.refuse_foreign_change(method, origin, "box:2024")


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_what_changes_nothing_is_the_browsers_to_guard(method):
    origins(BELAY_CORS_ORIGINS="").refuse_foreign_change(method, "https://evil.example", "box")


def test_a_foreign_page_stops_nothing_by_leaving_a_stream():
    mine = origins(BELAY_CORS_ORIGINS="https://good.example")
    for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        with pytest.raises(Forbidden, match="may not call"):
            mine.refuse_foreign_stop(Headers({"Host": "box:2024", **headers}))
    for headers in (
        {},
        {"Origin": "https://good.example", "Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
    ):
        mine.refuse_foreign_stop(Headers({"Host": "box:2024", **headers}))
