-- Return the response for clients that wait for a run, from its outcome: the values, and the
-- interrupts under `__interrupt__`. Postgres builds it, so that a large response is passed on without
-- being decoded.
CREATE FUNCTION belay_answer(outcome jsonb) RETURNS jsonb
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE
        WHEN outcome -> 'values' IS NULL OR outcome -> 'values' = 'null' THEN '{}'::jsonb
        WHEN jsonb_typeof(outcome -> 'values') = 'object'
         AND jsonb_typeof(outcome -> 'interrupts') = 'array'
         AND jsonb_array_length(outcome -> 'interrupts') > 0
        THEN (outcome -> 'values') || jsonb_build_object('__interrupt__', (
            SELECT jsonb_agg(i || '{"response_schema": null}')
            FROM jsonb_array_elements(outcome -> 'interrupts') i))
        ELSE outcome -> 'values'
    END
$$;
