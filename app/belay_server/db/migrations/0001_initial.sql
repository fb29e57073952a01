-- Assistants, threads, runs. LangGraph's own checkpoint tables come from its library.
--
-- Lock order of every statement: the thread's row before the rows of its runs, runs in run_id order.

CREATE TABLE assistant (
    assistant_id uuid PRIMARY KEY,
    graph_id     text NOT NULL,
    name         text NOT NULL,
    description  text,
    config       jsonb NOT NULL DEFAULT '{}',
    context      jsonb NOT NULL DEFAULT '{}',
    metadata     jsonb NOT NULL DEFAULT '{}',
    version      integer NOT NULL DEFAULT 1,
    created_at   timestamptz NOT NULL DEFAULT now(),
    updated_at   timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX assistant_graph ON assistant (graph_id);

CREATE TABLE assistant_version (
    assistant_id uuid NOT NULL REFERENCES assistant ON DELETE CASCADE,
    version      integer NOT NULL,
    graph_id     text NOT NULL,
    name         text NOT NULL,
    description  text,
    config       jsonb NOT NULL,
    context      jsonb NOT NULL,
    metadata     jsonb NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (assistant_id, version)
);

CREATE TABLE thread (
    thread_id        uuid PRIMARY KEY,
    created_at       timestamptz NOT NULL DEFAULT now(),
    updated_at       timestamptz NOT NULL DEFAULT now(),
    state_updated_at timestamptz NOT NULL DEFAULT now(),
    metadata         jsonb NOT NULL DEFAULT '{}',
    config           jsonb NOT NULL DEFAULT '{}',
    -- The status while no run is active. 'busy' is derived, see thread_view.
    resting_status   text NOT NULL DEFAULT 'idle'
        CHECK (resting_status IN ('idle', 'interrupted', 'error')),
    "values"         jsonb,
    -- False after a killed run: the next read of the thread takes them from its last checkpoint.
    values_known     boolean NOT NULL DEFAULT true,
    interrupts       jsonb,
    error            jsonb,
    -- Set when the run of a stateless thread has ended. From then on the API answers 404; clients
    -- that wait for the run can still read its outcome. The sweeper deletes the thread later.
    hidden_at        timestamptz
);
CREATE INDEX thread_updated ON thread (updated_at DESC) WHERE hidden_at IS NULL;
CREATE INDEX thread_metadata ON thread USING gin (metadata jsonb_path_ops);
CREATE INDEX thread_values_unknown ON thread (thread_id) WHERE NOT values_known;
CREATE INDEX thread_hidden ON thread (hidden_at) WHERE hidden_at IS NOT NULL;

CREATE TABLE run (
    run_id              uuid PRIMARY KEY,
    -- The order of a thread's queue: first in, first out.
    seq                 bigint GENERATED ALWAYS AS IDENTITY,
    thread_id           uuid NOT NULL REFERENCES thread ON DELETE CASCADE,
    assistant_id        uuid NOT NULL,
    graph_id            text NOT NULL,
    queue               text NOT NULL,
    status              text NOT NULL DEFAULT 'pending' CHECK (status IN
        ('pending', 'running', 'success', 'error', 'timeout', 'interrupted')),
    metadata            jsonb NOT NULL DEFAULT '{}',
    kwargs              jsonb NOT NULL DEFAULT '{}',
    -- The config that the claim stores with the thread: the client's, without the server's keys.
    thread_config       jsonb NOT NULL DEFAULT '{}',
    multitask_strategy  text NOT NULL CHECK (multitask_strategy IN
        ('reject', 'interrupt', 'rollback', 'enqueue')),
    -- Delete the thread when this run has ended (a stateless run).
    temporary           boolean NOT NULL DEFAULT false,
    timeout_seconds     double precision,
    created_at          timestamptz NOT NULL DEFAULT now(),
    updated_at          timestamptz NOT NULL DEFAULT now(),
    scheduled_at        timestamptz NOT NULL DEFAULT now(),
    ended_at            timestamptz,
    -- The fencing token: incremented by every claim, checked by every write for the run.
    claim_no            integer NOT NULL DEFAULT 0,
    -- Claims that count against the limit. A run that is put back by a drain has one less.
    attempts            integer NOT NULL DEFAULT 0,
    lease_owner         text,
    lease_expires_at    timestamptz,
    -- When the sweeper sends the next doorbell of a pending run, and how many it has sent.
    next_ring_at        timestamptz,
    rings               integer NOT NULL DEFAULT 0,
    cancel_action       text CHECK (cancel_action IN ('interrupt', 'rollback')),
    cancel_requested_at timestamptz,
    cancel_reason       jsonb,
    error               jsonb,
    -- The response of join and wait: {"values": …, "interrupts": {…}}. Null if it is unknown.
    outcome             jsonb,
    -- The thread's fields before the claim changed them: {"config", "graph_id", "assistant_id"}.
    thread_before       jsonb,
    CONSTRAINT run_leased_while_running
        CHECK ((status = 'running') = (lease_owner IS NOT NULL)),
    CONSTRAINT run_cancelled_only_while_running
        CHECK (cancel_action IS NULL OR status NOT IN ('pending', 'success'))
);
CREATE UNIQUE INDEX run_one_running_per_thread ON run (thread_id) WHERE status = 'running';
CREATE INDEX run_thread_queue ON run (thread_id, (claim_no > 0) DESC, seq) WHERE status = 'pending';
CREATE INDEX run_thread_seq ON run (thread_id, seq DESC);
CREATE INDEX run_active ON run (status, thread_id) WHERE status IN ('pending', 'running');
CREATE INDEX run_ring ON run (next_ring_at) WHERE status = 'pending';
CREATE INDEX run_lease ON run (lease_expires_at) WHERE status = 'running';
CREATE INDEX run_assistant ON run (assistant_id);

-- One row per rolled-back run, so that a retried create with its id does not create it again.
CREATE TABLE run_tombstone (
    run_id         uuid PRIMARY KEY,
    thread_id      uuid NOT NULL,
    reason         jsonb,
    rolled_back_at timestamptz NOT NULL DEFAULT now()
);

-- Pending writes of another run's checkpoint, as they were before this run wrote to it. To undo a
-- resume, deleting what it added is not enough: a second interrupt overwrites the first one's row.
CREATE TABLE run_before_image (
    run_id        uuid NOT NULL REFERENCES run ON DELETE CASCADE,
    thread_id     text NOT NULL,
    checkpoint_ns text NOT NULL,
    checkpoint_id text NOT NULL,
    writes        jsonb NOT NULL,
    PRIMARY KEY (run_id, checkpoint_ns, checkpoint_id)
);

-- The sweeper's lease. Like a run's lease it expires, so that a holder that hangs or dies is replaced.
CREATE TABLE scheduler_lease (
    name       text PRIMARY KEY,
    owner      text NOT NULL,
    expires_at timestamptz NOT NULL
);

CREATE VIEW thread_view AS
SELECT
    t.thread_id, t.created_at, t.updated_at, t.state_updated_at, t.metadata, t.config,
    CASE WHEN EXISTS (
        SELECT 1 FROM run r WHERE r.thread_id = t.thread_id AND r.status IN ('pending', 'running')
    ) THEN 'busy' ELSE t.resting_status END AS status,
    t."values", t.values_known, t.interrupts, t.error
FROM thread t
WHERE t.hidden_at IS NULL;

-- Fence every checkpoint write: raise an error unless the claim is still valid. The row lock makes a
-- new claim wait until the write has committed. Without it, the check of an expired attempt could
-- pass, the new claim commit, and the expired attempt commit its write after it.
CREATE FUNCTION belay_assert_claim(p_run_id uuid, p_claim_no integer) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM 1 FROM run
    WHERE run_id = p_run_id AND claim_no = p_claim_no AND status = 'running'
    FOR SHARE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'claim % of run % is over', p_claim_no, p_run_id USING ERRCODE = 'BL001';
    END IF;
END
$$;
