-- The version of each library whose own migrations have been applied. `belay migrate` imports a
-- library, which takes half a second, only when its version differs.
CREATE TABLE belay_library_schema (
    library text PRIMARY KEY,
    version text NOT NULL
);
