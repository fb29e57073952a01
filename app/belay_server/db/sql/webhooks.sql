-- name: take_calls
-- The worker that takes a call makes it. If that worker dies, the call is due again when its lease
-- expires. A skip scan of the index reads the pairs of host and caller, so the backlog of one costs
-- nothing here.
WITH RECURSIVE pairs AS (
    (SELECT host, caller FROM webhook_call ORDER BY host, caller LIMIT 1)
    UNION ALL
    SELECT n.host, n.caller FROM pairs p CROSS JOIN LATERAL (
        SELECT w.host, w.caller FROM webhook_call w
        WHERE (w.host, w.caller) > (p.host, p.caller)
        ORDER BY w.host, w.caller LIMIT 1
    ) n
), under_way AS MATERIALIZED (
    SELECT host, caller FROM webhook_call WHERE taken_until > now()
), heads AS (
    SELECT c.*, c.waiting + p.making AS of_pair
    FROM (
        SELECT host, caller,
            (SELECT count(*) FROM under_way u WHERE (u.host, u.caller) = (pairs.host, pairs.caller))
            AS making
        FROM pairs
    ) p CROSS JOIN LATERAL (
        SELECT w.call_id, w.host, w.caller, w.next_attempt_at,
            row_number() OVER (ORDER BY w.next_attempt_at) AS waiting
        FROM webhook_call w
        WHERE w.host = p.host AND w.caller = p.caller AND w.next_attempt_at <= now()
        ORDER BY w.next_attempt_at
        LIMIT greatest(0, %(each)s - p.making)
    ) c
), of_callers AS (
    SELECT *,
        row_number() OVER (PARTITION BY caller ORDER BY next_attempt_at)
        + (SELECT count(*) FROM under_way u WHERE u.caller = heads.caller) AS of_caller
    FROM heads
), of_hosts AS (
    -- The first call of each caller precedes the second call of every caller.
    SELECT *,
        row_number() OVER (PARTITION BY host ORDER BY of_pair, next_attempt_at)
        + (SELECT count(*) FROM under_way u WHERE u.host = of_callers.host) AS of_host
    FROM of_callers
    WHERE caller = '' OR of_caller <= %(each)s
)
UPDATE webhook_call SET
    attempts = attempts + 1,
    next_attempt_at = now() + make_interval(secs => %(lease_seconds)s),
    taken_until = now() + make_interval(secs => %(lease_seconds)s)
WHERE call_id IN (
    SELECT w.call_id FROM webhook_call w JOIN of_hosts o USING (call_id)
    WHERE o.of_host <= %(host)s AND w.next_attempt_at <= now()
    ORDER BY o.of_caller, o.next_attempt_at
    LIMIT %(limit)s
    FOR UPDATE OF w SKIP LOCKED)
RETURNING call_id, url, run, attempts

-- name: delete_call
DELETE FROM webhook_call WHERE call_id = %(call_id)s

-- name: retry_call
UPDATE webhook_call SET
    next_attempt_at = now() + make_interval(secs => %(seconds)s), taken_until = NULL
WHERE call_id = %(call_id)s
