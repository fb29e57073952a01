-- name: put_system_assistant
INSERT INTO assistant (assistant_id, graph_id, name, metadata)
VALUES (%(assistant_id)s, %(graph_id)s, %(graph_id)s, '{"created_by": "system"}')
ON CONFLICT (assistant_id) DO NOTHING

-- name: put_first_version
INSERT INTO assistant_version
    (assistant_id, version, graph_id, name, description, config, context, metadata, created_at)
SELECT assistant_id, version, graph_id, name, description, config, context, metadata, created_at
FROM assistant WHERE assistant_id = %(assistant_id)s
ON CONFLICT DO NOTHING

-- name: insert_assistant
INSERT INTO assistant (assistant_id, graph_id, name, description, config, context, metadata)
VALUES (%(assistant_id)s, %(graph_id)s, %(name)s, %(description)s, %(config)s, %(context)s,
        %(metadata)s)
ON CONFLICT (assistant_id) DO NOTHING
RETURNING *

-- name: get_assistant
SELECT * FROM assistant WHERE assistant_id = %(assistant_id)s

-- name: delete_assistant
DELETE FROM assistant WHERE assistant_id = %(assistant_id)s RETURNING assistant_id

-- name: search_assistants
SELECT * FROM assistant
WHERE (%(graph_id)s::text IS NULL OR graph_id = %(graph_id)s)
  AND (%(name)s::text IS NULL OR position(lower(%(name)s) in lower(name)) > 0)
  AND metadata @> %(metadata)s
ORDER BY {sort_by} {sort_order}, assistant_id
LIMIT %(limit)s OFFSET %(offset)s

-- name: count_assistants
SELECT count(*) FROM assistant
WHERE (%(graph_id)s::text IS NULL OR graph_id = %(graph_id)s)
  AND (%(name)s::text IS NULL OR position(lower(%(name)s) in lower(name)) > 0)
  AND metadata @> %(metadata)s
