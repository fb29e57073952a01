-- Every move of a run's life is one guarded statement that returns the new row or nothing.

-- name: insert_run
-- `next_ring_at` is when the sweeper rings a run whose doorbell was lost, or that becomes due.
INSERT INTO run (
    run_id, thread_id, assistant_id, graph_id, queue, metadata, kwargs, thread_config,
    multitask_strategy, temporary, timeout_seconds, caller, id_chosen, scheduled_at, next_ring_at
)
SELECT
    %(run_id)s, %(thread_id)s, %(assistant_id)s, %(graph_id)s, %(queue)s, %(metadata)s, %(kwargs)s,
    %(thread_config)s, %(multitask_strategy)s, %(temporary)s, %(timeout_seconds)s, %(caller)s,
    %(id_chosen)s, now() + make_interval(secs => %(after_seconds)s),
    now() + make_interval(secs =>
        CASE WHEN %(after_seconds)s > 0 THEN %(after_seconds)s ELSE %(rering_seconds)s END)
ON CONFLICT (run_id) DO NOTHING
RETURNING *

-- name: accept_run
-- A create that has nothing to decide: one statement, on a thread that is there or on one that is
-- made for the run. Nothing is done, and nothing comes back, when there is no such thread, or when
-- the assistant is not what it was when the run was made from it.
WITH unchanged AS MATERIALIZED (
    SELECT assistant_id FROM assistant
    WHERE assistant_id = %(assistant_id)s AND updated_at = %(assistant_updated_at)s
      AND (%(allowed_assistants)s::jsonb IS NULL OR belay_allows(%(allowed_assistants)s, metadata)
           OR metadata ->> 'created_by' = 'system')
), made_thread AS (
    -- With what the claim would otherwise have to set.
    INSERT INTO thread (thread_id, config, metadata, ttl_minutes, ttl_strategy)
    SELECT %(thread_id)s, %(thread_config)s,
        %(thread_metadata)s || jsonb_build_object(
            'graph_id', %(graph_id)s::text, 'assistant_id', %(assistant_id)s::uuid),
        %(ttl_minutes)s, %(ttl_strategy)s
    FROM unchanged WHERE %(new_thread)s
    RETURNING thread_id
), found_thread AS (
    SELECT t.thread_id FROM thread t, unchanged
    WHERE t.thread_id = %(thread_id)s AND t.hidden_at IS NULL AND NOT %(new_thread)s
      AND (%(allowed_threads)s::jsonb IS NULL OR belay_allows(%(allowed_threads)s, t.metadata))
    FOR NO KEY UPDATE OF t
), accepted AS (
    INSERT INTO run (
        run_id, thread_id, assistant_id, graph_id, queue, metadata, kwargs, thread_config,
        multitask_strategy, temporary, timeout_seconds, caller, scheduled_at, next_ring_at
    )
    SELECT
        %(run_id)s, thread_id, %(assistant_id)s, %(graph_id)s, %(queue)s, %(metadata)s, %(kwargs)s,
        %(thread_config)s, %(multitask_strategy)s, %(temporary)s, %(timeout_seconds)s, %(caller)s,
        now() + make_interval(secs => %(after_seconds)s),
        now() + make_interval(secs =>
            CASE WHEN %(after_seconds)s > 0 THEN %(after_seconds)s ELSE %(rering_seconds)s END)
    FROM (SELECT thread_id FROM made_thread UNION ALL SELECT thread_id FROM found_thread) t
    RETURNING run_id, thread_id, created_at, updated_at, scheduled_at
)
SELECT a.created_at, a.updated_at, a.scheduled_at, n.next_run_id, n.next_queue
FROM accepted a CROSS JOIN LATERAL belay_next_run(a.thread_id) n

-- name: get_run
SELECT r.* FROM run r
JOIN thread t USING (thread_id)
WHERE r.run_id = %(run_id)s
  AND (%(allowed_threads)s::jsonb IS NULL OR belay_allows(%(allowed_threads)s, t.metadata))

-- name: get_thread_run
SELECT r.* FROM run r
JOIN thread t USING (thread_id)
WHERE r.run_id = %(run_id)s AND r.thread_id = %(thread_id)s
  AND (t.hidden_at IS NULL OR %(ended_stateless)s)
  AND (%(allowed_threads)s::jsonb IS NULL OR belay_allows(%(allowed_threads)s, t.metadata))

-- name: run_outcome
SELECT status, error, outcome FROM run
WHERE run_id = %(run_id)s AND thread_id = %(thread_id)s
  AND (%(allowed_threads)s::jsonb IS NULL OR EXISTS (
      SELECT 1 FROM thread t
      WHERE t.thread_id = run.thread_id AND belay_allows(%(allowed_threads)s, t.metadata)))

-- name: list_runs
SELECT * FROM run
WHERE thread_id = %(thread_id)s AND (%(status)s::text IS NULL OR status = %(status)s)
  AND metadata @> %(metadata)s
  AND (%(allowed_threads)s::jsonb IS NULL OR EXISTS (
      SELECT 1 FROM thread t
      WHERE t.thread_id = run.thread_id AND belay_allows(%(allowed_threads)s, t.metadata)))
ORDER BY seq DESC
LIMIT %(limit)s OFFSET %(offset)s

-- name: run_is_buried
SELECT EXISTS (SELECT 1 FROM run_tombstone WHERE run_id = %(run_id)s)

-- name: thread_of_buried_run
SELECT thread_id FROM run_tombstone WHERE run_id = %(run_id)s

-- name: rollback_reason
SELECT reason FROM run_tombstone WHERE run_id = %(run_id)s

-- name: active_runs_of_thread
-- Locked in run_id order, after the thread's row.
SELECT run_id, thread_id, seq, status, claim_no, temporary FROM run
WHERE thread_id = %(thread_id)s AND status IN ('pending', 'running')
ORDER BY run_id
FOR UPDATE

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

-- name: claim_run
-- The compare-and-set at the heart of it: pending to running, for the head of its thread's queue
-- only, and only while the thread has no running run. Saves what it changes on the thread.
WITH locked AS (
    SELECT t.thread_id, t.config, t.metadata FROM thread t
    WHERE t.thread_id = (SELECT thread_id FROM run WHERE run_id = %(run_id)s AND status = 'pending')
    FOR NO KEY UPDATE
), head AS (
    SELECT h.run_id FROM locked CROSS JOIN LATERAL (
        SELECT p.run_id FROM run p
        WHERE p.thread_id = locked.thread_id AND p.status = 'pending' AND p.scheduled_at <= now()
        ORDER BY (p.claim_no > 0) DESC, p.seq
        LIMIT 1
        FOR UPDATE
    ) h
    WHERE NOT EXISTS (
        SELECT 1 FROM run b WHERE b.thread_id = locked.thread_id AND b.status = 'running')
), claimed AS (
    UPDATE run r SET
        status = 'running',
        claim_no = r.claim_no + 1,
        attempts = r.attempts + 1,
        lease_owner = %(owner)s,
        lease_expires_at = now() + make_interval(secs => %(lease_seconds)s),
        next_ring_at = NULL,
        started_at = coalesce(r.started_at, now()),
        updated_at = now(),
        thread_before = coalesce(r.thread_before, jsonb_build_object(
            'config', locked.config,
            'graph_id', locked.metadata -> 'graph_id',
            'assistant_id', locked.metadata -> 'assistant_id'))
    FROM head, locked
    WHERE r.run_id = head.run_id AND r.run_id = %(run_id)s AND r.status = 'pending'
    RETURNING r.*
), marked AS (
    UPDATE thread t SET
        config = c.thread_config,
        metadata = t.metadata || jsonb_build_object(
            'graph_id', c.graph_id, 'assistant_id', c.assistant_id),
        updated_at = now()
    FROM claimed c
    WHERE t.thread_id = c.thread_id AND t.hidden_at IS NULL
      AND (t.config <> c.thread_config
           OR (t.metadata ->> 'graph_id', t.metadata ->> 'assistant_id')
              IS DISTINCT FROM (c.graph_id, c.assistant_id::text))
)
SELECT run_id, thread_id, assistant_id, graph_id, kwargs, metadata, temporary, claim_no, attempts,
       timeout_seconds,
       belay_has_checkpoints(thread_id) AS has_checkpoints,
       extract(epoch FROM updated_at - scheduled_at)::float8 AS waited_seconds
FROM claimed

-- name: held_run
SELECT run_id, thread_id, assistant_id, graph_id, kwargs, metadata, temporary, claim_no, attempts,
       timeout_seconds, belay_has_checkpoints(thread_id) AS has_checkpoints,
       extract(epoch FROM updated_at - scheduled_at)::float8 AS waited_seconds
FROM run
WHERE run_id = %(run_id)s AND status = 'running' AND lease_owner = %(owner)s

-- name: renew_leases
-- One round trip for all runs of a worker, which also answers which of them are to be cancelled.
-- A row whose lock is taken (a checkpoint being written) is renewed next time; a claim that is not
-- returned is lost. An owner may renew an expired lease that nobody has taken.
WITH mine AS (
    SELECT u.run_id, u.claim_no
    FROM unnest(%(run_ids)s::uuid[], %(claim_nos)s::int[]) AS u (run_id, claim_no)
), free AS (
    SELECT r.run_id FROM run r JOIN mine USING (run_id, claim_no)
    WHERE r.status = 'running'
    ORDER BY r.run_id
    FOR NO KEY UPDATE OF r SKIP LOCKED
), renewed AS (
    UPDATE run r SET lease_expires_at = now() + make_interval(secs => %(lease_seconds)s)
    FROM free WHERE r.run_id = free.run_id
)
SELECT r.run_id, r.claim_no, r.cancel_action
FROM run r JOIN mine USING (run_id, claim_no)
WHERE r.status = 'running'

-- name: cancel_actions
SELECT run_id, claim_no, cancel_action FROM run
WHERE run_id = ANY(%(run_ids)s) AND status = 'running'

-- name: finish_run
-- The end a graph reached by itself. Nothing comes back when the claim is over, or when a cancel
-- was accepted first: then the cancel wins, and every answer says so. The thread's next run is asked
-- for by a function: this statement's own snapshot is older than its wait for the thread's row, and
-- would miss a run created meanwhile.
WITH locked AS (
    SELECT thread_id FROM thread WHERE thread_id = %(thread_id)s FOR NO KEY UPDATE
), ended AS (
    UPDATE run r SET
        status = %(status)s, error = %(error)s, outcome = %(outcome)s,
        lease_owner = NULL, lease_expires_at = NULL, ended_at = now(), updated_at = now()
    FROM locked
    WHERE r.run_id = %(run_id)s AND r.claim_no = %(claim_no)s AND r.status = 'running'
      AND r.cancel_action IS NULL
    RETURNING r.run_id, r.thread_id, r.temporary
), rested AS (
    UPDATE thread t SET
        "values" = CASE WHEN %(values_known)s THEN %(values)s ELSE t."values" END,
        values_known = %(values_known)s, interrupts = %(interrupts)s, error = %(error)s,
        resting_status = %(resting_status)s, state_updated_at = now(), updated_at = now(),
        hidden_at = CASE WHEN e.temporary THEN now() END
    FROM ended e
    WHERE t.thread_id = e.thread_id
)
SELECT e.run_id, n.next_run_id, n.next_queue
FROM ended e CROSS JOIN LATERAL belay_next_run(e.thread_id) n

-- name: finish_interrupted_run
-- The end of a run whose cancel was accepted with `interrupt`. `pending` covers a run that had
-- started and was put back before the cancel came.
WITH locked AS (
    SELECT thread_id FROM thread WHERE thread_id = %(thread_id)s FOR NO KEY UPDATE
), ended AS (
    UPDATE run r SET
        status = 'interrupted', error = r.cancel_reason, outcome = %(outcome)s,
        lease_owner = NULL, lease_expires_at = NULL, ended_at = now(), updated_at = now()
    FROM locked
    WHERE r.run_id = %(run_id)s AND r.claim_no = %(claim_no)s AND r.status = 'running'
      AND r.cancel_action = 'interrupt'
    RETURNING r.run_id, r.thread_id, r.temporary, r.cancel_reason
), rested AS (
    UPDATE thread t SET
        "values" = CASE WHEN %(values_known)s THEN %(values)s ELSE t."values" END,
        values_known = %(values_known)s, interrupts = %(interrupts)s, error = e.cancel_reason,
        resting_status = %(resting_status)s, state_updated_at = now(), updated_at = now(),
        hidden_at = CASE WHEN e.temporary THEN now() END
    FROM ended e
    WHERE t.thread_id = e.thread_id
)
SELECT e.run_id, n.next_run_id, n.next_queue
FROM ended e CROSS JOIN LATERAL belay_next_run(e.thread_id) n

-- name: put_run_back
-- Back to pending: a drain gives the attempt back, a lost worker does not.
UPDATE run SET
    status = 'pending', lease_owner = NULL, lease_expires_at = NULL, updated_at = now(),
    attempts = attempts - %(uncharge)s,
    next_ring_at = now() + make_interval(secs => %(rering_seconds)s)
WHERE run_id = %(run_id)s AND claim_no = %(claim_no)s AND status = 'running'
  AND cancel_action IS NULL
RETURNING run_id, queue

-- name: lock_claimed_run
-- For an ending that takes several statements. The thread's row is locked before.
SELECT *,
       extract(epoch FROM clock_timestamp() - cancel_requested_at)::float8 AS cancel_seconds
FROM run
WHERE run_id = %(run_id)s AND claim_no = %(claim_no)s AND status IN ('pending', 'running')
FOR UPDATE

-- name: expired_leases
-- Only for the sweeper of this moment, and only while it may judge: one statement, so that a server
-- that hangs between the question and the answer cannot make healthy runs look lost.
SELECT run_id, claim_no FROM run
WHERE status = 'running' AND lease_expires_at < now()
  AND EXISTS (
      SELECT 1 FROM scheduler_lease s
      WHERE s.name = 'sweeper' AND s.owner = %(sweeper)s
        AND s.expires_at >= now() AND s.judges_after <= now())
ORDER BY lease_expires_at
LIMIT %(limit)s

-- name: lease_is_expired
SELECT EXISTS (
    SELECT 1 FROM run
    WHERE run_id = %(run_id)s AND claim_no = %(claim_no)s AND status = 'running'
      AND lease_expires_at < now())

-- name: ring_due_runs
-- Pending runs nobody has rung for a while, or that have just become due. All that were looked at
-- are postponed with backoff; only those at the head of an idle thread are returned for ringing.
WITH due AS (
    SELECT run_id, thread_id, queue, seq, claim_no FROM run
    WHERE status = 'pending' AND next_ring_at <= now()
    ORDER BY next_ring_at
    LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED
), postponed AS (
    UPDATE run r SET
        rings = r.rings + 1,
        next_ring_at = now() + make_interval(secs =>
            least(60, %(rering_seconds)s * power(2, least(r.rings, 4))))
    FROM due WHERE r.run_id = due.run_id
)
SELECT d.run_id, d.queue FROM due d
WHERE NOT EXISTS (SELECT 1 FROM run b WHERE b.thread_id = d.thread_id AND b.status = 'running')
  AND d.run_id = (
      SELECT h.run_id FROM run h
      WHERE h.thread_id = d.thread_id AND h.status = 'pending' AND h.scheduled_at <= now()
      ORDER BY (h.claim_no > 0) DESC, h.seq LIMIT 1)


-- name: cancellable_runs
-- What a cancel may hit, by any of the filters that are not null. A thread's newest run comes first:
-- when its queue is cancelled in more than one batch, nothing of it starts in between.
SELECT run_id, thread_id, seq, status, claim_no, temporary FROM run
WHERE status IN ('pending', 'running')
  AND (%(thread_id)s::uuid IS NULL OR thread_id = %(thread_id)s)
  AND (%(run_ids)s::uuid[] IS NULL OR run_id = ANY(%(run_ids)s))
  AND (%(status)s::text IS NULL OR status = %(status)s)
  AND (%(assistant_id)s::uuid IS NULL OR assistant_id = %(assistant_id)s)
  AND (%(allowed_threads)s::jsonb IS NULL OR EXISTS (
      SELECT 1 FROM thread t
      WHERE t.thread_id = run.thread_id AND belay_allows(%(allowed_threads)s, t.metadata)))
  AND (%(after_thread_id)s::uuid IS NULL
       OR (thread_id, seq) < (%(after_thread_id)s::uuid, %(after_seq)s::bigint))
ORDER BY thread_id DESC, seq DESC
LIMIT %(limit)s

-- name: lock_threads
SELECT thread_id FROM thread WHERE thread_id = ANY(%(thread_ids)s)
ORDER BY thread_id
FOR NO KEY UPDATE

-- name: lock_runs
SELECT run_id, thread_id, seq, status, claim_no, temporary FROM run
WHERE run_id = ANY(%(run_ids)s) AND status IN ('pending', 'running')
  AND (%(status)s::text IS NULL OR status = %(status)s)
ORDER BY run_id
FOR UPDATE

-- name: count_known_runs
SELECT count(*) FROM run
WHERE (%(thread_id)s::uuid IS NULL OR thread_id = %(thread_id)s) AND run_id = ANY(%(run_ids)s)
  AND (%(allowed_threads)s::jsonb IS NULL OR EXISTS (
      SELECT 1 FROM thread t
      WHERE t.thread_id = run.thread_id AND belay_allows(%(allowed_threads)s, t.metadata)))

-- name: flag_running_runs
-- The guarantee behind the Redis flag. Rollback wins until the end is written.
UPDATE run SET
    cancel_action = CASE WHEN cancel_action = 'rollback' THEN 'rollback' ELSE %(action)s END,
    cancel_reason = CASE
        WHEN cancel_action IS NULL OR (cancel_action = 'interrupt' AND %(action)s = 'rollback')
        THEN %(reason)s ELSE cancel_reason END,
    cancel_requested_at = coalesce(cancel_requested_at, now()),
    updated_at = now()
WHERE run_id = ANY(%(run_ids)s) AND status = 'running'

-- name: interrupt_unstarted_runs
-- A run that never started ends at once and leaves its thread as it was.
UPDATE run SET
    status = 'interrupted', cancel_action = 'interrupt', cancel_reason = %(reason)s,
    cancel_requested_at = now(), ended_at = now(), updated_at = now(), error = %(reason)s
WHERE run_id = ANY(%(run_ids)s) AND status = 'pending'

-- name: roll_back_unstarted_runs
WITH gone AS (
    DELETE FROM run WHERE run_id = ANY(%(run_ids)s) AND status = 'pending'
    RETURNING run_id, thread_id
)
INSERT INTO run_tombstone (run_id, thread_id, reason)
SELECT run_id, thread_id, %(reason)s FROM gone

-- name: hide_temporary_threads
UPDATE thread SET hidden_at = now() WHERE thread_id = ANY(%(thread_ids)s) AND hidden_at IS NULL

-- name: restore_before_images
-- First what the run wrote on other runs' checkpoints, then their writes as they were.
DELETE FROM checkpoint_writes w USING run_before_image i
WHERE i.run_id = %(run_id)s AND w.thread_id = i.thread_id AND w.checkpoint_ns = i.checkpoint_ns
  AND w.checkpoint_id = i.checkpoint_id

-- name: reinsert_before_images
INSERT INTO checkpoint_writes
SELECT row.* FROM run_before_image i
CROSS JOIN LATERAL jsonb_populate_recordset(NULL::checkpoint_writes, i.writes) AS row
WHERE i.run_id = %(run_id)s

-- name: delete_checkpoints_of_run
-- Root and subgraphs alike: the saver stamps every checkpoint with its run. Blobs go when no
-- checkpoint that stays refers to them.
WITH gone AS (
    DELETE FROM checkpoints
    WHERE thread_id = %(thread_id)s AND metadata ->> 'run_id' = %(run_id)s
    RETURNING checkpoint_ns, checkpoint_id, checkpoint -> 'channel_versions' AS versions
), gone_writes AS (
    DELETE FROM checkpoint_writes w USING gone g
    WHERE w.thread_id = %(thread_id)s AND w.checkpoint_ns = g.checkpoint_ns
      AND w.checkpoint_id = g.checkpoint_id
), orphan AS (
    SELECT g.checkpoint_ns, v.key AS channel, v.value AS version
    FROM gone g CROSS JOIN LATERAL jsonb_each_text(g.versions) AS v
    EXCEPT
    SELECT c.checkpoint_ns, v.key, v.value
    FROM checkpoints c CROSS JOIN LATERAL jsonb_each_text(c.checkpoint -> 'channel_versions') AS v
    WHERE c.thread_id = %(thread_id)s AND c.metadata ->> 'run_id' IS DISTINCT FROM %(run_id)s
)
DELETE FROM checkpoint_blobs b USING orphan o
WHERE b.thread_id = %(thread_id)s AND b.checkpoint_ns = o.checkpoint_ns
  AND b.channel = o.channel AND b.version = o.version

-- name: restore_thread_marks
-- What the claim set on the thread goes back to what it was, unless somebody changed it since.
UPDATE thread t SET
    config = CASE WHEN t.config = r.thread_config
        THEN r.thread_before -> 'config' ELSE t.config END,
    metadata = (t.metadata - CASE WHEN t.metadata -> 'graph_id' = to_jsonb(r.graph_id)
            THEN ARRAY['graph_id'] ELSE ARRAY[]::text[] END
        - CASE WHEN t.metadata -> 'assistant_id' = to_jsonb(r.assistant_id)
            THEN ARRAY['assistant_id'] ELSE ARRAY[]::text[] END)
        || CASE WHEN t.metadata -> 'graph_id' = to_jsonb(r.graph_id)
            AND r.thread_before -> 'graph_id' <> 'null'
            THEN jsonb_build_object('graph_id', r.thread_before -> 'graph_id') ELSE '{}' END
        || CASE WHEN t.metadata -> 'assistant_id' = to_jsonb(r.assistant_id)
            AND r.thread_before -> 'assistant_id' <> 'null'
            THEN jsonb_build_object('assistant_id', r.thread_before -> 'assistant_id')
            ELSE '{}' END,
    hidden_at = CASE WHEN r.temporary THEN now() END,
    updated_at = now()
FROM run r
WHERE r.run_id = %(run_id)s AND t.thread_id = r.thread_id AND r.thread_before IS NOT NULL

-- name: bury_run
WITH gone AS (
    DELETE FROM run WHERE run_id = %(run_id)s RETURNING run_id, thread_id, cancel_reason
)
INSERT INTO run_tombstone (run_id, thread_id, reason)
SELECT run_id, thread_id, cancel_reason FROM gone

-- name: delete_finished_run
DELETE FROM run
WHERE run_id = %(run_id)s AND thread_id = %(thread_id)s AND status NOT IN ('pending', 'running')
  AND (%(allowed_threads)s::jsonb IS NULL OR EXISTS (
      SELECT 1 FROM thread t
      WHERE t.thread_id = run.thread_id AND belay_allows(%(allowed_threads)s, t.metadata)))
RETURNING run_id

-- name: ended_runs
-- Which of these runs have ended: a row that is gone was rolled back or deleted.
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

-- name: checkpoint_exists
SELECT EXISTS (
    SELECT 1 FROM checkpoints
    WHERE thread_id = %(thread_id)s AND checkpoint_ns = %(checkpoint_ns)s
      AND (%(checkpoint_id)s::text IS NULL OR checkpoint_id = %(checkpoint_id)s))

-- name: take_sweeper_lease
-- Every worker tries all the time, so a lease that stood expired for a while means that nobody could
-- reach this database: owners of runs then get time to renew before anyone judges them. A database
-- that nobody has swept before has no runs to judge.
INSERT INTO scheduler_lease AS held (name, owner, expires_at, judges_after)
VALUES ('sweeper', %(owner)s, now() + make_interval(secs => %(seconds)s), now())
ON CONFLICT (name) DO UPDATE SET
    owner = EXCLUDED.owner,
    expires_at = EXCLUDED.expires_at,
    judges_after = CASE
        WHEN held.expires_at < now() - make_interval(secs => %(tolerance_seconds)s)
        THEN now() + make_interval(secs => %(patience_seconds)s)
        ELSE held.judges_after END
WHERE held.owner = EXCLUDED.owner OR held.expires_at < now()
RETURNING owner

-- name: drop_sweeper_lease
-- The next one may take it at once, and the row still says when it was last held.
UPDATE scheduler_lease SET expires_at = now() WHERE name = 'sweeper' AND owner = %(owner)s

-- name: end_put_back_run
-- An interrupt for a run that had started and was waiting to be continued: it ends at once, and
-- its thread rests where its last checkpoint left it.
WITH ended AS (
    UPDATE run r SET
        status = 'interrupted', cancel_action = 'interrupt', cancel_reason = %(reason)s,
        cancel_requested_at = now(), error = %(reason)s, ended_at = now(), updated_at = now()
    WHERE r.run_id = %(run_id)s AND r.status = 'pending'
    RETURNING r.thread_id, r.temporary
)
UPDATE thread t SET
    values_known = false, error = %(reason)s, resting_status = 'interrupted',
    state_updated_at = now(), updated_at = now(),
    hidden_at = CASE WHEN e.temporary THEN now() END
FROM ended e
WHERE t.thread_id = e.thread_id

-- name: set_cancel_reason
UPDATE run SET cancel_reason = %(reason)s WHERE run_id = %(run_id)s

-- name: next_runs_of_threads
SELECT n.run_id, n.queue FROM unnest(%(thread_ids)s::uuid[]) AS u (thread_id)
CROSS JOIN LATERAL (
    SELECT p.run_id, p.queue FROM run p
    WHERE p.thread_id = u.thread_id AND p.status = 'pending' AND p.scheduled_at <= now()
    ORDER BY (p.claim_no > 0) DESC, p.seq LIMIT 1
) n
WHERE NOT EXISTS (SELECT 1 FROM run b WHERE b.thread_id = u.thread_id AND b.status = 'running')
