-- name: insert_cron
INSERT INTO cron (cron_id, assistant_id, thread_id, schedule, timezone, end_time, enabled,
                  on_run_completed, payload, metadata, next_run_date, maker)
VALUES (%(cron_id)s, %(assistant_id)s, %(thread_id)s, %(schedule)s, %(timezone)s, %(end_time)s,
        %(enabled)s, %(on_run_completed)s, %(payload)s, %(metadata)s, %(next_run_date)s, %(maker)s)
RETURNING *

-- name: lock_caller
SELECT pg_advisory_xact_lock(hashtextextended('belay crons of ' || %(caller)s, 0))

-- name: count_crons_of
SELECT count(*) FROM cron WHERE maker ->> 'caller' = %(caller)s

-- name: count_enabled_crons
SELECT count(*) FROM cron WHERE enabled AND maker ->> 'caller' = ANY (%(callers)s::text[])

-- name: disable_crons
WITH disabled AS (
    UPDATE cron SET enabled = false, updated_at = now()
    WHERE enabled AND maker ->> 'caller' = ANY (%(callers)s::text[])
    RETURNING cron_id
)
SELECT count(*) FROM disabled

-- name: get_cron
SELECT * FROM cron
WHERE cron_id = %(cron_id)s
  AND (%(allowed_crons)s::jsonb IS NULL OR belay_allows(%(allowed_crons)s, metadata))

-- name: lock_cron
SELECT * FROM cron
WHERE cron_id = %(cron_id)s
  AND (%(allowed_crons)s::jsonb IS NULL OR belay_allows(%(allowed_crons)s, metadata))
FOR UPDATE

-- name: update_cron
UPDATE cron SET
    schedule = %(schedule)s, timezone = %(timezone)s, end_time = %(end_time)s,
    enabled = %(enabled)s, on_run_completed = %(on_run_completed)s, payload = %(payload)s,
    metadata = %(metadata)s, next_run_date = %(next_run_date)s, updated_at = now(),
    failures = 0, last_error = NULL
WHERE cron_id = %(cron_id)s
RETURNING *

-- name: delete_cron
DELETE FROM cron
WHERE cron_id = %(cron_id)s
  AND (%(allowed_crons)s::jsonb IS NULL OR belay_allows(%(allowed_crons)s, metadata))
RETURNING cron_id

-- name: end_crons_of_assistant
-- Delete a user's crons of an assistant that is deleted, and disable those of other users.
WITH own AS (
    DELETE FROM cron
    WHERE assistant_id = %(assistant_id)s
      AND maker #>> '{user,identity}' IS NOT DISTINCT FROM %(user)s::text
)
UPDATE cron SET enabled = false, last_error = %(reason)s, updated_at = now()
WHERE assistant_id = %(assistant_id)s
  AND maker #>> '{user,identity}' IS DISTINCT FROM %(user)s::text

-- name: search_crons
SELECT * FROM cron
WHERE (%(assistant_id)s::uuid IS NULL OR assistant_id = %(assistant_id)s)
  AND (%(thread_id)s::uuid IS NULL OR thread_id = %(thread_id)s)
  AND (%(enabled)s::boolean IS NULL OR enabled = %(enabled)s)
  AND metadata @> %(metadata)s
  AND (%(within_crons)s::jsonpath IS NULL OR metadata @@ %(within_crons)s::jsonpath)
  AND (%(allowed_crons)s::jsonb IS NULL OR belay_allows(%(allowed_crons)s, metadata))
ORDER BY {sort_by} {sort_order}, cron_id
LIMIT %(limit)s OFFSET %(offset)s

-- name: count_crons
SELECT count(*) FROM cron
WHERE (%(assistant_id)s::uuid IS NULL OR assistant_id = %(assistant_id)s)
  AND (%(thread_id)s::uuid IS NULL OR thread_id = %(thread_id)s)
  AND (%(enabled)s::boolean IS NULL OR enabled = %(enabled)s)
  AND metadata @> %(metadata)s
  AND (%(within_crons)s::jsonpath IS NULL OR metadata @@ %(within_crons)s::jsonpath)
  AND (%(allowed_crons)s::jsonb IS NULL OR belay_allows(%(allowed_crons)s, metadata))

-- name: due_crons
-- The first cron of each caller, then the second of each, and so on. A caller with very many crons
-- delays only its own.
SELECT cron_id, place = 1 AS is_first FROM (
    SELECT cron_id, next_run_date,
        row_number() OVER (PARTITION BY maker ->> 'caller' ORDER BY next_run_date) AS place
    FROM cron WHERE enabled AND next_run_date <= now()
) due
ORDER BY place, next_run_date
LIMIT %(limit)s

-- name: lock_due_cron
-- No row is returned if another worker is firing the cron, or has fired it.
SELECT *, clock_timestamp() AS now FROM cron
WHERE cron_id = %(cron_id)s AND enabled AND next_run_date <= now()
FOR UPDATE SKIP LOCKED

-- name: set_next_run_date
UPDATE cron SET next_run_date = %(next_run_date)s, failures = 0, last_error = NULL
WHERE cron_id = %(cron_id)s

-- name: put_off_cron
UPDATE cron SET
    next_run_date = %(again_at)s, failures = %(failures)s, last_error = %(last_error)s,
    enabled = %(enabled)s
WHERE cron_id = %(cron_id)s

-- name: set_last_error
UPDATE cron SET last_error = %(last_error)s WHERE cron_id = %(cron_id)s
