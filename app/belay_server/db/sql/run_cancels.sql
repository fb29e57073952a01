-- Cancel runs that have not started, flag running ones, and undo what a rolled-back run wrote.

-- name: rollback_reason
SELECT reason FROM run_tombstone WHERE run_id = %(run_id)s

-- name: active_runs_of_thread
-- Locked in run_id order, after the thread's row.
SELECT run_id, thread_id, seq, status, claim_no, temporary FROM run
WHERE thread_id = %(thread_id)s AND status IN ('pending', 'running')
ORDER BY run_id
FOR UPDATE

-- name: cancellable_runs
-- The active runs that match all conditions that are not null. A thread's newest run comes first:
-- if its queue is cancelled in several batches, none of the matching runs starts in between.
SELECT run_id, thread_id, seq, status, claim_no, temporary FROM run
WHERE status IN ('pending', 'running')
  AND (%(thread_id)s::uuid IS NULL OR thread_id = %(thread_id)s)
  AND (%(run_ids)s::uuid[] IS NULL OR run_id = ANY(%(run_ids)s))
  AND (%(status)s::text IS NULL OR status = %(status)s)
  AND (%(assistant_id)s::uuid IS NULL OR assistant_id = %(assistant_id)s)
  AND (%(allowed_threads)s::jsonb IS NULL OR EXISTS (
      SELECT 1 FROM thread t
      WHERE t.thread_id = run.thread_id
        AND (%(within_threads)s::jsonpath IS NULL OR t.metadata @@ %(within_threads)s::jsonpath)
        AND belay_allows(%(allowed_threads)s, t.metadata)))
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
      WHERE t.thread_id = run.thread_id
        AND (%(within_threads)s::jsonpath IS NULL OR t.metadata @@ %(within_threads)s::jsonpath)
        AND belay_allows(%(allowed_threads)s, t.metadata)))

-- name: flag_running_runs
-- Durable, unlike the flag in Redis. A rollback replaces an interrupt until the end is written.
UPDATE run SET
    cancel_action = CASE WHEN cancel_action = 'rollback' THEN 'rollback' ELSE %(action)s END,
    cancel_reason = CASE
        WHEN cancel_action IS NULL OR (cancel_action = 'interrupt' AND %(action)s = 'rollback')
        THEN %(reason)s ELSE cancel_reason END,
    cancel_requested_at = coalesce(cancel_requested_at, now()),
    updated_at = now()
WHERE run_id = ANY(%(run_ids)s) AND status = 'running'

-- name: interrupt_unstarted_runs
-- A run that never started ends at once. Its thread is left as it was.
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
ON CONFLICT (run_id) DO NOTHING

-- name: hide_temporary_threads
UPDATE thread SET hidden_at = now() WHERE thread_id = ANY(%(thread_ids)s) AND hidden_at IS NULL

-- name: restore_before_images
-- Delete the writes of other runs' checkpoints to which this run added. `reinsert_before_images`
-- then restores them as they were before.
DELETE FROM checkpoint_writes w USING run_before_image i
WHERE i.run_id = %(run_id)s AND w.thread_id = i.thread_id AND w.checkpoint_ns = i.checkpoint_ns
  AND w.checkpoint_id = i.checkpoint_id

-- name: reinsert_before_images
INSERT INTO checkpoint_writes
SELECT row.* FROM run_before_image i
CROSS JOIN LATERAL jsonb_populate_recordset(NULL::checkpoint_writes, i.writes) AS row
WHERE i.run_id = %(run_id)s

-- name: delete_checkpoints_of_run
-- Of the root graph and its subgraphs: the saver adds the run's id to every checkpoint. A blob is
-- deleted if no remaining checkpoint refers to it.
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
-- Restore the thread's fields that the run has set, except those that were changed since.
UPDATE thread t SET
    config = CASE WHEN t.config = r.thread_config
        THEN r.thread_before -> 'config' ELSE t.config END,
    configurable = CASE WHEN r.thread_before -> 'config' = '{}' THEN '{}' ELSE t.configurable END,
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
WHERE r.run_id = ANY(%(run_ids)s) AND t.thread_id = r.thread_id AND r.thread_before IS NOT NULL

-- name: replace_by_tombstone
WITH gone AS (
    DELETE FROM run WHERE run_id = %(run_id)s RETURNING run_id, thread_id, cancel_reason
)
INSERT INTO run_tombstone (run_id, thread_id, reason)
SELECT run_id, thread_id, cancel_reason FROM gone
ON CONFLICT (run_id) DO NOTHING

-- name: end_put_back_run
-- An interrupt of a run that had started and was put back: it ends at once, and its thread has the
-- state of the last checkpoint.
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
