-- Return the head of an idle thread's queue: an earlier attempt first, then in the order of creation.
-- Return nulls if the thread has a running run or no due one. VOLATILE gives the function a snapshot
-- of its own: a statement that had to wait for the thread's row sees what was committed meanwhile,
-- and its own changes.
CREATE FUNCTION belay_next_run(p_thread_id uuid, OUT next_run_id uuid, OUT next_queue text)
LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    SELECT p.run_id, p.queue INTO next_run_id, next_queue FROM run p
    WHERE p.thread_id = p_thread_id AND p.status = 'pending' AND p.scheduled_at <= now()
      AND NOT EXISTS (
          SELECT 1 FROM run b WHERE b.thread_id = p_thread_id AND b.status = 'running')
    ORDER BY (p.claim_no > 0) DESC, p.seq
    LIMIT 1;
END
$$;

-- Return whether a thread has checkpoints. VOLATILE for the same reason.
CREATE FUNCTION belay_has_checkpoints(p_thread_id uuid) RETURNS boolean
LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    RETURN EXISTS (SELECT 1 FROM checkpoints c WHERE c.thread_id = p_thread_id::text);
END
$$;
