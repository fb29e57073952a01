-- Runs of the second HTTP API. Their status is not here: it follows from the run, or from the
-- tombstone of one that was rolled back.
CREATE TABLE agent_run (
    -- In the order of bytes, which is that of creation: pages are keyed by it.
    id         text COLLATE "C" PRIMARY KEY,
    -- What the caller's key stands for; never the key itself.
    team       text NOT NULL,
    -- No foreign key: a run that is rolled back goes, and its agent run is cancelled.
    run_id     uuid NOT NULL,
    thread_id  uuid NOT NULL REFERENCES thread ON DELETE CASCADE,
    request    jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX agent_run_of_team ON agent_run (team, id);
CREATE INDEX agent_run_thread ON agent_run (thread_id);
CREATE INDEX agent_run_run ON agent_run (run_id);

-- A run whose record was deleted through the other API has left neither row: it is gone here too.
CREATE VIEW agent_run_view AS
SELECT
    a.id, a.team, a.run_id, a.thread_id, a.request, a.created_at,
    r.status AS run_status, r.started_at, coalesce(r.ended_at, t.rolled_back_at) AS ended_at,
    r.error AS run_error, r.outcome, h.metadata AS thread_metadata
FROM agent_run a
JOIN thread h ON h.thread_id = a.thread_id
LEFT JOIN run r ON r.run_id = a.run_id
LEFT JOIN run_tombstone t ON t.run_id = a.run_id
WHERE r.run_id IS NOT NULL OR t.run_id IS NOT NULL;
