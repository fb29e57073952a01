-- name: insert_api_key
INSERT INTO api_key (prefix, key_hash, name, team, scope, expires_at)
VALUES (%(prefix)s, %(key_hash)s, %(name)s, %(team)s, %(scope)s,
        now() + make_interval(secs => %(seconds)s))
RETURNING *

-- name: list_api_keys
SELECT * FROM api_key ORDER BY created_at

-- name: revoke_api_key
-- By prefix or name. Revoking a key again is no error.
UPDATE api_key SET revoked_at = coalesce(revoked_at, now())
WHERE prefix = %(named)s OR name = %(named)s
RETURNING *

-- name: good_api_key
SELECT * FROM api_key
WHERE prefix = %(prefix)s AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())

-- name: good_prefixes
SELECT prefix FROM api_key
WHERE prefix = ANY (%(prefixes)s::text[]) AND revoked_at IS NULL
  AND (expires_at IS NULL OR expires_at > now())

-- name: note_use
-- At most once a minute, so that a busy key is not written with every request.
UPDATE api_key SET last_used_at = now()
WHERE key_id = %(key_id)s
  AND (last_used_at IS NULL OR last_used_at < now() - interval '1 minute')
