-- Deleted checkpoints whose values are in the project's own checkpointer (checkpointer.path), until
-- the values are deleted there, too. One row for each run of a thread; '' stands for no run.
CREATE TABLE own_checkpoint_garbage (
    thread_id text NOT NULL,
    run_id    text NOT NULL,
    PRIMARY KEY (thread_id, run_id)
);

-- Called by the trigger that `belay migrate` makes on LangGraph's table.
CREATE FUNCTION belay_note_own_checkpoint() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO own_checkpoint_garbage (thread_id, run_id)
    VALUES (OLD.thread_id, coalesce(OLD.metadata ->> 'run_id', ''))
    ON CONFLICT DO NOTHING;
    RETURN NULL;
END
$$;
