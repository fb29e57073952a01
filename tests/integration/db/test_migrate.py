from __future__ import annotations

import subprocess
import sys

import pytest

from belay_server.db.migrate import SchemaNotReady, migrate, schema_is_ready, wait_for_schema
from belay_server.db.postgres.connection import connect
from belay_server.dev.embedded import EmbeddedPostgres
from tests.servers import STORE_INDEX, running


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


def test_the_library_is_imported_only_when_its_version_changed(make_database):
    """LangGraph creates its tables again after an upgrade, and is not imported otherwise."""
    url = make_database("library")

    def has_imported_langgraph() -> bool:
        code = (
            "import sys; from belay_server.db.migrate import migrate; "
            f"migrate({url!r}); print('langgraph.checkpoint.postgres' in sys.modules)"
        )
        shown = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        )
        return shown.stdout == "True\n"

    assert not has_imported_langgraph()
    with connect(url) as conn:
        conn.execute("UPDATE belay_library_schema SET version = '0'")
    assert has_imported_langgraph()
    assert not has_imported_langgraph()


@pytest.mark.parametrize(
    "dropped", ["TABLE store_vectors, vector_migrations", "INDEX belay_checkpoints_run"]
)
def test_what_was_dropped_of_the_librarys_schema_is_made_again(make_database, dropped):
    """An operator drops the vectors to change their dimensions."""
    url = make_database(f"dropped_{dropped.partition(' ')[0].lower()}")
    with connect(url) as conn:
        conn.execute(f"DROP {dropped}")
    migrate(url, store_index=STORE_INDEX)
    with connect(url) as conn:
        assert schema_is_ready(conn, vectors=True)
        name = dropped.split()[1].rstrip(",")
        assert conn.execute("SELECT to_regclass(%s)", (name,)).fetchone() != (None,)
