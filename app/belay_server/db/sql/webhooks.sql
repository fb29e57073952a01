-- name: take_calls
-- The worker that takes a call makes it. If that worker dies, the call is due again when its lease
-- expires. A skip scan of the index reads the hosts, so one host's backlog costs nothing here.
WITH RECURSIVE hosts AS (
    (SELECT host FROM webhook_call ORDER BY host LIMIT 1)
    UNION ALL
    SELECT (SELECT w.host FROM webhook_call w WHERE w.host > h.host ORDER BY w.host LIMIT 1)
    FROM hosts h WHERE h.host IS NOT NULL
), under_way AS MATERIALIZED (
    SELECT host, caller FROM webhook_call WHERE taken_until > now()
), heads AS (
    SELECT c.call_id, c.caller, c.next_attempt_at FROM hosts h CROSS JOIN LATERAL (
        SELECT w.call_id, w.caller, w.next_attempt_at FROM webhook_call w
        WHERE w.host = h.host AND w.next_attempt_at <= now()
        ORDER BY w.next_attempt_at
        LIMIT greatest(0, %(each)s - (SELECT count(*) FROM under_way u WHERE u.host = h.host))
    ) c
), ranked AS (
    SELECT call_id, caller, next_attempt_at,
        row_number() OVER (PARTITION BY caller ORDER BY next_attempt_at)
        + (SELECT count(*) FROM under_way u WHERE u.caller = heads.caller) AS place
    FROM heads
)
UPDATE webhook_call SET
    attempts = attempts + 1,
    next_attempt_at = now() + make_interval(secs => %(lease_seconds)s),
    taken_until = now() + make_interval(secs => %(lease_seconds)s)
WHERE call_id IN (
    SELECT w.call_id FROM webhook_call w JOIN ranked r USING (call_id)
    WHERE (r.caller = '' OR r.place <= %(each)s) AND w.next_attempt_at <= now()
    ORDER BY r.place, r.next_attempt_at
    LIMIT %(limit)s
    FOR UPDATE OF w SKIP LOCKED)
RETURNING call_id, url, run, attempts

-- name: delete_call
DELETE FROM webhook_call WHERE call_id = %(call_id)s

-- name: retry_call
UPDATE webhook_call SET
    next_attempt_at = now() + make_interval(secs => %(seconds)s), taken_until = NULL
WHERE call_id = %(call_id)s
