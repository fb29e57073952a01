-- name: take_calls
-- Each is made by whoever takes it; one whose taker died comes back when the lease is over.
UPDATE webhook_call SET
    attempts = attempts + 1, next_attempt_at = now() + make_interval(secs => %(lease_seconds)s)
WHERE call_id IN (
    SELECT call_id FROM webhook_call WHERE next_attempt_at <= now()
    ORDER BY next_attempt_at
    LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED)
RETURNING call_id, url, run, attempts

-- name: delete_call
DELETE FROM webhook_call WHERE call_id = %(call_id)s

-- name: retry_call
UPDATE webhook_call SET next_attempt_at = now() + make_interval(secs => %(seconds)s)
WHERE call_id = %(call_id)s
