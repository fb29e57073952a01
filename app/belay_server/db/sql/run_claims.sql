-- Claim, renew, end and put back runs. Every status change is one guarded statement that returns
-- the new row or nothing.

-- name: claim_run
-- Compare and set from pending to running: only for a graph that the worker has, only for the head
-- of the thread's queue, and only while the thread has no running run. Saves the thread's fields
-- that it changes in `thread_before`. The head is the run that `belay_next_due_run` returns (an
-- earlier attempt first, then in the order of creation); here it has to be locked as well.
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
        token_hash = %(token_hash)s,
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
      AND r.graph_id = ANY (%(graph_ids)s::text[])
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

-- name: claim_runs
-- As `claim_run`, for several runs at once. It waits for no lock: threads that are locked are left
-- out, and a locked head of a queue is an error. So it cannot be part of a deadlock.
WITH given AS (
    SELECT r.run_id, r.thread_id, g.token_hash
    FROM unnest(%(run_ids)s::uuid[], %(token_hashes)s::text[]) AS g (run_id, token_hash)
    JOIN run r USING (run_id)
    WHERE r.status = 'pending'
), locked AS (
    SELECT t.thread_id, t.config, t.metadata FROM thread t
    WHERE t.thread_id IN (SELECT thread_id FROM given)
    FOR NO KEY UPDATE SKIP LOCKED
), head AS (
    SELECT h.run_id, locked.thread_id, locked.config, locked.metadata
    FROM locked CROSS JOIN LATERAL (
        SELECT p.run_id FROM run p
        WHERE p.thread_id = locked.thread_id AND p.status = 'pending' AND p.scheduled_at <= now()
        ORDER BY (p.claim_no > 0) DESC, p.seq
        LIMIT 1
        FOR UPDATE NOWAIT
    ) h
    WHERE NOT EXISTS (
        SELECT 1 FROM run b WHERE b.thread_id = locked.thread_id AND b.status = 'running')
), claimed AS (
    UPDATE run r SET
        status = 'running',
        claim_no = r.claim_no + 1,
        attempts = r.attempts + 1,
        lease_owner = %(owner)s,
        token_hash = given.token_hash,
        lease_expires_at = now() + make_interval(secs => %(lease_seconds)s),
        next_ring_at = NULL,
        started_at = coalesce(r.started_at, now()),
        updated_at = now(),
        thread_before = coalesce(r.thread_before, jsonb_build_object(
            'config', head.config,
            'graph_id', head.metadata -> 'graph_id',
            'assistant_id', head.metadata -> 'assistant_id'))
    FROM head JOIN given USING (run_id)
    WHERE r.run_id = head.run_id AND r.status = 'pending'
      AND r.graph_id = ANY (%(graph_ids)s::text[])
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
       timeout_seconds, token_hash,
       belay_has_checkpoints(thread_id) AS has_checkpoints,
       extract(epoch FROM updated_at - scheduled_at)::float8 AS waited_seconds
FROM claimed

-- name: put_off_unknown_graph
-- For a worker that does not have the run's graph: ring again later, after a quarter of the time that
-- the run has been due, at most ten minutes. `rings = 0` because the doorbell is not lost.
UPDATE run SET
    rings = 0,
    next_ring_at = now() + make_interval(secs =>
        least(600, greatest(5, extract(epoch FROM now() - scheduled_at) / 4)))
WHERE run_id = %(run_id)s AND status = 'pending' AND graph_id <> ALL (%(graph_ids)s::text[])
RETURNING graph_id

-- name: ring_runs_of_graphs
-- For a worker that has these graphs: workers without them have put the runs off for long.
UPDATE run SET next_ring_at = now()
WHERE status = 'pending' AND scheduled_at <= now() AND rings = 0 AND next_ring_at > now()
  AND next_ring_at > scheduled_at + make_interval(secs => 2 * %(rering_seconds)s)
  AND graph_id = ANY (%(graph_ids)s::text[])

-- name: held_run
-- By the token of the claim: all runs of a host have one lease owner.
SELECT run_id, thread_id, assistant_id, graph_id, kwargs, metadata, temporary, claim_no, attempts,
       timeout_seconds, belay_has_checkpoints(thread_id) AS has_checkpoints,
       extract(epoch FROM updated_at - scheduled_at)::float8 AS waited_seconds
FROM run
WHERE run_id = %(run_id)s AND status = 'running' AND lease_owner = %(owner)s
  AND token_hash IS NOT DISTINCT FROM %(token_hash)s

-- name: renew_leases
-- One round trip for all runs of a worker, which also returns which of them are to be cancelled.
-- A row that is locked (while a checkpoint is written) is renewed next time. A lease that is not
-- returned is lost. An expired lease that no other worker has taken may be renewed.
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
-- The end of a running run: the one that its graph reached (`cancel_action` NULL), or that of an
-- accepted `interrupt`. No row is returned if the lease is lost or another cancel was accepted first:
-- that cancel takes precedence. A function reads the thread's next run, because this statement's own
-- snapshot is older than its wait for the thread's row and would miss a run created meanwhile.
WITH locked AS (
    SELECT thread_id FROM thread WHERE thread_id = %(thread_id)s FOR NO KEY UPDATE
), ended AS (
    UPDATE run r SET
        status = CASE WHEN r.cancel_action IS NULL THEN %(status)s ELSE 'interrupted' END,
        error = CASE WHEN r.cancel_action IS NULL THEN %(error)s ELSE r.cancel_reason END,
        outcome = %(outcome)s,
        lease_owner = NULL, lease_expires_at = NULL, ended_at = now(), updated_at = now()
    FROM locked
    WHERE r.run_id = %(run_id)s AND r.claim_no = %(claim_no)s AND r.status = 'running'
      AND r.cancel_action IS NOT DISTINCT FROM %(cancel_action)s
    RETURNING r.run_id, r.thread_id, r.temporary, r.error
), rested AS (
    UPDATE thread t SET
        "values" = CASE WHEN %(values_known)s THEN %(values)s ELSE t."values" END,
        values_known = %(values_known)s, interrupts = %(interrupts)s, error = e.error,
        resting_status = %(resting_status)s, state_updated_at = now(), updated_at = now(),
        hidden_at = CASE WHEN e.temporary THEN now() END
    FROM ended e
    WHERE t.thread_id = e.thread_id
)
SELECT e.run_id, n.next_run_id, n.next_queue, n.next_graph_id
FROM ended e CROSS JOIN LATERAL belay_next_due_run(e.thread_id) n

-- name: finish_runs
-- As `finish_run`, for several runs at once, each with the action of the cancel that has ended it. It
-- waits for no lock: runs whose row or whose thread is locked are left out. So it cannot be part of a
-- deadlock.
WITH given AS (
    SELECT * FROM unnest(
        %(run_id)s::uuid[], %(claim_no)s::int[], %(thread_id)s::uuid[], %(status)s::text[],
        %(error)s::jsonb[], %(outcome)s::jsonb[], %(values)s::jsonb[], %(values_known)s::boolean[],
        %(interrupts)s::jsonb[], %(resting_status)s::text[], %(cancel_action)s::text[])
        AS g (run_id, claim_no, thread_id, status, error, outcome, "values", values_known,
              interrupts, resting_status, cancel_action)
), locked AS (
    SELECT t.thread_id FROM thread t JOIN given USING (thread_id)
    FOR NO KEY UPDATE OF t SKIP LOCKED
), held AS (
    SELECT r.run_id FROM locked JOIN given USING (thread_id) JOIN run r USING (run_id, claim_no)
    WHERE r.status = 'running' AND r.cancel_action IS NOT DISTINCT FROM given.cancel_action
    FOR UPDATE OF r SKIP LOCKED
), ended AS (
    UPDATE run r SET
        status = CASE WHEN r.cancel_action IS NULL THEN given.status ELSE 'interrupted' END,
        error = CASE WHEN r.cancel_action IS NULL THEN given.error ELSE r.cancel_reason END,
        outcome = given.outcome,
        lease_owner = NULL, lease_expires_at = NULL, ended_at = now(), updated_at = now()
    FROM held JOIN given USING (run_id)
    WHERE r.run_id = held.run_id
    RETURNING r.run_id, r.thread_id, r.temporary, r.error,
        extract(epoch FROM clock_timestamp() - r.cancel_requested_at)::float8 AS cancel_seconds
), rested AS (
    UPDATE thread t SET
        "values" = CASE WHEN g.values_known THEN g."values" ELSE t."values" END,
        values_known = g.values_known, interrupts = g.interrupts, error = e.error,
        resting_status = g.resting_status, state_updated_at = now(), updated_at = now(),
        hidden_at = CASE WHEN e.temporary THEN now() END
    FROM ended e JOIN given g USING (run_id)
    WHERE t.thread_id = e.thread_id
)
SELECT e.run_id, e.cancel_seconds, n.next_run_id, n.next_queue, n.next_graph_id
FROM ended e CROSS JOIN LATERAL belay_next_due_run(e.thread_id) n

-- name: put_run_back
-- Back to pending. A drain does not count the attempt (`uncharge`); a lost worker's attempt counts.
UPDATE run SET
    status = 'pending', lease_owner = NULL, lease_expires_at = NULL, updated_at = now(),
    attempts = attempts - %(uncharge)s,
    next_ring_at = now() + make_interval(secs => %(rering_seconds)s)
WHERE run_id = %(run_id)s AND claim_no = %(claim_no)s AND status = 'running'
  AND cancel_action IS NULL
RETURNING run_id, queue, graph_id

-- name: lock_claimed_run
-- For an ending that needs several statements. The caller has locked the thread's row. `pending` is
-- a run that was put back under the same claim.
SELECT *,
       extract(epoch FROM clock_timestamp() - cancel_requested_at)::float8 AS cancel_seconds
FROM run
WHERE run_id = %(run_id)s AND claim_no = %(claim_no)s AND status IN ('pending', 'running')
FOR UPDATE

-- name: expired_leases
-- Only for the current holder of the sweeper's lease, and only after `judges_after`. The same
-- statement checks this, so that a hang of the server in between does not make healthy runs lost.
SELECT run_id, claim_no FROM run
WHERE status = 'running' AND lease_expires_at < now()
  AND EXISTS (
      SELECT 1 FROM scheduler_lease s
      WHERE s.name = 'sweeper' AND s.owner = %(sweeper)s
        AND s.expires_at >= now() AND s.judges_after <= now())
  AND run_id <> ALL (%(but)s::uuid[])
ORDER BY lease_expires_at
LIMIT %(limit)s

-- name: lease_is_expired
SELECT EXISTS (
    SELECT 1 FROM run
    WHERE run_id = %(run_id)s AND claim_no = %(claim_no)s AND status = 'running'
      AND lease_expires_at < now())

-- name: ring_due_runs
-- Pending runs whose doorbell was sent a while ago, or that have just become due. All of them are
-- postponed with backoff. Only those at the head of an idle thread's queue are returned. Runs of
-- graphs that this worker does not have are few at a time: perhaps no worker has their graphs.
WITH known AS (
    SELECT run_id FROM run
    WHERE status = 'pending' AND next_ring_at <= now() AND graph_id = ANY (%(graph_ids)s::text[])
    ORDER BY next_ring_at
    LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED
), unknown AS (
    SELECT run_id FROM run
    WHERE status = 'pending' AND next_ring_at <= now() AND graph_id <> ALL (%(graph_ids)s::text[])
    ORDER BY next_ring_at
    LIMIT %(unknown_limit)s
    FOR UPDATE SKIP LOCKED
), due AS (
    SELECT r.run_id, r.thread_id, r.queue, r.graph_id, r.seq, r.claim_no
    FROM run r JOIN (SELECT run_id FROM known UNION ALL SELECT run_id FROM unknown) d USING (run_id)
), postponed AS (
    UPDATE run r SET
        rings = r.rings + 1,
        next_ring_at = now() + make_interval(secs =>
            least(60, %(rering_seconds)s * power(2, least(r.rings, 4))))
    FROM due WHERE r.run_id = due.run_id
)
SELECT d.run_id, d.queue, d.graph_id
FROM due d JOIN LATERAL belay_next_due_run(d.thread_id) n ON n.next_run_id = d.run_id

-- name: uncount_rings
UPDATE run SET rings = greatest(rings - 1, 0), next_ring_at = now()
WHERE run_id = ANY (%(run_ids)s::uuid[]) AND status = 'pending'

-- name: queues_put_off
SELECT DISTINCT queue, graph_id FROM run
WHERE status = 'pending' AND rings > 0 AND next_ring_at > now()

-- name: ring_again_at_once
-- For graphs in whose queues no message waits: their doorbells are lost, or were received just now.
-- The backoff starts again.
UPDATE run SET rings = 0, next_ring_at = now()
WHERE run_id IN (
    SELECT run_id FROM run
    WHERE status = 'pending' AND rings > 0 AND next_ring_at > now()
      AND (queue, graph_id) IN (SELECT * FROM unnest(%(queues)s::text[], %(graph_ids)s::text[]))
    ORDER BY next_ring_at
    LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED)

-- name: take_sweeper_lease
-- Every worker tries this repeatedly. So a lease that was expired for longer than the tolerance
-- means that no worker could reach this database. The workers then have time to renew their runs'
-- leases, until `judges_after`. A database without a row here has no runs to recover yet.
INSERT INTO scheduler_lease AS held (name, owner, expires_at, judges_after)
VALUES ('sweeper', %(owner)s, now() + make_interval(secs => %(seconds)s), now())
ON CONFLICT (name) DO UPDATE SET
    owner = EXCLUDED.owner,
    expires_at = EXCLUDED.expires_at,
    judges_after = CASE
        WHEN held.expires_at < now() - make_interval(secs => %(tolerance_seconds)s)
        THEN now() + make_interval(secs => %(grace_seconds)s)
        ELSE held.judges_after END
WHERE held.owner = EXCLUDED.owner OR held.expires_at < now()
RETURNING owner

-- name: drop_sweeper_lease
-- Another worker may take it at once. The row still has the time until which it was held.
UPDATE scheduler_lease SET expires_at = now() WHERE name = 'sweeper' AND owner = %(owner)s

-- name: next_runs_of_threads
SELECT n.next_run_id AS run_id, n.next_queue AS queue, n.next_graph_id AS graph_id
FROM unnest(%(thread_ids)s::uuid[]) AS u (thread_id)
CROSS JOIN LATERAL belay_next_due_run(u.thread_id) n
WHERE n.next_run_id IS NOT NULL
