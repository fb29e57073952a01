from __future__ import annotations

import pytest

from belay_server.settings import EXAMPLE_CONFIG, Settings, SettingsError

MINIMAL = {"DATABASE_URL": "postgresql://db/belay", "REDIS_URL": "redis://bus:6379/0"}


def test_defaults_are_complete():
    settings = Settings.from_environ(MINIMAL)
    assert settings.broker_url == settings.redis_url == "redis://bus:6379/0"
    assert settings.concurrency == 16
    assert settings.config_path == EXAMPLE_CONFIG


def test_heroku_urls_are_accepted():
    settings = Settings.from_environ(
        {
            "DATABASE_URL": "postgres://u:p@db/x",
            "REDIS_URL": "rediss://:p@bus:6380",
            "DYNO": "web.1",
        }
    )
    assert settings.database_url == "postgresql://u:p@db/x"
    assert settings.redis_url == "rediss://:p@bus:6380?ssl_cert_reqs=none"


def test_the_certificate_of_redis_is_verified_outside_heroku():
    settings = Settings.from_environ({**MINIMAL, "REDIS_URL": "rediss://bus:6380"})
    assert settings.redis_url == "rediss://bus:6380?ssl_cert_reqs=required"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", ""),
        ("DATABASE_URL", "mysql://db"),
        ("REDIS_URL", ""),
        ("REDIS_URL", "http://bus"),
        ("BELAY_CONCURRENCY", "0"),
        ("BELAY_CONCURRENCY", "many"),
        ("BELAY_PRELOAD", "maybe"),
        ("BELAY_LEASE_RENEWAL_SECONDS", "9"),
        ("BELAY_CONFIG", "/nowhere/langgraph.json"),
    ],
)
def test_an_invalid_value_is_refused_with_its_variable(name, value):
    with pytest.raises(SettingsError, match=name):
        Settings.from_environ({**MINIMAL, name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", "mysql://someone:canary@db/belay"),
        ("REDIS_URL", "http://:canary@bus"),
        ("BELAY_WEBHOOK_SECRET", "whsec_canary!"),
    ],
)
def test_an_invalid_secret_is_not_in_the_error_message(name, value):
    with pytest.raises(SettingsError) as refused:
        Settings.from_environ({**MINIMAL, name: value})
    assert "canary" not in str(refused.value)
