"""Test that a run's token is accepted exactly while the claim that has it lasts."""

from __future__ import annotations

from belay_server.db import run_claims as claim_rows
from belay_server.db import runs as run_rows
from belay_server.domain.access import Caller, hash_of
from belay_server.domain.runs import Ending, RunStatus
from belay_server.services.runs.endings import end_run
from tests.integration.conftest import LEASE

CREATOR = {"name": "user:ann", "team": "ann", "everything": True}
FIRST, SECOND = hash_of("first"), hash_of("second")


def creator(rows, run_id, token_hash):
    found = run_rows.creator_of_run(rows.conn, run_id, token_hash)
    return None if found is None else found.creator


def test_a_token_is_accepted_while_its_claim_lasts(rows):
    run = rows.pending(creator=CREATOR)
    assert creator(rows, run.run_id, FIRST) is None
    claimed = claim_rows.claim_run(rows.conn, run.run_id, **LEASE, token_hash=FIRST)
    assert creator(rows, run.run_id, FIRST) == CREATOR
    assert creator(rows, run.run_id, SECOND) is None
    claim_rows.put_run_back(rows.conn, claimed.claim, uncharge=True, rering_seconds=5.0)
    assert creator(rows, run.run_id, FIRST) is None
    claimed = claim_rows.claim_run(rows.conn, run.run_id, **LEASE, token_hash=SECOND)
    assert creator(rows, run.run_id, FIRST) is None
    assert creator(rows, run.run_id, SECOND) == CREATOR
    end_run(rows.conn, run.thread_id, claimed.claim, Ending(RunStatus.SUCCESS))
    assert creator(rows, run.run_id, SECOND) is None


def test_a_claim_without_a_token_accepts_none(rows):
    claimed = rows.running(creator=CREATOR)
    for token_hash in ("", "None", hash_of("")):
        assert run_rows.creator_of_run(rows.conn, claimed.run_id, token_hash) is None


def test_a_creator_is_read_back_as_the_caller():
    who = Caller("key:abc", "blue", everything=False, user={"identity": "x"})
    assert Caller.of_creator(who.as_creator(), who.user) == who
