-- Insert and read runs, and delete ended ones.

-- name: insert_run
-- The caller has locked the thread. No row is returned if the id is in use, or was that of a run that
-- has been rolled back. `next_ring_at` is when the sweeper sends a doorbell: if the first was lost, or
-- the run gets due. The first run of a thread sets the thread's fields at once and saves what they
-- were in `thread_before`; later runs do so when they are claimed.
WITH its_thread AS (
    SELECT thread_id, CASE WHEN config = '{}' THEN jsonb_build_object(
        'config', config, 'graph_id', metadata -> 'graph_id',
        'assistant_id', metadata -> 'assistant_id') END AS before_first
    FROM thread WHERE thread_id = %(thread_id)s
), inserted AS (
    INSERT INTO run (
        run_id, thread_id, assistant_id, graph_id, queue, metadata, kwargs, thread_config,
        thread_before, multitask_strategy, temporary, timeout_seconds, caller, creator, id_chosen,
        scheduled_at, next_ring_at
    )
    SELECT
        %(run_id)s, thread_id, %(assistant_id)s, %(graph_id)s, %(queue)s, %(metadata)s, %(kwargs)s,
        %(thread_config)s, before_first, %(multitask_strategy)s, %(temporary)s,
        %(timeout_seconds)s, %(caller)s, %(creator)s, %(id_chosen)s,
        now() + make_interval(secs => %(after_seconds)s),
        now() + make_interval(secs =>
            CASE WHEN %(after_seconds)s > 0 THEN %(after_seconds)s ELSE %(rering_seconds)s END)
    FROM its_thread
    WHERE NOT EXISTS (SELECT 1 FROM run_tombstone t WHERE t.run_id = %(run_id)s)
    ON CONFLICT (run_id) DO NOTHING
    RETURNING
        run_id, thread_id, assistant_id, graph_id, queue, status, metadata, kwargs,
        multitask_strategy, created_at, updated_at, scheduled_at, temporary, claim_no, attempts,
        lease_owner, cancel_action, cancel_reason, error, thread_before, thread_config
), marked AS (
    UPDATE thread t SET
        config = i.thread_config, configurable = %(thread_configurable)s,
        metadata = t.metadata || jsonb_build_object(
            'graph_id', i.graph_id, 'assistant_id', i.assistant_id)
    FROM inserted i
    WHERE t.thread_id = i.thread_id AND i.thread_before IS NOT NULL
)
SELECT
    run_id, thread_id, assistant_id, graph_id, queue, status, metadata, kwargs, multitask_strategy,
    created_at, updated_at, scheduled_at, temporary, claim_no, attempts, lease_owner, cancel_action,
    cancel_reason, error
FROM inserted

-- name: accept_run
-- A create in one statement, on an existing thread or one that is made for the run. No row is
-- inserted or returned if there is no such thread, or if the assistant has changed since the run
-- was made from it. A client's assistant is locked, as in `keep_assistant`. The first run of a thread
-- sets the thread's fields, as in `insert_run`.
WITH kept AS MATERIALIZED (
    SELECT assistant_id FROM assistant
    WHERE assistant_id = %(assistant_id)s AND updated_at = %(assistant_updated_at)s
      AND NOT is_system
      AND (%(allowed_assistants)s::jsonb IS NULL OR belay_allows(%(allowed_assistants)s, metadata))
    FOR KEY SHARE
), unchanged AS MATERIALIZED (
    TABLE kept
    UNION ALL
    SELECT assistant_id FROM assistant
    WHERE assistant_id = %(assistant_id)s AND updated_at = %(assistant_updated_at)s AND is_system
), made_thread AS (
    INSERT INTO thread (
        thread_id, config, configurable, metadata, ttl_minutes, ttl_strategy)
    SELECT %(thread_id)s, %(thread_config)s, %(thread_configurable)s,
        %(thread_metadata)s || jsonb_build_object(
            'graph_id', %(graph_id)s::text, 'assistant_id', %(assistant_id)s::uuid),
        %(ttl_minutes)s, %(ttl_strategy)s
    FROM unchanged WHERE %(new_thread)s
    RETURNING thread_id, jsonb_build_object(
        'config', '{}'::jsonb, 'graph_id', %(thread_metadata)s::jsonb -> 'graph_id',
        'assistant_id', %(thread_metadata)s::jsonb -> 'assistant_id') AS before_first
), found_thread AS (
    SELECT t.thread_id, CASE WHEN t.config = '{}' THEN jsonb_build_object(
        'config', t.config, 'graph_id', t.metadata -> 'graph_id',
        'assistant_id', t.metadata -> 'assistant_id') END AS before_first
    FROM thread t, unchanged
    WHERE t.thread_id = %(thread_id)s AND t.hidden_at IS NULL AND NOT %(new_thread)s
      AND (%(allowed_threads)s::jsonb IS NULL OR belay_allows(%(allowed_threads)s, t.metadata))
    FOR NO KEY UPDATE OF t
), marked AS (
    UPDATE thread t SET
        config = %(thread_config)s, configurable = %(thread_configurable)s,
        metadata = t.metadata || jsonb_build_object(
            'graph_id', %(graph_id)s::text, 'assistant_id', %(assistant_id)s::uuid)
    FROM found_thread f
    WHERE t.thread_id = f.thread_id AND f.before_first IS NOT NULL
), accepted AS (
    INSERT INTO run (
        run_id, thread_id, assistant_id, graph_id, queue, metadata, kwargs, thread_config,
        thread_before, multitask_strategy, temporary, timeout_seconds, caller, creator,
        scheduled_at, next_ring_at
    )
    SELECT
        %(run_id)s, thread_id, %(assistant_id)s, %(graph_id)s, %(queue)s, %(metadata)s, %(kwargs)s,
        %(thread_config)s, before_first, %(multitask_strategy)s, %(temporary)s,
        %(timeout_seconds)s, %(caller)s, %(creator)s,
        now() + make_interval(secs => %(after_seconds)s),
        now() + make_interval(secs =>
            CASE WHEN %(after_seconds)s > 0 THEN %(after_seconds)s ELSE %(rering_seconds)s END)
    FROM (TABLE made_thread UNION ALL TABLE found_thread) t
    RETURNING run_id, thread_id, created_at, updated_at, scheduled_at
)
SELECT a.created_at, a.updated_at, a.scheduled_at, n.next_run_id, n.next_queue,
       n.next_graph_id
FROM accepted a CROSS JOIN LATERAL belay_next_due_run(a.thread_id) n

-- name: get_run
-- All columns except the outcome, which may be large, and some that the API does not need.
SELECT
    r.run_id, r.thread_id, r.assistant_id, r.graph_id, r.queue, r.status, r.metadata, r.kwargs,
    r.multitask_strategy, r.created_at, r.updated_at, r.scheduled_at, r.temporary, r.claim_no,
    r.attempts, r.lease_owner, r.cancel_action, r.cancel_reason, r.error
FROM run r
JOIN thread t USING (thread_id)
WHERE r.run_id = %(run_id)s
  AND (%(allowed_threads)s::jsonb IS NULL OR belay_allows(%(allowed_threads)s, t.metadata))

-- name: get_thread_run
SELECT
    r.run_id, r.thread_id, r.assistant_id, r.graph_id, r.queue, r.status, r.metadata, r.kwargs,
    r.multitask_strategy, r.created_at, r.updated_at, r.scheduled_at, r.temporary, r.claim_no,
    r.attempts, r.lease_owner, r.cancel_action, r.cancel_reason, r.error
FROM run r
JOIN thread t USING (thread_id)
WHERE r.run_id = %(run_id)s AND r.thread_id = %(thread_id)s
  AND (t.hidden_at IS NULL OR %(ended_stateless)s)
  AND (%(allowed_threads)s::jsonb IS NULL OR belay_allows(%(allowed_threads)s, t.metadata))

-- name: run_end
SELECT status, error, outcome -> 'interrupts' AS interrupts FROM run
WHERE run_id = %(run_id)s AND thread_id = %(thread_id)s
  AND (%(allowed_threads)s::jsonb IS NULL OR EXISTS (
      SELECT 1 FROM thread t
      WHERE t.thread_id = run.thread_id AND belay_allows(%(allowed_threads)s, t.metadata)))

-- name: creator_of_run
SELECT creator, kwargs #> '{config,configurable,langgraph_auth_user}' AS auth_user FROM run
WHERE run_id = %(run_id)s AND status = 'running' AND token_hash = %(token_hash)s

-- name: run_outcome
SELECT status, error, pg_column_size(outcome) AS stored_bytes,
    CASE WHEN pg_column_size(outcome) <= %(small)s THEN belay_answer(outcome)::text END AS answer
FROM run
WHERE run_id = %(run_id)s AND thread_id = %(thread_id)s
  AND (%(allowed_threads)s::jsonb IS NULL OR EXISTS (
      SELECT 1 FROM thread t
      WHERE t.thread_id = run.thread_id AND belay_allows(%(allowed_threads)s, t.metadata)))

-- name: run_answer
SELECT belay_answer(outcome)::text FROM run WHERE run_id = %(run_id)s AND outcome IS NOT NULL

-- name: list_runs
SELECT
    run_id, thread_id, assistant_id, graph_id, queue, status, metadata, kwargs, multitask_strategy,
    created_at, updated_at, scheduled_at, temporary, claim_no, attempts, lease_owner, cancel_action,
    cancel_reason, error
FROM run
WHERE thread_id = %(thread_id)s AND (%(status)s::text IS NULL OR status = %(status)s)
  AND metadata @> %(metadata)s
  AND (%(allowed_threads)s::jsonb IS NULL OR EXISTS (
      SELECT 1 FROM thread t
      WHERE t.thread_id = run.thread_id AND belay_allows(%(allowed_threads)s, t.metadata)))
ORDER BY seq DESC
LIMIT %(limit)s OFFSET %(offset)s

-- name: has_tombstone
SELECT EXISTS (SELECT 1 FROM run_tombstone WHERE run_id = %(run_id)s)

-- name: thread_of_tombstone
SELECT thread_id FROM run_tombstone WHERE run_id = %(run_id)s

-- name: lock_caller
SELECT pg_advisory_xact_lock(hashtextextended('belay caller ' || %(caller)s, 0))

-- name: count_pending_runs_of
SELECT count(*) FROM run WHERE caller = %(caller)s AND status = 'pending'

-- name: thread_is_busy
SELECT EXISTS (
    SELECT 1 FROM run WHERE thread_id = %(thread_id)s AND status IN ('pending', 'running'))

-- name: oldest_active_graph_id
SELECT graph_id FROM run
WHERE thread_id = %(thread_id)s
ORDER BY (status IN ('pending', 'running')) DESC, seq
LIMIT 1

-- name: delete_finished_run
DELETE FROM run
WHERE run_id = %(run_id)s AND thread_id = %(thread_id)s AND status NOT IN ('pending', 'running')
  AND (%(allowed_threads)s::jsonb IS NULL OR EXISTS (
      SELECT 1 FROM thread t
      WHERE t.thread_id = run.thread_id AND belay_allows(%(allowed_threads)s, t.metadata)))
RETURNING run_id

-- name: ended_runs
-- Those of these runs that have ended. A row that is gone was rolled back or deleted.
SELECT u.run_id, r.status FROM unnest(%(run_ids)s::uuid[]) AS u (run_id)
LEFT JOIN run r ON r.run_id = u.run_id
WHERE r.run_id IS NULL OR r.status NOT IN ('pending', 'running')

-- name: set_outcome
UPDATE run SET outcome = %(outcome)s
WHERE run_id = %(run_id)s AND outcome IS NULL AND status NOT IN ('pending', 'running')

-- name: last_checkpoint_of_run
SELECT checkpoint_id FROM checkpoints
WHERE thread_id = %(thread_id)s AND checkpoint_ns = '' AND metadata ->> 'run_id' = %(run_id)s
ORDER BY checkpoint_id DESC
LIMIT 1

-- name: disown_checkpoints
UPDATE checkpoints SET metadata = metadata - 'run_id'
WHERE thread_id = %(thread_id)s AND metadata ->> 'run_id' = %(run_id)s

-- name: checkpoint_exists
SELECT EXISTS (
    SELECT 1 FROM checkpoints
    WHERE thread_id = %(thread_id)s AND checkpoint_ns = %(checkpoint_ns)s
      AND (%(checkpoint_id)s::text IS NULL OR checkpoint_id = %(checkpoint_id)s))
