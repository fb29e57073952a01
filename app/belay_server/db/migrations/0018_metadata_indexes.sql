-- Searches find a caller's rows by these, without reading the metadata of all others. Entries are
-- inserted at once: a list of pending ones would have to be read by everybody's searches, so that
-- Postgres rather reads the table.
CREATE INDEX assistant_metadata ON assistant USING gin (metadata jsonb_path_ops)
    WITH (fastupdate = off);
CREATE INDEX assistant_system ON assistant (assistant_id) WHERE is_system;
ALTER INDEX thread_metadata SET (fastupdate = off);
ALTER INDEX cron_metadata SET (fastupdate = off);
SELECT gin_clean_pending_list('thread_metadata'), gin_clean_pending_list('cron_metadata');
