-- Authorization. A filter is the value that an authorization handler returns: metadata fields with
-- exact values, $eq, $contains, $or and $and. A null filter matches everything. A filter with an
-- unknown operator matches nothing.
CREATE FUNCTION belay_allows(filter jsonb, metadata jsonb) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
DECLARE
    field text;
    wanted jsonb;
    found jsonb;
BEGIN
    IF filter IS NULL THEN
        RETURN true;
    END IF;
    IF jsonb_typeof(filter) <> 'object' THEN
        RETURN false;
    END IF;
    FOR field, wanted IN SELECT key, value FROM jsonb_each(filter) LOOP
        found := metadata -> field;
        IF field = '$and' THEN
            IF jsonb_typeof(wanted) <> 'array' OR EXISTS (
                SELECT 1 FROM jsonb_array_elements(wanted) AS part (f)
                WHERE NOT belay_allows(f, metadata))
            THEN RETURN false; END IF;
        ELSIF field = '$or' THEN
            IF jsonb_typeof(wanted) <> 'array' OR NOT EXISTS (
                SELECT 1 FROM jsonb_array_elements(wanted) AS part (f)
                WHERE belay_allows(f, metadata))
            THEN RETURN false; END IF;
        ELSIF field LIKE '$%' THEN
            RETURN false;
        ELSIF jsonb_typeof(wanted) <> 'object' THEN
            IF found IS DISTINCT FROM wanted THEN RETURN false; END IF;
        ELSIF wanted = '{}' OR wanted - '$eq' - '$contains' <> '{}' THEN
            RETURN false;
        ELSE
            IF wanted ? '$eq' AND found IS DISTINCT FROM wanted -> '$eq' THEN RETURN false; END IF;
            IF wanted ? '$contains' AND NOT belay_contains(found, wanted -> '$contains') THEN
                RETURN false;
            END IF;
        END IF;
    END LOOP;
    RETURN true;
END
$$;

-- Return whether a list has an element, or each of several, by equality. `@>` would also match a
-- part of an element.
CREATE FUNCTION belay_contains(list jsonb, wanted jsonb) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT coalesce(jsonb_typeof(list) = 'array', false) AND NOT EXISTS (
        SELECT 1
        FROM jsonb_array_elements(
            CASE WHEN jsonb_typeof(wanted) = 'array' THEN wanted ELSE jsonb_build_array(wanted) END
        ) AS one (w)
        WHERE NOT EXISTS (
            SELECT 1
            FROM jsonb_array_elements(
                CASE WHEN jsonb_typeof(list) = 'array' THEN list ELSE '[]' END) AS other (l)
            WHERE l = w))
$$;

-- API keys. A key is shown once, when it is created; only its hash is stored.
CREATE TABLE api_key (
    key_id       uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    -- The beginning of the key, to look it up.
    prefix       text NOT NULL UNIQUE,
    key_hash     bytea NOT NULL,
    name         text NOT NULL,
    -- The team whose agent runs the key may access.
    team         text NOT NULL,
    scope        text NOT NULL CHECK (scope IN ('all', 'agent_runs')),
    created_at   timestamptz NOT NULL DEFAULT now(),
    expires_at   timestamptz,
    last_used_at timestamptz,
    revoked_at   timestamptz
);

-- The user who created a cron. Its runs belong to that user.
ALTER TABLE cron ADD COLUMN maker jsonb NOT NULL DEFAULT '{}';

-- The caller that a run counts for in limits: an API key, or a user of the project's `auth`.
ALTER TABLE run ADD COLUMN caller text;
CREATE INDEX run_caller_active ON run (caller)
    WHERE status IN ('pending', 'running') AND caller IS NOT NULL;
