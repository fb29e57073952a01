-- Every statement that reads an agent run for a client checks access to its thread.

-- name: lock_team
-- Until the end of the transaction. It serializes a team's creates, so that their count is exact.
SELECT pg_advisory_xact_lock(hashtextextended('agent_run ' || %(team)s, 0))

-- name: count_active_agent_runs
SELECT count(*) FROM agent_run a JOIN run r ON r.run_id = a.run_id
WHERE a.team = %(team)s AND r.status IN ('pending', 'running')

-- name: insert_agent_run
INSERT INTO agent_run (id, team, run_id, thread_id, request)
VALUES (%(id)s, %(team)s, %(run_id)s, %(thread_id)s, %(request)s)

-- name: get_agent_run
SELECT id, run_id, thread_id, request, created_at, run_status, started_at, ended_at, run_error,
    CASE WHEN pg_column_size(outcome) <= %(small)s THEN outcome END AS outcome
FROM agent_run_view
WHERE id = %(id)s AND team = %(team)s
  AND (%(allowed_threads)s::jsonb IS NULL OR belay_allows(%(allowed_threads)s, thread_metadata))

-- name: list_agent_runs
SELECT id, run_id, thread_id, request, created_at, run_status, started_at, ended_at, run_error,
    CASE WHEN pg_column_size(outcome) <= %(small)s THEN outcome END AS outcome
FROM agent_run_view
WHERE team = %(team)s AND (%(before)s::text IS NULL OR id < %(before)s)
  AND (%(allowed_threads)s::jsonb IS NULL OR belay_allows(%(allowed_threads)s, thread_metadata))
ORDER BY id DESC
LIMIT %(limit)s
