-- name: delete_expired_items
-- Delete expired items of LangGraph's store, in batches.
DELETE FROM store WHERE (prefix, key) IN (
    SELECT prefix, key FROM store WHERE expires_at < now()
    ORDER BY expires_at
    LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED)
