-- Every statement that reads a thread for a client checks access: `allowed_threads` is the filter
-- of the caller's access, null if the caller may access every thread.

-- name: insert_thread
INSERT INTO thread (thread_id, metadata, ttl_minutes, ttl_strategy)
VALUES (%(thread_id)s, %(metadata)s, %(ttl_minutes)s, %(ttl_strategy)s)
ON CONFLICT (thread_id) DO NOTHING
RETURNING thread_id

-- name: replace_hidden_thread
-- The id of an ended stateless thread that is not deleted yet may be used again at once, but only
-- by a caller who may access that thread. For other callers the id is taken.
DELETE FROM thread
WHERE thread_id = %(thread_id)s AND hidden_at IS NOT NULL
  AND (%(allowed_threads)s::jsonb IS NULL OR belay_allows(%(allowed_threads)s, metadata))

-- name: get_thread
SELECT thread_id, created_at, updated_at, state_updated_at, metadata, config, status,
    CASE WHEN %(with_values)s THEN "values"::text END AS "values", values_known, interrupts::text AS interrupts, error,
    ttl_minutes, ttl_strategy, expires_at
FROM thread_view
WHERE thread_id = %(thread_id)s
  AND (%(allowed_threads)s::jsonb IS NULL OR belay_allows(%(allowed_threads)s, metadata))

-- name: thread_defaults
SELECT thread_id, metadata, configurable FROM thread
WHERE thread_id = %(thread_id)s AND hidden_at IS NULL
  AND (%(allowed_threads)s::jsonb IS NULL OR belay_allows(%(allowed_threads)s, metadata))

-- name: interrupt_ids_of_thread
-- The ids of its pending interrupts, but those that an active run answers.
SELECT question ->> 'id' AS id
FROM thread t, jsonb_each(coalesce(interrupts, '{}')) AS of_task (task_id, questions),
    jsonb_array_elements(of_task.questions) WITH ORDINALITY AS asked (question, number)
WHERE t.thread_id = %(thread_id)s
  AND NOT EXISTS (
    SELECT FROM run r
    WHERE r.thread_id = t.thread_id AND r.status IN ('pending', 'running')
      AND r.kwargs #> '{command,resume}' ? (question ->> 'id'))
ORDER BY task_id, number

-- name: lock_thread
SELECT thread_id FROM thread
WHERE thread_id = %(thread_id)s AND (hidden_at IS NULL OR %(ended_stateless)s)
  AND (%(allowed_threads)s::jsonb IS NULL OR belay_allows(%(allowed_threads)s, metadata))
FOR NO KEY UPDATE

-- name: patch_thread
UPDATE thread SET
    metadata = metadata || %(metadata)s, updated_at = now(),
    ttl_minutes = coalesce(%(ttl_minutes)s::double precision, ttl_minutes),
    ttl_strategy = coalesce(%(ttl_strategy)s::text, ttl_strategy)
WHERE thread_id = %(thread_id)s AND hidden_at IS NULL
  AND (%(allowed_threads)s::jsonb IS NULL OR belay_allows(%(allowed_threads)s, metadata))
RETURNING thread_id

-- name: delete_thread
-- Also returns the ids of its runs, because their event logs are in Redis.
WITH its AS (
    SELECT run_id FROM run WHERE thread_id = %(thread_id)s
), gone AS (
    DELETE FROM thread WHERE thread_id = %(thread_id)s RETURNING thread_id
)
SELECT thread_id, ARRAY(SELECT run_id FROM its) AS run_ids FROM gone

-- name: delete_thread_checkpoints
WITH a AS (DELETE FROM checkpoints WHERE thread_id = ANY(%(thread_ids)s)),
     b AS (DELETE FROM checkpoint_blobs WHERE thread_id = ANY(%(thread_ids)s))
DELETE FROM checkpoint_writes WHERE thread_id = ANY(%(thread_ids)s)

-- name: bury_chosen_runs
-- A retried create with an id that the client chose must find that the run has already existed.
INSERT INTO run_tombstone (run_id, thread_id)
SELECT run_id, thread_id FROM run WHERE thread_id = %(thread_id)s AND id_chosen
ON CONFLICT DO NOTHING

-- name: hidden_threads
SELECT thread_id FROM thread
WHERE hidden_at < now() - make_interval(secs => %(seconds)s)
  AND thread_id <> ALL (%(but)s::uuid[])
ORDER BY hidden_at
LIMIT %(limit)s

-- name: search_threads
SELECT thread_id, created_at, updated_at, state_updated_at, metadata, config, status,
    CASE WHEN %(with_values)s THEN "values"::text END AS "values", values_known, interrupts::text AS interrupts, error,
    ttl_minutes, ttl_strategy, expires_at
FROM thread_view
WHERE (%(ids)s::uuid[] IS NULL OR thread_id = ANY(%(ids)s))
  AND metadata @> %(metadata)s
  AND (%(values)s::jsonb IS NULL OR "values" @> %(values)s)
  AND (%(status)s::text IS NULL OR status = %(status)s)
  AND (%(within_threads)s::jsonpath IS NULL OR metadata @@ %(within_threads)s::jsonpath)
  AND (%(allowed_threads)s::jsonb IS NULL OR belay_allows(%(allowed_threads)s, metadata))
ORDER BY {sort_by} {sort_order}, thread_id
LIMIT %(limit)s OFFSET %(offset)s

-- name: threads_with_unknown_values
SELECT thread_id, created_at, updated_at, state_updated_at, metadata, config, status,
    NULL::text AS "values", values_known, interrupts::text AS interrupts, error,
    ttl_minutes, ttl_strategy, expires_at
FROM thread_view
WHERE NOT values_known AND status <> 'busy'
  AND (%(ids)s::uuid[] IS NULL OR thread_id = ANY(%(ids)s))
  AND metadata @> %(metadata)s
  AND (%(within_threads)s::jsonpath IS NULL OR metadata @@ %(within_threads)s::jsonpath)
  AND (%(allowed_threads)s::jsonb IS NULL OR belay_allows(%(allowed_threads)s, metadata))

-- name: count_threads
SELECT count(*) FROM thread_view
WHERE (%(ids)s::uuid[] IS NULL OR thread_id = ANY(%(ids)s))
  AND metadata @> %(metadata)s
  AND (%(values)s::jsonb IS NULL OR "values" @> %(values)s)
  AND (%(status)s::text IS NULL OR status = %(status)s)
  AND (%(within_threads)s::jsonpath IS NULL OR metadata @@ %(within_threads)s::jsonpath)
  AND (%(allowed_threads)s::jsonb IS NULL OR belay_allows(%(allowed_threads)s, metadata))

-- name: rest_thread
-- Update a thread from its newest checkpoint, which the API has written or a killed run has left.
UPDATE thread SET
    "values" = %(values)s, values_known = true, interrupts = %(interrupts)s,
    resting_status = CASE
        WHEN %(keep_error)s AND resting_status = 'error' THEN 'error'
        ELSE coalesce(%(resting_status)s::text, resting_status) END,
    error = CASE WHEN %(keep_error)s THEN error END,
    state_updated_at = now(), updated_at = now()
WHERE thread_id = %(thread_id)s
  AND NOT EXISTS (
      SELECT 1 FROM run r WHERE r.thread_id = thread.thread_id
      AND r.status IN ('pending', 'running'))
  AND (%(newest)s::text IS NULL OR %(newest)s = (
      SELECT max(checkpoint_id) FROM checkpoints c
      WHERE c.thread_id = thread.thread_id::text AND c.checkpoint_ns = ''))

-- name: forget_values
-- Also clear the error, because it does not apply to the thread's new state.
UPDATE thread SET
    values_known = false, error = NULL, state_updated_at = now(), updated_at = now(),
    resting_status = CASE WHEN resting_status = 'error' THEN 'idle' ELSE resting_status END
WHERE thread_id = %(thread_id)s

-- name: has_checkpoints
SELECT belay_has_checkpoints(%(thread_id)s)

-- name: newest_checkpoints
SELECT (SELECT max(checkpoint_id) FROM checkpoints c
        WHERE c.thread_id = %(thread_id)s AND c.checkpoint_ns = namespace) AS newest
FROM unnest(%(namespaces)s::text[]) WITH ORDINALITY AS asked (namespace, number)
ORDER BY number

-- name: repeatable_read
SET TRANSACTION ISOLATION LEVEL REPEATABLE READ

-- name: copy_thread
-- A busy thread's copy reads its values from the copied checkpoint, which is newer than the row.
INSERT INTO thread (thread_id, metadata, config, configurable, resting_status, "values",
                    values_known, interrupts, error, ttl_minutes, ttl_strategy)
SELECT %(copy_id)s, t.metadata || %(metadata)s, t.config, t.configurable, t.resting_status, t."values",
       t.values_known AND v.status <> 'busy', t.interrupts, t.error, t.ttl_minutes, t.ttl_strategy
FROM thread t JOIN thread_view v USING (thread_id)
WHERE t.thread_id = %(thread_id)s
  AND (%(allowed_threads)s::jsonb IS NULL OR belay_allows(%(allowed_threads)s, t.metadata))
RETURNING thread_id

-- name: copy_checkpoints
-- All namespaces. One statement reads them in one snapshot.
WITH copied AS (
    INSERT INTO checkpoints (thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id, type,
                             checkpoint, metadata)
    SELECT %(copy_id)s, checkpoint_ns, checkpoint_id, parent_checkpoint_id, type, checkpoint,
           metadata || jsonb_build_object('thread_id', %(copy_id)s::text)
    FROM checkpoints WHERE thread_id = %(thread_id)s
), copied_blobs AS (
    INSERT INTO checkpoint_blobs (thread_id, checkpoint_ns, channel, version, type, blob)
    SELECT %(copy_id)s, checkpoint_ns, channel, version, type, blob
    FROM checkpoint_blobs WHERE thread_id = %(thread_id)s
)
INSERT INTO checkpoint_writes (thread_id, checkpoint_ns, checkpoint_id, task_id, idx, channel, type,
                               blob, task_path)
SELECT %(copy_id)s, checkpoint_ns, checkpoint_id, task_id, idx, channel, type, blob, task_path
FROM checkpoint_writes WHERE thread_id = %(thread_id)s

-- name: thread_storage
WITH inline AS (
    SELECT v.key AS channel, octet_length(v.value::text) AS bytes
    FROM checkpoints c CROSS JOIN LATERAL jsonb_each(c.checkpoint -> 'channel_values') AS v
    WHERE c.thread_id = %(thread_id)s
), channel_value AS (
    SELECT channel, bytes FROM inline
    UNION ALL
    SELECT channel, coalesce(octet_length(blob), 0) FROM checkpoint_blobs
    WHERE thread_id = %(thread_id)s
), channel AS (
    SELECT channel, count(*) AS count, sum(bytes) AS bytes FROM channel_value GROUP BY channel
), total AS (
    SELECT coalesce(sum(count), 0)::bigint AS value_count,
           coalesce(sum(bytes), 0)::bigint AS value_bytes,
           coalesce(jsonb_object_agg(
               channel, jsonb_build_object('count', count, 'bytes', bytes)), '{}') AS by_channel
    FROM channel
), checkpoint AS (
    SELECT count(*) AS checkpoint_count,
           coalesce(sum(octet_length((checkpoint - 'channel_values')::text)
                        + octet_length(metadata::text)), 0)::bigint AS checkpoint_bytes
    FROM checkpoints WHERE thread_id = %(thread_id)s
), pending AS (
    SELECT count(*) AS write_count, coalesce(sum(octet_length(blob)), 0)::bigint AS write_bytes
    FROM checkpoint_writes WHERE thread_id = %(thread_id)s
)
SELECT * FROM checkpoint, total, pending

-- name: expired_threads
SELECT thread_id, ttl_strategy FROM thread t
WHERE expires_at < now() AND hidden_at IS NULL
  AND thread_id <> ALL (%(but)s::uuid[])
  AND NOT EXISTS (
      SELECT 1 FROM run r
      WHERE r.thread_id = t.thread_id AND r.status IN ('pending', 'running'))
ORDER BY expires_at
LIMIT %(limit)s

-- name: thread_is_expired
SELECT EXISTS (
    SELECT 1 FROM thread_view
    WHERE thread_id = %(thread_id)s AND expires_at < now() AND status <> 'busy')

-- name: thread_has_been_pruned
UPDATE thread SET expires_at = NULL WHERE thread_id = %(thread_id)s
