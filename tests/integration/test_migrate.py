from __future__ import annotations

import pytest

from belay_server.db.connection import connect
from belay_server.db.migrate import SchemaNotReady, migrate, schema_is_ready, wait_for_schema
from belay_server.dev.embedded import EmbeddedPostgres
from tests.servers import running


def test_migrating_twice_does_nothing_the_second_time(database_url):
    assert migrate(database_url) == []
    with connect(database_url) as conn:
        assert schema_is_ready(conn)


def test_a_start_without_migrations_names_the_command_to_run(tmp_path, scratch):
    with running(EmbeddedPostgres(scratch / "fresh", durable=False)) as url:
        with pytest.raises(SchemaNotReady, match="belay migrate"):
            wait_for_schema(url, seconds=0.2)
        migrate(url)
        wait_for_schema(url, seconds=0.2)
