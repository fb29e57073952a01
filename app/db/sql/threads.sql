-- name: insert_thread
INSERT INTO thread (thread_id, metadata)
VALUES (%(thread_id)s, %(metadata)s)
ON CONFLICT (thread_id) DO NOTHING
RETURNING thread_id

-- name: replace_hidden_thread
-- The id of an ended stateless thread that has not been swept yet may be used again at once.
DELETE FROM thread WHERE thread_id = %(thread_id)s AND hidden_at IS NOT NULL

-- name: get_thread
SELECT * FROM thread_view WHERE thread_id = %(thread_id)s

-- name: lock_thread
SELECT thread_id FROM thread
WHERE thread_id = %(thread_id)s AND (hidden_at IS NULL OR %(ended_stateless)s)
FOR NO KEY UPDATE

-- name: patch_thread
UPDATE thread SET metadata = metadata || %(metadata)s, updated_at = now()
WHERE thread_id = %(thread_id)s AND hidden_at IS NULL
RETURNING thread_id

-- name: delete_thread
DELETE FROM thread WHERE thread_id = %(thread_id)s RETURNING thread_id

-- name: delete_thread_checkpoints
WITH a AS (DELETE FROM checkpoints WHERE thread_id = ANY(%(thread_ids)s)),
     b AS (DELETE FROM checkpoint_blobs WHERE thread_id = ANY(%(thread_ids)s))
DELETE FROM checkpoint_writes WHERE thread_id = ANY(%(thread_ids)s)

-- name: bury_chosen_runs
-- A retried create with an id that its client chose must find that the run has been.
INSERT INTO run_tombstone (run_id, thread_id)
SELECT run_id, thread_id FROM run WHERE thread_id = %(thread_id)s AND id_chosen
ON CONFLICT DO NOTHING

-- name: hidden_threads
SELECT thread_id FROM thread
WHERE hidden_at < now() - make_interval(secs => %(seconds)s)
ORDER BY hidden_at
LIMIT %(limit)s

-- name: search_threads
SELECT * FROM thread_view
WHERE (%(ids)s::uuid[] IS NULL OR thread_id = ANY(%(ids)s))
  AND metadata @> %(metadata)s
  AND (%(values)s::jsonb IS NULL OR "values" @> %(values)s)
  AND (%(status)s::text IS NULL OR status = %(status)s)
ORDER BY {sort_by} {sort_order}, thread_id
LIMIT %(limit)s OFFSET %(offset)s

-- name: threads_with_unknown_values
SELECT * FROM thread_view
WHERE NOT values_known AND status <> 'busy'
  AND (%(ids)s::uuid[] IS NULL OR thread_id = ANY(%(ids)s))
  AND metadata @> %(metadata)s

-- name: count_threads
SELECT count(*) FROM thread_view
WHERE (%(ids)s::uuid[] IS NULL OR thread_id = ANY(%(ids)s))
  AND metadata @> %(metadata)s
  AND (%(values)s::jsonb IS NULL OR "values" @> %(values)s)
  AND (%(status)s::text IS NULL OR status = %(status)s)

-- name: rest_thread
-- The thread as its newest checkpoint has it, after the API wrote one or a killed run left one.
UPDATE thread SET
    "values" = %(values)s, values_known = true, interrupts = %(interrupts)s,
    resting_status = CASE
        WHEN %(keep_error)s AND resting_status = 'error' THEN 'error' ELSE %(resting_status)s END,
    error = CASE WHEN %(keep_error)s THEN error END,
    state_updated_at = now(), updated_at = now(),
    metadata = metadata || %(metadata)s
WHERE thread_id = %(thread_id)s
