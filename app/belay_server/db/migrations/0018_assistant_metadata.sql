-- Searches find a caller's assistants by these, without reading the metadata of all others.
CREATE INDEX assistant_metadata ON assistant USING gin (metadata jsonb_path_ops);
CREATE INDEX assistant_system ON assistant (assistant_id) WHERE is_system;
