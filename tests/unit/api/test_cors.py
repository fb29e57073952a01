"""Test which pages may open a WebSocket: those whose origin CORS allows."""

from __future__ import annotations

import pytest

from belay_server.api.security.cors import origin_may_ask
from belay_server.configuration.settings import Settings
from belay_server.graphs.project.http_section import CorsRules

URLS = {"DATABASE_URL": "postgresql://x/", "REDIS_URL": "redis://x/"}


@pytest.mark.parametrize(
    ("settings", "rules", "origin", "may"),
    [
        ("*", CorsRules(), "https://anywhere.example", True),
        ("https://a.example", CorsRules(), "https://a.example", True),
        ("https://a.example", CorsRules(), "https://b.example", False),
        ("https://a.example", CorsRules(), "https://a.example.evil.example", False),
        ("*", CorsRules(allow_origins=("https://a.example",)), "https://b.example", False),
        ("*", CorsRules(allow_origins=()), "https://b.example", False),
        ("", CorsRules(allow_origin_regex=r"https://.*\.a\.example"), "https://x.a.example", True),
        ("https://c.example", CorsRules(allow_origin_regex="https://a"), "https://ab", False),
    ],
)
def test_an_origin_is_allowed_by_the_project_or_else_by_the_settings(settings, rules, origin, may):
    read = Settings.from_environ({**URLS, "BELAY_CORS_ORIGINS": settings})
    assert origin_may_ask(read, rules, origin) is may
