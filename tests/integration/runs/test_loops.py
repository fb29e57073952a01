"""Test that each background loop continues after any of its statements fails with any SQLSTATE.

A loop runs once to record its statements, and once more for each of them, which then fails. All of
the loop's work must be done nevertheless.
"""

from __future__ import annotations

import dataclasses
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from belay_server.db import api_keys as key_rows
from belay_server.db import run_claims as claim_rows
from belay_server.db.postgres.connection import Connection
from belay_server.db.postgres.outages import is_worth_waiting
from belay_server.db.postgres.pool import Database, open_pool
from belay_server.domain.api_keys import make_key
from belay_server.domain.webhooks import WebhookPolicy
from belay_server.services import cron_firing, quarantine
from belay_server.services.open_keys import OpenKeys
from belay_server.services.webhooks.calls import CallFailed, CallSettings
from belay_workers import background_thread
from belay_workers.background import sweeper, webhooks
from belay_workers.background.sweeper import Sweeper
from belay_workers.background.webhooks import Webhooks
from belay_workers.slots import Kind, Phase, Reading, SlotTable, StopReason
from belay_workers.supervision import child_deaths, supervisor
from belay_workers.supervision.child_deaths import ChildDeaths
from belay_workers.supervision.orphans import Orphans
from belay_workers.supervision.stopper import Death
from belay_workers.supervision.supervisor import Supervisor
from tests.integration.runs.test_cron_firing import new_cron, now, runs_of
from tests.integration.runs.test_run_moves import cancel
from tests.integration.runs.test_sweeper import Doorbell, Silent
from tests.waiting import wait_until

#: The errors of the short form: a lost connection, and a statement that can never succeed.
KINDS = (None, "54000")
OTHERS = (
    *("08006", "0A000", "21000", "22P05", "23505", "25006", "25P03", "40001", "40P01", "42601"),
    *("53100", "53200", "53300", "55P03", "57014", "57P01", "58030", "XX000"),
)
every_state = pytest.mark.parametrize(
    "state", [*KINDS, *(pytest.param(state, marks=pytest.mark.full) for state in OTHERS)]
)
SECONDS = 60.0


def error_of(state: str | None) -> psycopg.Error:
    if state is None:
        return psycopg.OperationalError("the connection is lost")
    return psycopg.errors.lookup(state)("it fails")


class Failures:
    """Makes a statement fail once, the next time that a connection of one name runs it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._armed: tuple[str, psycopg.Error] | None = None
        self._lock = threading.Lock()
        self.seen: dict[str, None] = {}

    def before(self, conn: psycopg.Connection[Any], query: object) -> None:
        statement = " ".join(str(query).split())
        if self._name != conn.info.parameter_status("application_name"):
            return
        if statement.startswith(("SET ", "DEALLOCATE")):
            return
        with self._lock:
            self.seen[statement] = None
            if self._armed is None or self._armed[0] != statement:
                return
            error, self._armed = self._armed[1], None
        if error.sqlstate is None:
            conn.close()
        raise error

    def arm(self, statement: str, error: psycopg.Error) -> None:
        with self._lock:
            self._armed = (statement, error)

    @property
    def have_happened(self) -> bool:
        with self._lock:
            return self._armed is None


@pytest.fixture
def failures(monkeypatch) -> Callable[[str], Failures]:
    run = psycopg.Cursor.execute

    def make(name: str) -> Failures:
        made = Failures(name)

        def execute(cursor, query, *args, **kwargs):
            made.before(cursor.connection, query)
            return run(cursor, query, *args, **kwargs)

        monkeypatch.setattr(psycopg.Cursor, "execute", execute)
        return made

    return make


def play_each(failures: Failures, state: str | None, play: Callable[[], None]) -> None:
    """Run `play` once, and once more with each statement failing.

    `play` creates work for the loop and waits until it is done.
    """
    play()
    statements = list(failures.seen)
    assert statements
    for statement in statements:
        failures.arm(statement, error_of(state))
        play()
        wait_until(lambda: failures.have_happened, SECONDS, f"it is run again: {statement}")
    play()


@contextmanager
def played(loop: Callable[[], None], stop: Callable[[], None]) -> Iterator[None]:
    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop()
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture
def quick(monkeypatch):
    """Shorten all delays to fractions of a second."""
    monkeypatch.setattr(quarantine, "_FIRST_SECONDS", 0.02)
    monkeypatch.setattr(cron_firing, "FIRST_SECONDS", 0.02)
    monkeypatch.setattr(child_deaths, "_RETRY_SECONDS", 0.02)
    for loop in (background_thread, supervisor):
        monkeypatch.setattr(loop, "_RETRY_SECONDS", 0.02)
    monkeypatch.setattr(sweeper, "_TIDY_EVERY_SECONDS", 0.05)
    monkeypatch.setattr(webhooks, "_LEASE_SECONDS", 0.3)
    monkeypatch.setattr(webhooks, "_POLL_SECONDS", 0.02)


def settings_of(parts):
    return dataclasses.replace(
        parts.settings, sweep_seconds=0.02, lease_seconds=0.5, lease_renewal_seconds=0.05
    )


# --- the sweeper ----------------------------------------------------------------------------------


class Sweeping:
    """Two of each kind of item that the sweeper handles."""

    def __init__(self, rows, doorbell: Doorbell) -> None:
        conn = rows.conn
        self._rows, self._doorbell = rows, doorbell
        self.crons = [new_cron(conn, due=now()) for _ in range(2)]
        self.due = [rows.pending().run_id for _ in range(2)]
        conn.execute("UPDATE run SET next_ring_at = now() WHERE run_id = ANY(%s)", (self.due,))
        self.lost = [rows.running().run_id for _ in range(2)]
        for run_id in self.lost:
            rows.expire(run_id)
        self.hidden = [rows.thread() for _ in range(2)]
        self.deleted = [rows.thread() for _ in range(2)]
        self.pruned = [rows.thread() for _ in range(2)]
        long_ago = "now() - interval '1 day'"
        update = "UPDATE thread SET {} WHERE thread_id = ANY(%s)"
        conn.execute(update.format(f"hidden_at = {long_ago}"), (self.hidden,))
        for strategy, threads in (("delete", self.deleted), ("keep_latest", self.pruned)):
            conn.execute(update.format(f"ttl_minutes = 1, ttl_strategy = '{strategy}'"), (threads,))
            conn.execute(update.format(f"expires_at = {long_ago}"), (threads,))
        self.items = [str(uuid.uuid4()) for _ in range(2)]
        for key in self.items:
            conn.execute(
                "INSERT INTO store (prefix, key, value, expires_at)"
                f" VALUES ('loops', %s, '{{}}', {long_ago})",
                (key,),
            )

    def left(self) -> list[str]:
        """Return the kinds of items that are not handled yet."""
        rows, conn = self._rows, self._rows.conn
        gone = [*self.hidden, *self.deleted]
        [threads] = conn.execute(
            "SELECT count(*) FROM thread WHERE thread_id = ANY(%s)", (gone,)
        ).fetchone()
        [unpruned] = conn.execute(
            "SELECT count(*) FROM thread WHERE thread_id = ANY(%s) AND expires_at IS NOT NULL",
            (self.pruned,),
        ).fetchone()
        [items] = conn.execute(
            "SELECT count(*) FROM store WHERE key = ANY(%s)", (self.items,)
        ).fetchone()
        found = {
            "crons": any(not runs_of(conn, cron) for cron in self.crons),
            "due runs": bool(set(self.due) - set(self._doorbell.rung)),
            "lost runs": any(rows.status(run_id) == "running" for run_id in self.lost),
            "threads": threads > 0,
            "unpruned": unpruned > 0,
            "items": items > 0,
        }
        return [name for name, is_left in found.items() if is_left]


@every_state
def test_the_sweeper_continues_after_a_failed_statement(rows, run_parts, failures, quick, state):
    rows.conn.execute("DELETE FROM thread")
    rows.conn.execute("DELETE FROM scheduler_lease")
    doorbell = Doorbell(0)
    parts = dataclasses.replace(run_parts, settings=settings_of(run_parts), doorbell=doorbell)
    sweeper = Sweeper(parts, "the test")
    failing = failures("belay sweeper")

    def play() -> None:
        work = Sweeping(rows, doorbell)
        wait_until(lambda: not work.left(), SECONDS, "all is served")
        rows.conn.execute("DELETE FROM run WHERE status = 'pending'")

    sweeper.start()
    try:
        play_each(failing, state, play)
    finally:
        sweeper.stop()
        rows.conn.execute("DELETE FROM thread")
        rows.conn.execute("DELETE FROM scheduler_lease")
    assert len(failing.seen) > 15


# --- webhooks -------------------------------------------------------------------------------------


@every_state
def test_the_webhook_caller_continues_after_a_failed_statement(
    rows, run_parts, failures, quick, monkeypatch, state
):
    """Some of the calls succeed at once, the others at the second attempt."""
    rows.conn.execute("DELETE FROM webhook_call")
    made: list[str] = []

    def make_call(call, *_args, **_kwargs) -> None:
        made.append(call.url)
        if "unsure" in call.url and made.count(call.url) == 1:
            raise CallFailed("503")

    monkeypatch.setattr(webhooks, "make_call", make_call)
    monkeypatch.setattr(webhooks, "_FIRST_WAIT_SECONDS", 0.02)
    calls = CallSettings(WebhookPolicy(), "http://127.0.0.1:1")
    caller = Webhooks(settings_of(run_parts), calls)
    failing = failures("belay webhooks")

    def play() -> None:
        mine = [f"https://{kind}/{uuid.uuid4()}" for kind in ("sure", "unsure") for _ in range(3)]
        for url in mine:
            rows.conn.execute(
                "INSERT INTO webhook_call (url, host, run) VALUES (%s, %s, %s)",
                (url, url.split("/")[2], Jsonb({"run_id": "r"})),
            )

        def left() -> int:
            return rows.conn.execute("SELECT count(*) FROM webhook_call").fetchone()[0]

        wait_until(lambda: left() == 0, SECONDS, "all calls are made")
        assert set(mine) <= set(made)

    caller.start()
    try:
        play_each(failing, state, play)
    finally:
        caller.stop()
    assert len(failing.seen) == 3


# --- runs whose child has died --------------------------------------------------------------------


def death(run, reason: StopReason, phase: Phase = Phase.RUNNING) -> Death:
    reading = Reading(
        slot=0,
        pid=1,
        kind=Kind.CHILD,
        phase=phase,
        run_id=run.run_id,
        thread_id=run.thread_id,
        claim_no=run.claim_no,
        deadline=0.0,
        claimed_at=time.monotonic(),
        attempt=1,
    )
    return Death(reading, reason)


@every_state
def test_the_ends_of_dead_runs_are_written_after_a_failed_statement(
    rows, run_parts, failures, quick, state
):
    """Only the run whose end cannot be written is left to the sweeper."""
    from belay_server.services.runs.cancellation import announcer

    parts = dataclasses.replace(
        run_parts, settings=settings_of(run_parts), doorbell=Doorbell(0), event_log=Silent()
    )
    dead = ChildDeaths(parts.settings, SlotTable(1), "test", announcer(parts))
    failing = failures("belay supervisor end")
    stopping = threading.Event()

    def loop() -> None:
        while not stopping.is_set():
            dead.write_ends(stopping)

    def play() -> None:
        runs = [rows.running() for _ in range(6)]
        reasons = [StopReason.CANCEL, StopReason.TIMEOUT, StopReason.DRAIN, StopReason.NONE]
        deaths = [
            *(death(run, reason) for run, reason in zip(runs[:4], reasons, strict=True)),
            death(runs[4], StopReason.NONE, Phase.CLAIMING),
            death(runs[5], StopReason.CANCEL),
        ]
        for run in (runs[0], runs[5]):
            cancel(rows.conn, run.run_id)
        for one in deaths:
            dead.add(one)
        wait_until(lambda: not dead.any_left, SECONDS, "all ends are tried")
        left = [run for run in runs if rows.status(run.run_id) == "running"]
        may_be_left = 0 if state is None or is_worth_waiting(error_of(state)) else 1
        assert len(left) <= may_be_left
        for run in left:
            rows.expire(run.run_id)
            claim = claim_rows.Claim(run.run_id, run.claim_no)
            claim_rows.put_run_back(rows.conn, claim, uncharge=True, rering_seconds=5.0)

    def stop() -> None:
        stopping.set()
        dead.stop()

    with played(loop, stop):
        play_each(failing, state, play)
    assert len(failing.seen) >= 5


# --- leases and cancels ---------------------------------------------------------------------------


@every_state
def test_leases_are_renewed_and_cancels_seen_after_a_failed_statement(
    rows, run_parts, failures, quick, state
):
    settings = dataclasses.replace(settings_of(run_parts), lease_seconds=60.0)
    slots = SlotTable(1)
    slot = slots.take()
    supervisor = Supervisor(
        settings,
        slots,
        "test",
        Silent(),
        orphans=Orphans(lambda: ()),
        on_death=lambda: None,
        isolate=lambda _graph, _why: None,
    )
    failing = failures("belay supervisor keep")

    def expires_at(run_id):
        return rows.conn.execute(
            "SELECT lease_expires_at FROM run WHERE run_id = %s", (run_id,)
        ).fetchone()[0]

    def play() -> None:
        run = rows.running()
        claim = claim_rows.Claim(run.run_id, run.claim_no)
        slot.claiming(run.run_id)
        slot.running(claim, run.thread_id, 0.0)
        before = expires_at(run.run_id)
        wait_until(lambda: expires_at(run.run_id) != before, SECONDS, "the lease is renewed")
        cancel(rows.conn, run.run_id)
        supervisor._hints.put(claim)
        wait_until(lambda: claim in supervisor._requests, SECONDS, "the cancel is seen")
        slot.idle()

    def stop() -> None:
        supervisor._stopping.set()
        supervisor._hints.put(None)

    thread = background_thread.BackgroundThread("leases", supervisor._keep, supervisor._stopping)
    with played(thread._run, stop):
        play_each(failing, state, play)
    assert len(failing.seen) == 2


# --- keys of open requests ------------------------------------------------------------------------


@every_state
def test_revoked_keys_are_detected_after_a_failed_statement(
    conn, database_url, failures, quick, state
):
    pool = open_pool(database_url, size=2, pgbouncer=False, name="belay web")
    keys = OpenKeys(Database(pool), seconds=0.02)
    failing = failures("belay web")

    def play() -> None:
        new = make_key()
        key_rows.insert_api_key(conn, new, name="k", team="t", scope="all", seconds=None)
        closed = threading.Event()
        keys.watch(new.prefix, closed.set)
        key_rows.revoke_api_key(conn, new.prefix)
        assert closed.wait(SECONDS)

    try:
        play_each(failing, state, play)
    finally:
        keys.close()
        pool.close()
    assert len(failing.seen) >= 1


def test_failures_leave_connections_of_another_name_alone(conn: Connection, failures):
    failing = failures("belay sweeper")
    conn.execute("SELECT 1")
    assert not failing.seen
