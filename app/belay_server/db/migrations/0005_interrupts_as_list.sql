-- Store the interrupts of an outcome as a list, in the order in which they were raised. They were an
-- object with task ids as keys, which Postgres sorts.
UPDATE run SET outcome = jsonb_set(outcome, '{interrupts}', coalesce((
    SELECT jsonb_agg(raised) FROM jsonb_each(outcome -> 'interrupts') AS task,
        jsonb_array_elements(task.value) AS raised), '[]'))
WHERE jsonb_typeof(outcome -> 'interrupts') = 'object';
