-- The `configurable` that a thread gives to its runs: that of the assistant of its first run, as
-- LangGraph's server keeps it. A thread without a run has none.
ALTER TABLE thread ADD COLUMN configurable jsonb NOT NULL DEFAULT '{}';
