"""Test the pool of a web process: how long a request waits for a connection, and what it gets."""

from __future__ import annotations

import threading

import psycopg
import pytest

from belay_server.db.postgres.pool import Database, QuickAttempt, open_pool
from belay_server.domain.errors import Unavailable
from tests.waiting import wait_until


@pytest.fixture
def waits():
    return []


@pytest.fixture
def database(database_url, waits, monkeypatch):
    """A database with one connection, for which a request waits a tenth of a second."""
    monkeypatch.setattr("belay_server.db.postgres.pool._UNWATCHED_POOL_SECONDS", 0.1)
    with open_pool(
        database_url, size=1, pgbouncer=False, name="test", on_wait=waits.append
    ) as pool:
        yield Database(pool)


def test_a_request_without_a_connection_is_told_that_all_are_in_use(database, waits):
    with database.connection():
        with pytest.raises(Unavailable, match="All connections to the database are in use"):
            database.transaction(lambda conn: conn.execute("SELECT 1"))
    assert len(waits) == 1
    assert database.transaction(lambda conn: conn.execute("SELECT 2").fetchone()) == (2,)


def test_the_time_that_a_request_waits_is_reported(database_url, waits):
    with open_pool(
        database_url, size=1, pgbouncer=False, name="test", on_wait=waits.append
    ) as pool:
        database = Database(pool)
        work = threading.Thread(target=lambda: database.transaction(lambda _conn: None))
        with database.connection():
            work.start()
            wait_until(lambda: pool.get_stats().get("requests_waiting"), 10, "the second request")
        work.join()
        assert len(waits) == 2
        assert waits[1] > 0


def test_attempts_to_connect_are_at_most_a_second_apart():
    """An attempt of the library's own waits for 64 seconds after six failures."""
    attempt, now, delays = QuickAttempt(timeout=300), 1000.0, []
    for _ in range(8):
        attempt.update_delay(now)
        delays.append(attempt.delay)
        now += attempt.delay
    assert 0.05 < delays[0] < 0.2
    assert delays == sorted(delays)
    assert delays[-1] == 1.0
    assert not attempt.time_to_give_up(now)
    assert attempt.time_to_give_up(1400.0)


def test_the_pool_connects_again_by_such_attempts(database_url, monkeypatch):
    made = []

    class Attempt(QuickAttempt):
        def __init__(self, **options):
            super().__init__(**options)
            made.append(self)

    monkeypatch.setattr("belay_server.db.postgres.pool.QuickAttempt", Attempt)
    with open_pool(database_url, size=1, pgbouncer=False, name="test") as pool:
        with pool.connection() as conn:
            pid = conn.info.backend_pid
        with psycopg.connect(database_url, autocommit=True) as other:
            other.execute("SELECT pg_terminate_backend(%s)", (pid,))
        made.clear()

        def connected():
            with pool.connection() as conn:
                return conn.info.backend_pid != pid

        wait_until(connected, 20, "another connection")
        assert made


def test_a_connection_that_was_cut_is_replaced_without_a_delay(database_url, monkeypatch):
    """The library's check of a connection sleeps between two attempts: for a second, for two, …"""
    sleeps = []
    monkeypatch.setattr("psycopg_pool.pool.sleep", sleeps.append)
    pids = set()
    with (
        open_pool(database_url, size=2, pgbouncer=False, name="test") as pool,
        psycopg.connect(database_url, autocommit=True) as other,
    ):
        for _ in range(5):
            with pool.connection() as conn:
                pid = conn.info.backend_pid
            pids.add(pid)
            other.execute("SELECT pg_terminate_backend(%s, 10000)", (pid,))
        with pool.connection() as conn:
            assert conn.execute("SELECT 1").fetchone() == (1,)
    assert len(pids) == 5
    assert sleeps == []
