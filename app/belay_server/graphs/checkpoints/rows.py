"""Rows of LangGraph's checkpoint tables, gathered from several puts, stored by one statement.

One statement is one message. A writer that stalls (a node that holds the GIL, a stopped worker) has
either not sent it or has completed it. It never holds the run's row lock in between, which would
block a cancel or a takeover. The statement checks the run's claim, so its rows are stored all or
none. The rows of several runs can be stored by one statement too, all or none (`common_statement`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from belay_server.domain.runs import Claim

_CLAIM = "WITH claim AS MATERIALIZED (SELECT belay_assert_claim(%(run_id)s, %(claim_no)s))"
#: One row while all of the claims are valid, else none. It waits for no lock, so it cannot be part
#: of a deadlock with a statement that cancels many runs.
_CLAIMS = """WITH claim AS MATERIALIZED (
    SELECT 1 FROM (
        SELECT count(*) AS valid FROM (
            SELECT FROM unnest(%(run_ids)s::uuid[], %(claim_nos)s::int[]) AS u (run_id, claim_no)
            JOIN run r USING (run_id, claim_no)
            WHERE r.status = 'running'
            FOR SHARE OF r NOWAIT
        ) held
    ) counted WHERE valid = cardinality(%(run_ids)s::uuid[])
)"""
_BLOBS = """blobs AS (
    INSERT INTO checkpoint_blobs (thread_id, checkpoint_ns, channel, version, type, blob)
    SELECT r.* FROM claim, unnest(%(b0)b::text[], %(b1)b::text[], %(b2)b::text[], %(b3)b::text[],
        %(b4)b::text[], %(b5)b::bytea[]) AS r
    ON CONFLICT (thread_id, checkpoint_ns, channel, version) DO NOTHING
)"""
_CHECKPOINTS = """made AS (
    INSERT INTO checkpoints
        (thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id, checkpoint, metadata)
    SELECT r.thread_id, r.ns, r.id, r.parent_id, r.checkpoint::jsonb, r.metadata::jsonb
    FROM claim, unnest(%(c0)b::text[], %(c1)b::text[], %(c2)b::text[], %(c3)b::text[],
        %(c4)b::text[], %(c5)b::text[])
        AS r (thread_id, ns, id, parent_id, checkpoint, metadata)
    ON CONFLICT (thread_id, checkpoint_ns, checkpoint_id)
    DO UPDATE SET checkpoint = EXCLUDED.checkpoint, metadata = EXCLUDED.metadata
)"""
#: The before-image of another run's checkpoint is stored once, by the statement that changes it. A
#: checkpoint of the run itself needs none: a rollback deletes it.
_IMAGES = """image AS (
    INSERT INTO run_before_image (run_id, thread_id, checkpoint_ns, checkpoint_id, writes)
    SELECT r.run_id, r.thread_id, r.ns, r.id,
        coalesce((
            SELECT jsonb_agg(to_jsonb(w)) FROM checkpoint_writes w
            WHERE w.thread_id = r.thread_id AND w.checkpoint_ns = r.ns
              AND w.checkpoint_id = r.id), '[]')
    FROM claim, unnest(%(i0)b::text[], %(i1)b::text[], %(i2)b::text[], %(i3)s::uuid[])
        AS r (thread_id, ns, id, run_id)
    WHERE NOT EXISTS (
        SELECT 1 FROM checkpoints c
        WHERE c.thread_id = r.thread_id AND c.checkpoint_ns = r.ns AND c.checkpoint_id = r.id
          AND c.metadata ->> 'run_id' = r.run_id::text)
    ON CONFLICT DO NOTHING
)"""
_WRITES = """{name} AS (
    INSERT INTO checkpoint_writes
        (thread_id, checkpoint_ns, checkpoint_id, task_id, task_path, idx, channel, type, blob)
    SELECT r.* FROM claim, unnest(%({p}0)b::text[], %({p}1)b::text[], %({p}2)b::text[],
        %({p}3)b::text[], %({p}4)b::text[], %({p}5)s::int[], %({p}6)b::text[], %({p}7)b::text[],
        %({p}8)b::bytea[]) AS r
    ON CONFLICT (thread_id, checkpoint_ns, checkpoint_id, task_id, idx) {on_conflict}
)"""
_KEPT = _WRITES.format(name="kept", p="w", on_conflict="DO NOTHING")
#: Errors, interrupts and resumes have one row each. A newer one replaces it.
_REPLACED = _WRITES.format(
    name="replaced",
    p="s",
    on_conflict="DO UPDATE SET channel = EXCLUDED.channel, type = EXCLUDED.type, "
    "blob = EXCLUDED.blob",
)

Row = Sequence[Any]


@dataclass(slots=True)
class CheckpointRows:
    """Rows in the column order of their tables. Those that may be replaced have keys."""

    checkpoints: dict[Row, Row] = field(default_factory=dict)
    blobs: list[Row] = field(default_factory=list)
    writes: list[Row] = field(default_factory=list)
    special_writes: dict[Row, Row] = field(default_factory=dict)
    #: Checkpoints of other runs that get writes.
    foreign: set[Row] = field(default_factory=set)

    def add_checkpoint(self, row: Row, blobs: Sequence[Row]) -> None:
        self.checkpoints[tuple(row[:3])] = row
        self.blobs += blobs

    def add_writes(self, rows: Sequence[Row], *, special: bool, foreign: bool) -> None:
        if foreign:
            self.foreign |= {tuple(row[:3]) for row in rows}
        if special:
            self.special_writes |= {(*row[:4], row[5]): row for row in rows}
        else:
            self.writes += rows

    def collides(self, other: CheckpointRows) -> bool:
        """Return True if both have the same row: Postgres cannot write it twice in a statement."""
        ours = {(*row[:4], row[5]) for row in self.writes} | self.special_writes.keys()
        theirs = {(*row[:4], row[5]) for row in other.writes} | other.special_writes.keys()
        return not ours.isdisjoint(theirs)

    def merge(self, other: CheckpointRows) -> None:
        self.checkpoints |= other.checkpoints
        self.blobs += other.blobs
        self.writes += other.writes
        self.special_writes |= other.special_writes
        self.foreign |= other.foreign

    def __bool__(self) -> bool:
        return bool(self.checkpoints or self.blobs or self.writes or self.special_writes)

    @property
    def bytes(self) -> int:
        """The size of the values in the rows, approximately."""
        documents = sum(len(row[4]) + len(row[5]) for row in self.checkpoints.values())
        values = [row[-1] for row in (*self.blobs, *self.writes, *self.special_writes.values())]
        return documents + sum(len(value) for value in values if value is not None)

    def statement(self, claim: Claim) -> tuple[str, dict[str, Any]]:
        """Return the SQL that stores these rows for this claim, and its parameters."""
        params = {"run_id": claim.run_id, "claim_no": claim.claim_no}
        return _statement(_CLAIM, [(claim, self)], params)


def common_statement(stored: Sequence[tuple[Claim, CheckpointRows]]) -> tuple[str, dict[str, Any]]:
    """Return the SQL that stores the rows of several runs, and its parameters. It returns no row,
    and stores nothing, unless all of the claims are valid. Raises LockNotAvailable."""
    params = {
        "run_ids": [claim.run_id for claim, _ in stored],
        "claim_nos": [claim.claim_no for claim, _ in stored],
    }
    return _statement(_CLAIMS, stored, params)


def _statement(
    claim: str, stored: Sequence[tuple[Claim, CheckpointRows]], params: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    parts = [claim]
    foreign = [(*row, claim.run_id) for claim, rows in stored for row in rows.foreign]
    for prefix, text, rows in (
        ("b", _BLOBS, [row for _, one in stored for row in one.blobs]),
        ("c", _CHECKPOINTS, [row for _, one in stored for row in one.checkpoints.values()]),
        ("i", _IMAGES, foreign),
        ("w", _KEPT, [row for _, one in stored for row in one.writes]),
        ("s", _REPLACED, [row for _, one in stored for row in one.special_writes.values()]),
    ):
        if rows:
            parts.append(text)
            for number, column in enumerate(zip(*rows, strict=True)):
                params[f"{prefix}{number}"] = list(column)
    return ",\n".join(parts) + "\nSELECT 1 FROM claim", params
