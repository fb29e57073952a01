-- What a run's code may do on the server that it runs in: what its creator may. `token_hash` is the
-- SHA-256 of the token that authenticates the run's code while the current claim lasts.
ALTER TABLE run ADD COLUMN creator jsonb;
ALTER TABLE run ADD COLUMN token_hash text;
