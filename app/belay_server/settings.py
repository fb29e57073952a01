"""Every environment variable Belay reads, in one frozen object.

Read once at the start of a process by `Settings.from_environ`; nothing else reads the environment.
A bad value stops the start with the variable's name.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

DEFAULT_QUEUE = "runs"
AUTH_WORDS = ("keys", "none")
_RATE = re.compile(r"[1-9][0-9]{0,8} ?/ ?(second|minute|hour|day)")
_MIB = 1024 * 1024
LOG_FORMATS = ("text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")
EXAMPLE_CONFIG = Path(__file__).resolve().parent / "example" / "langgraph.json"


class SettingsError(Exception):
    """A setting has a value that cannot be used; the message names the variable."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What an operator may set. Times are in seconds unless the name says otherwise."""

    #: Postgres 14+, `postgresql://…` (Heroku's `postgres://` is accepted).
    database_url: str
    #: Redis 6.2+ or Valkey 7.2+, `redis://…` or `rediss://…`.
    redis_url: str
    #: Any broker kombu speaks; by default the Redis above.
    broker_url: str
    #: The project's `langgraph.json`.
    config_path: Path
    #: Child processes per worker; each runs one run at a time.
    concurrency: int
    #: By how much less CPU time children ask than what watches and serves them (0 to 19).
    child_nice: int
    #: Let processes that a run has started go on when it has ended.
    keep_subprocesses: bool
    #: Import the graphs before forking the children (off for graphs that cannot be forked).
    preload_graphs: bool
    #: How long a claim stands without being renewed.
    lease_seconds: float
    #: How often the supervisor renews the leases of its runs.
    lease_renewal_seconds: float
    #: From asking a run to stop until its child is killed.
    cancel_grace_ms: int
    #: How often the supervisor polls the cancel flags of its runs.
    cancel_poll_ms: int
    #: What a worker gives its runs after SIGTERM before it puts them back.
    drain_grace_seconds: float
    #: Charged attempts of one run before it ends `error`.
    max_attempts: int
    #: Longest time one run may take, unless the run says otherwise.
    run_timeout_seconds: float
    #: How often due runs, expired leases and lost doorbells are looked for.
    sweep_seconds: float
    #: A pending, claimable run not rung for this long is rung again.
    rering_seconds: float
    #: How often a worker proves to itself that it consumes; 0 turns that off.
    liveness_seconds: float
    #: How long a run's event log is kept in Redis after its last event.
    event_log_ttl_seconds: int
    #: Most events kept of one run.
    event_log_max_events: int
    #: Most bytes of events kept of one attempt of a run.
    event_log_max_bytes: int
    #: Connections to Postgres in one web process.
    web_pool_size: int
    #: True behind PgBouncer in transaction mode: no prepared statements.
    pgbouncer: bool
    #: After how long Postgres ends a statement of a request.
    statement_seconds: float
    #: Put "An internal error occurred" where a graph's exception message would stand.
    redact_errors: bool
    #: Largest request body, in bytes.
    max_body_bytes: int
    #: Of all large answers that a web process sends at once, in bytes.
    max_answers_bytes: int
    #: Of all large bodies that a web process reads at once, in bytes.
    max_bodies_bytes: int
    #: Most values (and keys) in one request body.
    max_body_values: int
    #: Largest run, in bytes of JSON: its kwargs (with config and context) and its metadata.
    max_run_bytes: int
    #: Largest page of an answer, in bytes as the database has it; one row may always be had.
    max_answer_bytes: int
    #: Largest metadata, config or context of an assistant, thread or cron, in bytes of JSON.
    max_metadata_bytes: int
    #: Largest values of a run's end, in bytes of JSON; larger ones are in its checkpoint only.
    max_outcome_bytes: int
    #: States of more bytes, as they are stored, are read by a process of their own.
    large_state_bytes: int
    #: How many such processes a web process may have.
    state_processes: int
    #: Prefix of every Redis key and channel.
    redis_prefix: str
    #: Verify the certificate of a `rediss://` server.
    redis_verify_tls: bool
    #: Signs webhook calls (`whsec_…` or any text); None: they are not signed.
    webhook_secret: str | None = field(repr=False)
    #: Webhooks go to https only.
    webhook_https_only: bool
    #: Webhooks may go to loopback and private addresses: for development, and inside a network.
    webhook_allow_private: bool
    #: Webhooks go to these domains only (`example.com`, `*.example.com`); empty: to any.
    webhook_domains: tuple[str, ...]
    #: A webhook call that is not answered with 2xx is given up after so many attempts.
    webhook_attempts: int
    #: "keys": a request has an API key; "none": anybody may do anything. None when nobody has said
    #: which; then it is "none", on loopback only. A project's own `auth` goes before either.
    auth: str | None
    #: How often one caller may ask (`100/second`, `5000/hour`); None: as often as they like.
    rate_limit: str | None
    #: The same for cancels, which are counted apart.
    cancel_rate_limit: str | None
    #: Pending runs that one caller may have; 0: as many as they like.
    max_pending_runs: int
    #: Crons that one caller may have; 0: as many as they like.
    max_crons: int
    #: The shortest time between two runs of a cron, in seconds.
    cron_shortest_seconds: int
    #: Requests (streams and waits among them) that one caller may have open in one web process; 0:
    #: as many as they like.
    max_open_requests: int
    #: How long a request's body may take to come in.
    body_seconds: float
    #: Agent runs of one team that may be queued or running at once.
    agent_runs_per_team: int
    #: Agent runs want the Exa-Beta header, as Exa's documents have it.
    exa_beta_required: bool
    #: Send a stream heartbeat comment this often.
    heartbeat_seconds: float
    #: Origins of web pages that may call the API; `*` is all of them.
    cors_origins: tuple[str, ...]
    #: Pages of public networks may call a server on a private one (for `belay dev`).
    cors_private_network: bool
    #: Names, besides those of loopback, that a server without authentication answers to.
    hosts: tuple[str, ...]
    #: "text" or "json".
    log_format: str
    #: Of Belay's own records; None when nobody has set it.
    log_level: str | None
    #: Log a line for every request, also when the level is not debug.
    access_log: bool
    #: Where a worker serves its metrics; 0 is nowhere.
    worker_metrics_port: int
    #: Where the web processes of one gunicorn keep the metrics they share, if there are several.
    web_metrics_dir: Path | None

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Settings:
        """Read the settings; raises SettingsError naming the first variable that is wrong."""
        read = _Reader(environ)
        redis_verify_tls = read.boolean("BELAY_REDIS_VERIFY_TLS", "DYNO" not in environ)
        redis_url = _redis_url(_any_redis_url(read.required("REDIS_URL")), redis_verify_tls)
        settings = cls(
            database_url=_postgres_url(read.required("DATABASE_URL")),
            redis_url=redis_url,
            broker_url=_redis_url(read.text("BROKER_URL", redis_url), redis_verify_tls),
            config_path=config_path(environ),
            concurrency=read.integer("BELAY_CONCURRENCY", 16, minimum=1),
            child_nice=read.integer("BELAY_CHILD_NICE", 10, minimum=0),
            keep_subprocesses=read.boolean("BELAY_KEEP_SUBPROCESSES", False),
            preload_graphs=read.boolean("BELAY_PRELOAD", True),
            lease_seconds=read.number("BELAY_LEASE_SECONDS", 10.0, minimum=1.0),
            lease_renewal_seconds=read.number("BELAY_LEASE_RENEWAL_SECONDS", 2.0, minimum=0.1),
            cancel_grace_ms=read.integer("BELAY_CANCEL_GRACE_MS", 300, minimum=0),
            cancel_poll_ms=read.integer("BELAY_CANCEL_POLL_MS", 50, minimum=5),
            drain_grace_seconds=read.number("BELAY_DRAIN_GRACE_SECONDS", 20.0, minimum=0.0),
            max_attempts=read.integer("BELAY_MAX_ATTEMPTS", 3, minimum=1),
            run_timeout_seconds=read.number("BELAY_RUN_TIMEOUT_SECONDS", 86400.0, minimum=0.1),
            sweep_seconds=read.number("BELAY_SWEEP_SECONDS", 0.5, minimum=0.05),
            rering_seconds=read.number("BELAY_RERING_SECONDS", 5.0, minimum=0.5),
            liveness_seconds=read.number("BELAY_LIVENESS_SECONDS", 10.0, minimum=0.0),
            event_log_ttl_seconds=read.integer("BELAY_EVENT_LOG_TTL_SECONDS", 3600, minimum=1),
            event_log_max_events=read.integer("BELAY_EVENT_LOG_MAX_EVENTS", 100_000, minimum=100),
            event_log_max_bytes=read.integer(
                "BELAY_EVENT_LOG_MAX_BYTES", 64 * _MIB, minimum=1024 * 1024
            ),
            web_pool_size=read.integer("BELAY_WEB_POOL_SIZE", 10, minimum=2),
            statement_seconds=read.number("BELAY_STATEMENT_SECONDS", 30.0, minimum=1.0),
            pgbouncer=read.boolean("BELAY_PGBOUNCER", False),
            redact_errors=read.boolean("BELAY_REDACT_ERRORS", False),
            max_body_bytes=read.integer("BELAY_MAX_BODY_BYTES", 8 * _MIB, minimum=1024),
            max_bodies_bytes=read.integer("BELAY_MAX_BODIES_BYTES", 128 * _MIB, minimum=_MIB),
            max_body_values=read.integer("BELAY_MAX_BODY_VALUES", 200_000, minimum=1000),
            max_run_bytes=read.integer("BELAY_MAX_RUN_BYTES", 16 * _MIB, minimum=1024),
            max_answer_bytes=read.integer("BELAY_MAX_ANSWER_BYTES", 64 * _MIB, minimum=1024),
            max_answers_bytes=read.integer("BELAY_MAX_ANSWERS_BYTES", 128 * _MIB, minimum=_MIB),
            max_metadata_bytes=read.integer("BELAY_MAX_METADATA_BYTES", 2 * _MIB, minimum=1024),
            large_state_bytes=read.integer("BELAY_LARGE_STATE_BYTES", _MIB // 2, minimum=1024),
            state_processes=read.integer("BELAY_STATE_PROCESSES", 2, minimum=1),
            max_outcome_bytes=read.integer("BELAY_MAX_OUTCOME_BYTES", 16 * _MIB, minimum=1024),
            redis_prefix=read.text("BELAY_REDIS_PREFIX", "belay:"),
            redis_verify_tls=redis_verify_tls,
            webhook_secret=_secret(read.text("BELAY_WEBHOOK_SECRET", "")),
            webhook_https_only=read.boolean("BELAY_WEBHOOK_HTTPS_ONLY", False),
            webhook_allow_private=read.boolean("BELAY_WEBHOOK_ALLOW_PRIVATE", False),
            webhook_domains=read.words("BELAY_WEBHOOK_DOMAINS", ""),
            webhook_attempts=read.integer("BELAY_WEBHOOK_ATTEMPTS", 15, minimum=1),
            auth=read.one_of("BELAY_AUTH", AUTH_WORDS),
            rate_limit=read.rate("BELAY_RATE_LIMIT"),
            cancel_rate_limit=read.rate("BELAY_CANCEL_RATE_LIMIT"),
            max_pending_runs=read.integer("BELAY_MAX_PENDING_RUNS", 0, minimum=0),
            max_crons=read.integer("BELAY_MAX_CRONS", 1000, minimum=0),
            cron_shortest_seconds=read.integer("BELAY_CRON_SHORTEST_SECONDS", 10, minimum=1),
            max_open_requests=read.integer("BELAY_MAX_OPEN_REQUESTS", 0, minimum=0),
            body_seconds=read.number("BELAY_BODY_SECONDS", 60.0, minimum=1.0),
            agent_runs_per_team=read.integer("BELAY_AGENT_RUNS_PER_TEAM", 50, minimum=1),
            exa_beta_required=read.boolean("BELAY_EXA_BETA_REQUIRED", True),
            heartbeat_seconds=read.number("BELAY_HEARTBEAT_SECONDS", 5.0, minimum=0.1),
            cors_origins=read.words("BELAY_CORS_ORIGINS", "*"),
            cors_private_network=read.boolean("BELAY_CORS_PRIVATE_NETWORK", False),
            hosts=tuple(name.lower() for name in read.words("BELAY_HOSTS", "")),
            log_format=read.one_of("BELAY_LOG_FORMAT", LOG_FORMATS) or "text",
            log_level=read.one_of("BELAY_LOG_LEVEL", LOG_LEVELS),
            access_log=read.boolean("BELAY_ACCESS_LOG", False),
            worker_metrics_port=read.integer("BELAY_WORKER_METRICS_PORT", 0, minimum=0),
            # The name is the client library's, which reads it too.
            web_metrics_dir=read.folder("PROMETHEUS_MULTIPROC_DIR"),
        )
        if settings.lease_renewal_seconds * 2 > settings.lease_seconds:
            raise SettingsError(
                "BELAY_LEASE_RENEWAL_SECONDS must be at most half of BELAY_LEASE_SECONDS, "
                "or one slow renewal loses every lease"
            )
        return settings


def config_path(environ: Mapping[str, str]) -> Path:
    """The `langgraph.json` to serve: BELAY_CONFIG, else one in this folder, else the example."""
    named = environ.get("BELAY_CONFIG", "").strip()
    if named:
        path = Path(named).resolve()
        if not path.is_file():
            raise SettingsError(f"BELAY_CONFIG: there is no file {named}")
        return path
    here = Path("langgraph.json").resolve()
    return here if here.is_file() else EXAMPLE_CONFIG


class _Reader:
    """Reads one variable at a time and names it when it is wrong."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def words(self, name: str, default: str) -> tuple[str, ...]:
        """A list with commas between its words."""
        return tuple(word.strip() for word in self.text(name, default).split(",") if word.strip())

    def one_of(self, name: str, words: tuple[str, ...]) -> str | None:
        value = self.text(name, "").lower()
        if value and value not in words:
            raise SettingsError(f"{name} must be one of {', '.join(words)}, not {value!r}")
        return value or None

    def rate(self, name: str) -> str | None:
        value = self.text(name, "")
        if value and _RATE.fullmatch(value) is None:
            raise SettingsError(f"{name} must be like 100/second or 5000/hour, not {value!r}")
        return value or None

    def folder(self, name: str) -> Path | None:
        value = self.text(name, "")
        return Path(value) if value else None

    def text(self, name: str, default: str) -> str:
        return self._environ.get(name, "").strip() or default

    def required(self, name: str) -> str:
        value = self.text(name, "")
        if not value:
            raise SettingsError(f"{name} is not set")
        return value

    def integer(self, name: str, default: int, *, minimum: int) -> int:
        return int(self._bounded(name, default, int, minimum))

    def number(self, name: str, default: float, *, minimum: float) -> float:
        return float(self._bounded(name, default, float, minimum))

    def boolean(self, name: str, default: bool) -> bool:
        raw = self.text(name, "").lower()
        if not raw:
            return default
        if raw in ("1", "true", "yes", "on"):
            return True
        if raw in ("0", "false", "no", "off"):
            return False
        raise SettingsError(f"{name} must be 1 or 0, not {raw!r}")

    def _bounded(self, name: str, default: Any, cast: Callable[[str], Any], minimum: Any) -> Any:
        raw = self.text(name, "")
        if not raw:
            return default
        try:
            value = cast(raw)
        except ValueError:
            raise SettingsError(f"{name} must be a number, not {raw!r}") from None
        if value < minimum:
            raise SettingsError(f"{name} must be at least {minimum}, not {raw}")
        return value


def _secret(text: str) -> str | None:
    if text.startswith("whsec_"):
        try:
            base64.b64decode(text.removeprefix("whsec_"), validate=True)
        except binascii.Error:
            raise SettingsError("BELAY_WEBHOOK_SECRET: after whsec_ there must be base64") from None
    return text or None


def _postgres_url(url: str) -> str:
    if url.startswith("postgres://"):
        url = "postgresql://" + url.removeprefix("postgres://")
    if not url.startswith("postgresql://"):
        raise SettingsError("DATABASE_URL must start with postgresql:// (or postgres://)")
    return url


def _any_redis_url(url: str) -> str:
    if not url.startswith(("redis://", "rediss://", "unix://")):
        raise SettingsError("REDIS_URL must start with redis://, rediss:// or unix://")
    return url


def _redis_url(url: str, verify_tls: bool) -> str:
    """A `rediss://` URL says whether to verify, for redis-py and for kombu alike."""
    parts = urlsplit(url)
    if parts.scheme != "rediss":
        return url
    query = dict(parse_qsl(parts.query))
    query.setdefault("ssl_cert_reqs", "required" if verify_tls else "none")
    return urlunsplit(parts._replace(query=urlencode(query)))
