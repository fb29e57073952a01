-- What a run asked is a list, in the order in which it asked; it was an object by task, whose keys
-- Postgres sorts.
UPDATE run SET outcome = jsonb_set(outcome, '{interrupts}', coalesce((
    SELECT jsonb_agg(raised) FROM jsonb_each(outcome -> 'interrupts') AS task,
        jsonb_array_elements(task.value) AS raised), '[]'))
WHERE jsonb_typeof(outcome -> 'interrupts') = 'object';
