-- Every statement that reads an assistant for a client checks access. The server's own assistants,
-- one for each graph, may be read and run by every caller. To change or delete one, the caller's
-- filter must match it.

-- name: put_system_assistant
-- A row that a client made with this id is replaced, as a new version. No row is returned if the
-- assistant is already the server's own.
INSERT INTO assistant
    (assistant_id, graph_id, name, description, config, context, metadata, is_system)
VALUES (%(assistant_id)s, %(graph_id)s, %(name)s, %(description)s, %(config)s, %(context)s,
        '{"created_by": "system"}', true)
ON CONFLICT (assistant_id) DO UPDATE SET
    graph_id = EXCLUDED.graph_id, name = EXCLUDED.name, description = EXCLUDED.description,
    config = EXCLUDED.config, context = EXCLUDED.context, metadata = EXCLUDED.metadata,
    is_system = true,
    version = 1 + (SELECT max(v.version) FROM assistant_version v
                   WHERE v.assistant_id = EXCLUDED.assistant_id),
    updated_at = clock_timestamp()
WHERE NOT assistant.is_system
RETURNING version

-- name: own_system_assistant
-- Mark an assistant that the server made before the column `is_system` existed, even if the
-- operator has changed it since.
UPDATE assistant a SET is_system = true
WHERE a.assistant_id = %(assistant_id)s AND NOT a.is_system
  AND a.created_at < (SELECT applied_at FROM belay_migration WHERE number = 11)
  AND EXISTS (
      SELECT 1 FROM assistant_version v
      WHERE v.assistant_id = a.assistant_id AND v.version = 1 AND v.graph_id = %(graph_id)s
        AND v.name = %(graph_id)s AND v.metadata = '{"created_by": "system"}'
        AND v.config = '{}' AND v.context = '{}')

-- name: describe_system_assistant
-- The project may have changed the name, the description or the defaults. What a client has changed
-- is kept.
WITH described AS (
    UPDATE assistant SET
        name = %(name)s, description = %(description)s, config = %(config)s, context = %(context)s,
        updated_at = clock_timestamp()
    WHERE assistant_id = %(assistant_id)s AND is_system AND version = 1
      AND (name, description, config, context) IS DISTINCT FROM
          (%(name)s::text, %(description)s::text, %(config)s::jsonb, %(context)s::jsonb)
    RETURNING assistant_id
)
UPDATE assistant_version v SET
    name = %(name)s, description = %(description)s, config = %(config)s, context = %(context)s
FROM described d WHERE v.assistant_id = d.assistant_id AND v.version = 1

-- name: put_version
-- Store the assistant's current content under its version.
INSERT INTO assistant_version
    (assistant_id, version, graph_id, name, description, config, context, metadata, created_at)
SELECT assistant_id, version, graph_id, name, description, config, context, metadata, updated_at
FROM assistant WHERE assistant_id = %(assistant_id)s
ON CONFLICT DO NOTHING

-- name: drop_old_versions
-- Keep the newest versions that together have at most `most_bytes` as stored (compressed), and the
-- current one.
DELETE FROM assistant_version v
USING (
    SELECT o.version,
           sum(pg_column_size(o.config) + pg_column_size(o.context) + pg_column_size(o.metadata))
               OVER (ORDER BY o.version DESC) AS bytes
    FROM assistant_version o
    WHERE o.assistant_id = %(assistant_id)s
) sized
WHERE v.assistant_id = %(assistant_id)s AND v.version = sized.version
  AND sized.bytes > %(most_bytes)s AND v.version <> %(current)s

-- name: insert_assistant
INSERT INTO assistant (assistant_id, graph_id, name, description, config, context, metadata)
VALUES (%(assistant_id)s, %(graph_id)s, %(name)s, %(description)s, %(config)s, %(context)s,
        %(metadata)s)
ON CONFLICT (assistant_id) DO NOTHING
RETURNING *

-- name: get_assistant
SELECT * FROM assistant
WHERE assistant_id = %(assistant_id)s
  AND (%(allowed_assistants)s::jsonb IS NULL OR belay_allows(%(allowed_assistants)s, metadata)
       OR is_system)

-- name: lock_assistant
SELECT * FROM assistant
WHERE assistant_id = %(assistant_id)s
  AND (%(allowed_assistants)s::jsonb IS NULL OR belay_allows(%(allowed_assistants)s, metadata))
FOR UPDATE

-- name: keep_assistant
-- Lock an assistant against its deletion, and against nothing else. So a deletion waits for the runs
-- that are being created, and then finds and stops them.
SELECT assistant_id FROM assistant WHERE assistant_id = %(assistant_id)s
FOR KEY SHARE

-- name: update_assistant
-- The new version's number follows the highest one, even if an older version is the current one. A
-- large value that stays the same is not written again: Postgres keeps the reference to it.
UPDATE assistant SET
    graph_id = %(graph_id)s, name = %(name)s, description = %(description)s,
    config = CASE WHEN config = %(config)s THEN config ELSE %(config)s END,
    context = CASE WHEN context = %(context)s THEN context ELSE %(context)s END,
    metadata = CASE WHEN metadata = %(metadata)s THEN metadata ELSE %(metadata)s END,
    version = 1 + (SELECT max(v.version) FROM assistant_version v
                   WHERE v.assistant_id = %(assistant_id)s),
    updated_at = clock_timestamp()
WHERE assistant_id = %(assistant_id)s
RETURNING *

-- name: set_latest_version
UPDATE assistant a SET
    graph_id = v.graph_id, name = v.name, description = v.description, config = v.config,
    context = v.context, metadata = v.metadata, version = v.version,
    updated_at = clock_timestamp()
FROM assistant_version v
WHERE a.assistant_id = %(assistant_id)s AND v.assistant_id = a.assistant_id
  AND v.version = %(version)s
  AND (%(allowed_assistants)s::jsonb IS NULL OR belay_allows(%(allowed_assistants)s, a.metadata))
RETURNING a.*

-- name: assistant_versions
SELECT * FROM assistant_version
WHERE assistant_id = %(assistant_id)s AND metadata @> %(metadata)s
ORDER BY version DESC
LIMIT %(limit)s OFFSET %(offset)s

-- name: threads_of_assistant
SELECT thread_id FROM thread_view
WHERE metadata @> jsonb_build_object('assistant_id', %(assistant_id)s::text)
  AND (%(allowed_threads)s::jsonb IS NULL OR belay_allows(%(allowed_threads)s, metadata))
LIMIT %(limit)s

-- name: delete_assistant
DELETE FROM assistant
WHERE assistant_id = %(assistant_id)s
  AND (%(allowed_assistants)s::jsonb IS NULL OR belay_allows(%(allowed_assistants)s, metadata))
RETURNING assistant_id

-- name: search_assistants
SELECT * FROM assistant
WHERE (%(graph_id)s::text IS NULL OR graph_id = %(graph_id)s)
  AND (%(name)s::text IS NULL OR position(lower(%(name)s) in lower(name)) > 0)
  AND metadata @> %(metadata)s
  AND (%(within_assistants)s::jsonpath IS NULL
       OR metadata @@ %(within_assistants)s::jsonpath OR is_system)
  AND (%(allowed_assistants)s::jsonb IS NULL OR belay_allows(%(allowed_assistants)s, metadata)
       OR is_system)
ORDER BY {sort_by} {sort_order}, assistant_id
LIMIT %(limit)s OFFSET %(offset)s

-- name: count_assistants
SELECT count(*) FROM assistant
WHERE (%(graph_id)s::text IS NULL OR graph_id = %(graph_id)s)
  AND (%(name)s::text IS NULL OR position(lower(%(name)s) in lower(name)) > 0)
  AND metadata @> %(metadata)s
  AND (%(within_assistants)s::jsonpath IS NULL
       OR metadata @@ %(within_assistants)s::jsonpath OR is_system)
  AND (%(allowed_assistants)s::jsonb IS NULL OR belay_allows(%(allowed_assistants)s, metadata)
       OR is_system)
