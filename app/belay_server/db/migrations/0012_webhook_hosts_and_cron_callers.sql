-- For the count of a caller's crons, when it creates another one.
CREATE INDEX cron_caller ON cron ((maker ->> 'caller'));

-- Limit the concurrent webhook calls of each host and of each caller.
ALTER TABLE webhook_call
    ADD COLUMN host   text NOT NULL DEFAULT '',
    ADD COLUMN caller text NOT NULL DEFAULT '',
    -- When the lease of the worker that makes the call expires; null while no worker makes it.
    ADD COLUMN taken_until timestamptz;

CREATE INDEX webhook_call_host ON webhook_call (host, next_attempt_at);
CREATE INDEX webhook_call_taken ON webhook_call (taken_until) WHERE taken_until IS NOT NULL;

CREATE FUNCTION belay_host_of(url text) RETURNS text
LANGUAGE sql IMMUTABLE AS $$
    SELECT lower(coalesce(substring(url FROM '^[a-zA-Z]+://([^/?#:[]+|\[[^]]*\])'), ''))
$$;

UPDATE webhook_call SET host = belay_host_of(url);

CREATE OR REPLACE FUNCTION belay_queue_webhook() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO webhook_call (url, host, caller, run)
    VALUES (NEW.kwargs ->> 'webhook', belay_host_of(NEW.kwargs ->> 'webhook'),
            coalesce(NEW.caller, ''), belay_webhook_payload(NEW));
    RETURN NULL;
END
$$;

CREATE OR REPLACE FUNCTION belay_queue_webhook_of_rollback() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO webhook_call (url, host, caller, run)
    VALUES (OLD.kwargs ->> 'webhook', belay_host_of(OLD.kwargs ->> 'webhook'),
        coalesce(OLD.caller, ''), belay_webhook_payload(OLD)
        || jsonb_build_object('status', 'rollback', 'ended_at', now(), 'error', OLD.cancel_reason));
    RETURN NULL;
END
$$;
