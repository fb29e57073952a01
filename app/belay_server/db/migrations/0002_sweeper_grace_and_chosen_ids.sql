-- After an outage every lease has expired. Until this time the sweeper takes no run from its worker.
ALTER TABLE scheduler_lease ADD COLUMN judges_after timestamptz NOT NULL DEFAULT now();

-- A client may retry a create with the id that it chose, even after the sweeper has deleted the run.
-- Such a run leaves a row in run_tombstone, as a rolled-back run does.
ALTER TABLE run ADD COLUMN id_chosen boolean NOT NULL DEFAULT false;

-- In the order in which a bulk cancel pages through the active runs. Also used to find busy threads.
DROP INDEX run_active;
CREATE INDEX run_active ON run (thread_id, seq) WHERE status IN ('pending', 'running');
