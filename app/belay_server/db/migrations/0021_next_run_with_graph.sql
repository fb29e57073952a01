-- Return the head of an idle thread's queue, as `belay_next_run` did, and its graph: the doorbell of
-- a run goes to the queue of the graphs that share hosts, or to that of the others. VOLATILE for the
-- same reason.
CREATE FUNCTION belay_next_due_run(
    p_thread_id uuid, OUT next_run_id uuid, OUT next_queue text, OUT next_graph_id text)
LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    SELECT p.run_id, p.queue, p.graph_id INTO next_run_id, next_queue, next_graph_id FROM run p
    WHERE p.thread_id = p_thread_id AND p.status = 'pending' AND p.scheduled_at <= now()
      AND NOT EXISTS (
          SELECT 1 FROM run b WHERE b.thread_id = p_thread_id AND b.status = 'running')
    ORDER BY (p.claim_no > 0) DESC, p.seq
    LIMIT 1;
END
$$;

-- Processes of earlier releases call this one. The rule is only in the function above.
CREATE OR REPLACE FUNCTION belay_next_run(p_thread_id uuid, OUT next_run_id uuid, OUT next_queue text)
LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    SELECT n.next_run_id, n.next_queue INTO next_run_id, next_queue
    FROM belay_next_due_run(p_thread_id) n;
END
$$;
