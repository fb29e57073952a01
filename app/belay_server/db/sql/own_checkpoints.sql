-- name: find_garbage
-- A hidden thread is being deleted.
SELECT
    g.thread_id, g.run_id,
    NOT EXISTS (
        SELECT 1 FROM thread t WHERE t.thread_id = g.thread_id::uuid AND t.hidden_at IS NULL
    ) AS is_thread_gone,
    NOT EXISTS (
        SELECT 1 FROM checkpoints c
        WHERE c.thread_id = g.thread_id AND c.metadata ->> 'run_id' = g.run_id
    ) AS is_run_gone
FROM own_checkpoint_garbage g
WHERE g.thread_id IN (SELECT thread_id FROM own_checkpoint_garbage LIMIT 50)

-- name: forget_garbage
DELETE FROM own_checkpoint_garbage g
USING unnest(%(thread_ids)s::text[], %(run_ids)s::text[]) AS done (thread_id, run_id)
WHERE g.thread_id = done.thread_id AND g.run_id = done.run_id
