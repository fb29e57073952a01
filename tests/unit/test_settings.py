from __future__ import annotations

import pytest

from belay_server.configuration.setting_aliases import warn_of_ignored
from belay_server.configuration.settings import EXAMPLE_CONFIG, Settings, SettingsError

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


def test_the_names_of_langgraphs_server_are_understood():
    settings = Settings.from_environ(
        {
            "POSTGRES_URI": "postgres://db/last",
            "DATABASE_URI": "postgres://db/first",
            "REDIS_URI": "redis://bus",
            "N_JOBS_PER_WORKER": "7",
            "BG_JOB_TIMEOUT_SECS": "90.5",
            "CORS_ALLOW_ORIGINS": "https://a.example,https://b.example",
        }
    )
    assert settings.database_url == "postgresql://db/first"
    assert (settings.redis_url, settings.broker_url) == ("redis://bus", "redis://bus")
    assert (settings.concurrency, settings.run_timeout_seconds) == (7, 90.5)
    assert settings.cors_origins == ("https://a.example", "https://b.example")


def test_belays_own_name_has_precedence_unless_it_is_empty():
    given = {**MINIMAL, "N_JOBS_PER_WORKER": "7"}
    assert Settings.from_environ({**given, "BELAY_CONCURRENCY": "3"}).concurrency == 3
    assert Settings.from_environ({**given, "BELAY_CONCURRENCY": " "}).concurrency == 7


def test_an_error_names_the_variable_that_is_set():
    with pytest.raises(SettingsError, match=r"^N_JOBS_PER_WORKER must be a number, not 'many'"):
        Settings.from_environ({**MINIMAL, "N_JOBS_PER_WORKER": "many"})
    with pytest.raises(SettingsError, match=r"^DATABASE_URL is not set"):
        Settings.from_environ({"REDIS_URI": "redis://bus"})


def test_a_variable_that_is_ignored_is_logged(caplog):
    warn_of_ignored({"REDIS_CLUSTER": "1", "MOUNT_PREFIX": "", "N_JOBS_PER_WORKER": "7"})
    assert [record.getMessage() for record in caplog.records] == [
        "REDIS_CLUSTER is set, but Belay does not support it: it has no effect"
    ]


def test_a_variable_that_would_encrypt_stops_the_start():
    name = "LANGGRAPH_AES_JSON_KEYS"
    with pytest.raises(SettingsError, match=f"{name} is set, but Belay encrypts no JSON fields"):
        Settings.from_environ({**MINIMAL, name: "k"})
    Settings.from_environ({**MINIMAL, name: " "})


@pytest.mark.parametrize("length", [16, 24, 32])
def test_the_key_of_checkpoints_is_not_shown(length):
    settings = Settings.from_environ({**MINIMAL, "LANGGRAPH_AES_KEY": "k" * length})
    assert settings.aes_key == b"k" * length
    assert "kkk" not in repr(settings)


def test_a_key_of_another_length_is_refused():
    with pytest.raises(SettingsError, match="LANGGRAPH_AES_KEY: must have 16, 24 or 32 bytes"):
        Settings.from_environ({**MINIMAL, "LANGGRAPH_AES_KEY": "short"})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "http://127.0.0.1:2024"),
        ({"PORT": "8000"}, "http://127.0.0.1:8000"),
        ({"BELAY_BIND": "0.0.0.0:9", "PORT": "8000"}, "http://127.0.0.1:9"),
        ({"BELAY_BIND": "[::]:9"}, "http://127.0.0.1:9"),
        ({"BELAY_BIND": "[::1]:9"}, "http://[::1]:9"),
        ({"BELAY_BIND": "10.1.2.3:9"}, "http://10.1.2.3:9"),
        ({"BELAY_BIND": "unix:/run/belay.sock"}, "http://127.0.0.1:2024"),
        ({"BELAY_INTERNAL_URL": "https://a.example/x"}, "https://a.example/x"),
    ],
)
def test_the_web_process_is_reached_where_it_listens(given, expected):
    assert Settings.from_environ({**MINIMAL, **given}).internal_url == expected


@pytest.mark.parametrize("url", ["web:2024", "ftp://web", "http://"])
def test_an_internal_url_must_be_http(url):
    with pytest.raises(SettingsError, match="BELAY_INTERNAL_URL"):
        Settings.from_environ({**MINIMAL, "BELAY_INTERNAL_URL": url})


@pytest.mark.parametrize("value", ["nan", "inf", "1e400", "40000000"])
@pytest.mark.parametrize("name", ["BELAY_LEASE_SECONDS", "BELAY_RUN_TIMEOUT_SECONDS"])
def test_seconds_are_at_most_a_year(name, value):
    with pytest.raises(SettingsError, match=rf"^{name} must be at most 31536000, not {value}"):
        Settings.from_environ({**MINIMAL, name: value})


def test_seconds_of_a_statement_are_what_postgres_accepts():
    with pytest.raises(SettingsError, match=r"^BELAY_STATEMENT_SECONDS must be at most 2147483"):
        Settings.from_environ({**MINIMAL, "BELAY_STATEMENT_SECONDS": "2147484"})
