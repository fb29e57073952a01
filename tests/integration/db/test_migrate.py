from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from belay_server.db.migrate import (
    SchemaNotReady,
    migrate,
    migrations,
    schema_is_ready,
    wait_for_schema,
)
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


def test_releases_at_once_migrate_one_after_the_other(make_database):
    """LangGraph creates indexes CONCURRENTLY, which wait for every older transaction: they deadlock
    with a release that waits for the lock in a statement."""
    url = make_database("at_once", template="template1")
    with ThreadPoolExecutor(4) as threads:
        applied = list(threads.map(lambda _: migrate(url), range(4)))
    assert sorted(map(len, applied)) == [0, 0, 0, len(migrations())]
    assert invalid_indexes(url) == []


def test_an_index_whose_creation_was_interrupted_is_rebuilt(make_database, caplog):
    url = make_database("interrupted")
    with connect(url) as conn:
        conn.execute("CREATE INDEX checkpoints_thread_id_idx_ccnew ON checkpoints (thread_id)")
        conn.execute(
            "UPDATE pg_index SET indisvalid = false WHERE indexrelid::regclass::text IN"
            " ('checkpoints_thread_id_idx', 'checkpoints_thread_id_idx_ccnew')"
        )
    migrate(url)
    assert invalid_indexes(url) == []
    with connect(url) as conn:
        found = conn.execute(
            "SELECT indexname FROM pg_indexes WHERE indexname LIKE 'checkpoints_thread_id_idx%'"
        )
        assert found.fetchall() == [("checkpoints_thread_id_idx",)]
    assert "the index checkpoints_thread_id_idx is incomplete: rebuilt" in caplog.text


def invalid_indexes(url: str) -> list[tuple[str]]:
    with connect(url) as conn:
        rows = conn.execute("SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid")
        return rows.fetchall()
