-- Mark the server's own assistants, one for each graph. Clients cannot write this column, unlike
-- `metadata.created_by`. A web process sets it when it starts.
ALTER TABLE assistant ADD COLUMN is_system boolean NOT NULL DEFAULT false;
