-- Webhook calls to be made. A call is inserted by the transaction that writes the run's end, and is
-- deleted when the receiver has answered.
CREATE TABLE webhook_call (
    call_id         uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    url             text NOT NULL,
    -- The run's row after its end. The row itself may be deleted before the call is made.
    run             jsonb NOT NULL,
    attempts        integer NOT NULL DEFAULT 0,
    next_attempt_at timestamptz NOT NULL DEFAULT now(),
    created_at      timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX webhook_call_due ON webhook_call (next_attempt_at);

ALTER TABLE run ADD COLUMN started_at timestamptz;

CREATE FUNCTION belay_queue_webhook() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO webhook_call (url, run) VALUES (NEW.kwargs ->> 'webhook', to_jsonb(NEW));
    RETURN NULL;
END
$$;
CREATE TRIGGER run_ended AFTER UPDATE OF status ON run
    FOR EACH ROW
    WHEN (OLD.status IN ('pending', 'running') AND NEW.status NOT IN ('pending', 'running')
          AND NEW.kwargs ->> 'webhook' IS NOT NULL)
    EXECUTE FUNCTION belay_queue_webhook();

-- A run that is deleted while it is active was rolled back.
CREATE FUNCTION belay_queue_webhook_of_rollback() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO webhook_call (url, run) VALUES (OLD.kwargs ->> 'webhook', to_jsonb(OLD)
        || jsonb_build_object('status', 'rollback', 'ended_at', now(), 'error', OLD.cancel_reason));
    RETURN NULL;
END
$$;
CREATE TRIGGER run_rolled_back AFTER DELETE ON run
    FOR EACH ROW
    WHEN (OLD.status IN ('pending', 'running') AND OLD.kwargs ->> 'webhook' IS NOT NULL)
    EXECUTE FUNCTION belay_queue_webhook_of_rollback();
