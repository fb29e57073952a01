-- An entrypoint of LangGraph's functional API that interrupts before its first value has interrupts
-- and no values.
CREATE OR REPLACE FUNCTION belay_answer(outcome jsonb) RETURNS jsonb
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE
        WHEN jsonb_typeof(coalesce(nullif(outcome -> 'values', 'null'), '{}')) = 'object'
         AND jsonb_typeof(outcome -> 'interrupts') = 'array'
         AND jsonb_array_length(outcome -> 'interrupts') > 0
        THEN coalesce(nullif(outcome -> 'values', 'null'), '{}')
            || jsonb_build_object('__interrupt__', (
                SELECT jsonb_agg(i || '{"response_schema": null}')
                FROM jsonb_array_elements(outcome -> 'interrupts') i))
        ELSE coalesce(nullif(outcome -> 'values', 'null'), '{}')
    END
$$;
