"""Test Belay's part of the store: the connection, the ttl and the deletion of expired items."""

from __future__ import annotations

import uuid

import pytest

from belay_server.db import assistants
from belay_server.db.assistants import SystemAssistant, put_system_assistants
from belay_server.db.postgres.connection import connect
from belay_server.db.postgres.pool import open_pool
from belay_server.db.postgres.statements import fetch_value
from belay_server.db.store import delete_expired_items
from belay_server.graphs.store import ApiStore, ProjectStore, StoreConfig

_EXPIRY = "SELECT expires_at FROM store WHERE prefix = %(root)s AND key = 'k'"
_SHORTEN = "UPDATE store SET expires_at = now() + interval '1 second' WHERE prefix = %(root)s"
_EXPIRE = "UPDATE store SET expires_at = now() - interval '1 second' WHERE prefix = %(root)s"


@pytest.fixture
def conn(database_url):
    with connect(database_url) as conn:
        yield conn


@pytest.fixture
def root():
    return uuid.uuid4().hex


def store_with(conn, **ttl):
    return ProjectStore(conn, StoreConfig(ttl=ttl))


def expiry(conn, root):
    return fetch_value(conn, _EXPIRY, {"root": root})


def test_no_connection_is_held_while_texts_are_embedded(database_url, root):
    """The pool has one connection, and the embedding function can use it."""
    with open_pool(database_url, size=1, pgbouncer=False, name="test") as pool:

        def embed(texts):
            with pool.connection(timeout=5) as conn:
                conn.execute("SELECT 1")
            return [[1.0] * 64 for _ in texts]

        store = ApiStore(pool, StoreConfig({"embed": embed, "dims": 64, "fields": ["a", "b"]}))
        store.put((root,), "k", {"a": "one", "b": "two"})
        store.put((root,), "other", {"a": "one"}, index=False)
        [found] = store.search((root,), query="three", limit=1)
        assert (found.key, found.score) == ("k", pytest.approx(1.0))


@pytest.mark.parametrize("minutes", [60, 0.25])
def test_reading_an_item_postpones_its_expiry(conn, root, minutes):
    store = store_with(conn, refresh_on_read=True)
    store.put((root,), "k", {}, ttl=minutes)
    conn.execute(_SHORTEN, {"root": root})
    short = expiry(conn, root)
    store.get((root,), "k", refresh_ttl=False)
    assert expiry(conn, root) == short
    store.get((root,), "k")
    assert expiry(conn, root) > short


def test_a_project_may_disable_the_refresh_on_read(conn, root):
    store = store_with(conn, refresh_on_read=False)
    store.put((root,), "k", {}, ttl=60)
    before = expiry(conn, root)
    store.get((root,), "k")
    assert expiry(conn, root) == before


def test_items_have_the_default_ttl_of_the_project_unless_they_set_one(conn, root):
    store = store_with(conn, default_ttl=60)
    store.put((root,), "k", {})
    assert expiry(conn, root) is not None
    store.put((root,), "k", {}, ttl=None)
    assert expiry(conn, root) is None


def test_expired_items_are_deleted_and_no_others(conn, root):
    store = store_with(conn)
    for key in ("k", "l"):
        store.put((root,), key, {}, ttl=60)
    conn.execute(_EXPIRE, {"root": root})
    store.put((root,), "m", {}, ttl=60)
    assert [item.key for item in store.search((root,))] == ["m"]
    while delete_expired_items(conn, limit=1):
        pass
    counted = "SELECT count(*) FROM store WHERE prefix = %(root)s"
    assert fetch_value(conn, counted, {"root": root}) == 1


def test_a_search_succeeds_after_a_page_of_rows_on_the_same_connection(database_url, root):
    with open_pool(database_url, size=1, pgbouncer=False, name="test") as pool:
        store = ApiStore(pool, StoreConfig())
        store.put((root,), "k", {"a": 1})
        for _ in range(2):
            with pool.connection() as conn:
                search_assistants(conn)
            assert [item.key for item in store.search((root,))] == ["k"]


def search_assistants(conn) -> None:
    """Read a page of at least one assistant, row by row."""
    put_system_assistants(conn, [SystemAssistant("counter", "counter")])
    found = assistants.search_assistants(
        conn,
        assistants.AssistantFilter(None, None, {}),
        sort_by="created_at",
        sort_order="desc",
        limit=1,
        offset=0,
    )
    assert len(found) == 1
