-- Which assistants are the server's own, one for each graph. A column that no client writes:
-- `metadata.created_by` is anybody's to set. The start of a web process sets it.
ALTER TABLE assistant ADD COLUMN is_system boolean NOT NULL DEFAULT false;
