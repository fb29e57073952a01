-- Count pending and running runs, for the metrics.

-- name: queue_states
-- One row per queue, and one without a queue for all of them. Only the rows of active runs are
-- read (the index `run_active`), never those that have ended. A run is blocked while its thread has
-- a running run or an earlier pending one that is due.
WITH active AS (
    SELECT
        queue, status,
        extract(epoch FROM now() - scheduled_at)::float8 AS waited,
        status = 'pending' AND scheduled_at <= now() AS due,
        bool_or(status = 'running') OVER (PARTITION BY thread_id)
            OR row_number() OVER (
                PARTITION BY thread_id, status, scheduled_at <= now()
                ORDER BY claim_no > 0 DESC, seq) > 1 AS blocked
    FROM run
    WHERE status IN ('pending', 'running')
)
SELECT
    queue,
    count(*) FILTER (WHERE status = 'running') AS running,
    count(*) FILTER (WHERE status = 'pending') AS pending,
    count(*) FILTER (WHERE due) AS due,
    count(*) FILTER (WHERE due AND NOT blocked) AS claimable,
    coalesce(max(waited) FILTER (WHERE due), 0) AS oldest_seconds,
    coalesce(max(waited) FILTER (WHERE due AND NOT blocked), 0) AS oldest_claimable_seconds,
    coalesce(percentile_cont(0.5) WITHIN GROUP (ORDER BY waited) FILTER (WHERE due), 0)
        AS median_seconds
FROM active
GROUP BY GROUPING SETS ((queue), ())
