-- After an outage every lease looks expired. Until then the sweeper judges nobody.
ALTER TABLE scheduler_lease ADD COLUMN judges_after timestamptz NOT NULL DEFAULT now();

-- An id that the client chose may come again, also after the run's record was swept away: such a run
-- leaves a row in run_tombstone, as a rolled-back one does.
ALTER TABLE run ADD COLUMN id_chosen boolean NOT NULL DEFAULT false;

-- In the order of a bulk cancel, which pages through what is active; it also tells a busy thread.
DROP INDEX run_active;
CREATE INDEX run_active ON run (thread_id, seq) WHERE status IN ('pending', 'running');
