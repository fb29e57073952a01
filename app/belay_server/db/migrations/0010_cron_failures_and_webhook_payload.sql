-- A cron whose run cannot be stored is postponed, and disabled after several failures.
ALTER TABLE cron
    ADD COLUMN failures   integer NOT NULL DEFAULT 0,
    -- Why the last run was not created; null if it was created.
    ADD COLUMN last_error text;

-- Build a webhook's payload from named columns. `to_jsonb` of the whole row had the context three
-- times. It could exceed the maximum size of JSONB, and then the run's end could not be written.
CREATE FUNCTION belay_webhook_payload(ended run) RETURNS jsonb
LANGUAGE sql STABLE AS $$
    SELECT jsonb_build_object(
        'run_id', ended.run_id, 'thread_id', ended.thread_id, 'assistant_id', ended.assistant_id,
        'created_at', ended.created_at, 'updated_at', ended.updated_at, 'status', ended.status,
        'metadata', ended.metadata, 'kwargs', ended.kwargs,
        'multitask_strategy', ended.multitask_strategy, 'started_at', ended.started_at,
        'ended_at', ended.ended_at, 'error', ended.error, 'outcome', ended.outcome)
$$;

CREATE OR REPLACE FUNCTION belay_queue_webhook() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO webhook_call (url, run)
    VALUES (NEW.kwargs ->> 'webhook', belay_webhook_payload(NEW));
    RETURN NULL;
END
$$;

CREATE OR REPLACE FUNCTION belay_queue_webhook_of_rollback() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO webhook_call (url, run)
    VALUES (OLD.kwargs ->> 'webhook', belay_webhook_payload(OLD)
        || jsonb_build_object('status', 'rollback', 'ended_at', now(), 'error', OLD.cancel_reason));
    RETURN NULL;
END
$$;
