"""Test that the names of the SQL queries match their use in Python."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

from belay_server.db import migrate
from belay_server.db.migrate import migrations

SQL_FILES = sorted(Path(migrate.__file__).parent.glob("sql/*.sql"))
MODULES = [import_module(f"belay_server.db.{file.stem}") for file in SQL_FILES]


@pytest.mark.parametrize("module", MODULES)
def test_every_query_is_used_by_its_module(module):
    source = inspect.getsource(module)
    unused = [name for name in vars(module.SQL) if f"SQL.{name}" not in source]
    assert unused == []


@pytest.mark.parametrize("module", MODULES)
def test_every_query_that_is_named_exists(module):
    named = set(re.findall(r"SQL\.(\w+)", inspect.getsource(module)))
    assert named <= set(vars(module.SQL))


def test_migrations_are_numbered_without_a_gap():
    assert [number for number, _, _ in migrations()] == list(range(1, len(migrations()) + 1))
