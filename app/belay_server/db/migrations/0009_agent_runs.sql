-- Runs of the Agent runs API. Their status is derived from the run, or from the tombstone of a run
-- that was rolled back.
CREATE TABLE agent_run (
    -- Sorted by bytes, which is the order of creation. Pages use it as their key.
    id         text COLLATE "C" PRIMARY KEY,
    -- The team of the caller's key, never the key itself.
    team       text NOT NULL,
    -- No foreign key: when a run is rolled back, its row is deleted and its agent run stays, cancelled.
    run_id     uuid NOT NULL,
    thread_id  uuid NOT NULL REFERENCES thread ON DELETE CASCADE,
    request    jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX agent_run_of_team ON agent_run (team, id);
CREATE INDEX agent_run_thread ON agent_run (thread_id);
CREATE INDEX agent_run_run ON agent_run (run_id);

-- A run that was deleted through the Agent Server API has neither row, and is not in this view.
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
