-- Schedules that create runs. `next_run_date` is null if there is no next run.
CREATE TABLE cron (
    cron_id          uuid PRIMARY KEY,
    assistant_id     uuid NOT NULL REFERENCES assistant ON DELETE CASCADE,
    thread_id        uuid REFERENCES thread ON DELETE CASCADE,
    schedule         text NOT NULL,
    timezone         text,
    end_time         timestamptz,
    enabled          boolean NOT NULL DEFAULT true,
    on_run_completed text CHECK (on_run_completed IN ('delete', 'keep')),
    payload          jsonb NOT NULL,
    metadata         jsonb NOT NULL DEFAULT '{}',
    next_run_date    timestamptz,
    created_at       timestamptz NOT NULL DEFAULT now(),
    updated_at       timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT cron_completes_without_a_thread
        CHECK ((thread_id IS NULL) = (on_run_completed IS NOT NULL))
);
CREATE INDEX cron_due ON cron (next_run_date) WHERE enabled AND next_run_date IS NOT NULL;
CREATE INDEX cron_assistant ON cron (assistant_id);
CREATE INDEX cron_thread ON cron (thread_id);
CREATE INDEX cron_metadata ON cron USING gin (metadata jsonb_path_ops);
