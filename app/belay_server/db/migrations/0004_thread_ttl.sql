-- The time to live of unused threads. Each use of a thread sets `updated_at`, and with it the time at
-- which it expires.
ALTER TABLE thread
    ADD COLUMN ttl_minutes  double precision CHECK (ttl_minutes > 0),
    ADD COLUMN ttl_strategy text CHECK (ttl_strategy IN ('delete', 'keep_latest')),
    ADD COLUMN expires_at   timestamptz,
    ADD CONSTRAINT thread_ttl_is_whole CHECK ((ttl_minutes IS NULL) = (ttl_strategy IS NULL));
CREATE INDEX thread_expires ON thread (expires_at) WHERE expires_at IS NOT NULL;

CREATE FUNCTION belay_set_thread_expiry() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    NEW.expires_at = NEW.updated_at + NEW.ttl_minutes * interval '1 minute';
    RETURN NEW;
END
$$;
CREATE TRIGGER thread_expiry_of_new BEFORE INSERT ON thread
    FOR EACH ROW WHEN (NEW.ttl_minutes IS NOT NULL) EXECUTE FUNCTION belay_set_thread_expiry();
CREATE TRIGGER thread_expiry_of_used BEFORE UPDATE OF updated_at, ttl_minutes ON thread
    FOR EACH ROW WHEN (NEW.ttl_minutes IS NOT NULL) EXECUTE FUNCTION belay_set_thread_expiry();

CREATE OR REPLACE VIEW thread_view AS
SELECT
    t.thread_id, t.created_at, t.updated_at, t.state_updated_at, t.metadata, t.config,
    CASE WHEN EXISTS (
        SELECT 1 FROM run r WHERE r.thread_id = t.thread_id AND r.status IN ('pending', 'running')
    ) THEN 'busy' ELSE t.resting_status END AS status,
    t."values", t.values_known, t.interrupts, t.error,
    t.ttl_minutes, t.ttl_strategy, t.expires_at
FROM thread t
WHERE t.hidden_at IS NULL;
