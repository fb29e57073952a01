"""Read Belay's settings from the environment into one frozen object.

`Settings.from_environ` reads them once, when a process starts. An invalid value ends the start with
an error that names the variable. A few variables are read elsewhere: gunicorn's by `gunicorn_conf`,
those that have precedence over keys of `langgraph.json` by `graphs.project`, and some before there
are settings, by `cli` and `exposure`.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from belay_server.configuration.setting_aliases import REFUSED, alias_in_use, with_own_names

DEFAULT_QUEUE = "runs"
#: The environment variable of a random token that the processes of one gunicorn share.
SERVER_TOKEN = "BELAY_SERVER_TOKEN"  # noqa: S105
AUTH_WORDS = ("keys", "none")
#: The largest value of a setting in seconds.
_YEAR_SECONDS = 365 * 86_400
#: Postgres takes a timeout as a 32-bit number of milliseconds.
_LONGEST_STATEMENT_SECONDS = 2_147_483
_RATE = re.compile(r"[1-9][0-9]{0,8} ?/ ?(second|minute|hour|day)")
_MIB = 1024 * 1024
_AES_KEY_BYTES = (16, 24, 32)
#: Where the runs of a graph are executed: in a process for each, in shared hosts, or by its nodes.
SHARED = "shared"
AUTO = "auto"
ISOLATION_WORDS = ("process", SHARED, AUTO)
LOG_FORMATS = ("text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")
EXAMPLE_CONFIG = Path(__file__).resolve().parents[1] / "example" / "langgraph.json"


class SettingsError(Exception):
    """A setting is missing or invalid. The message names the variable."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The operator's settings. Times are in seconds unless a name has another unit."""

    #: Postgres 14+, `postgresql://…` (Heroku's `postgres://` is accepted).
    database_url: str
    #: Redis 6.2+ or Valkey 7.2+, `redis://…` or `rediss://…`.
    redis_url: str
    #: Any broker that kombu supports. The default is the Redis of `redis_url`.
    broker_url: str
    #: The project's `langgraph.json`.
    config_path: Path
    #: Where the code of graphs reaches the web process, for `langgraph_sdk` clients without a URL.
    internal_url: str
    #: Child processes per worker. Each executes one run at a time.
    concurrency: int
    #: Where the runs of graphs are executed whose `isolation` is not in `langgraph.json`.
    isolation: str
    #: How many runs of a worker share its hosts at once, if there are graphs that share hosts.
    shared_concurrency: int
    #: How many hosts a worker has at most; 0: one per core.
    run_hosts: int
    #: How much to raise the niceness of child processes (0 to 19): the others have precedence.
    child_nice: int
    #: Whether processes that a run has started may outlive it.
    keep_subprocesses: bool
    #: The port at which each child lets a debugger attach; 0 for none.
    debug_port: int
    #: Import the graphs before forking the child processes. Off for graphs that are not fork-safe.
    preload_graphs: bool
    #: How long a lease lasts without being renewed.
    lease_seconds: float
    #: How often the supervisor renews the leases of its runs.
    lease_renewal_seconds: float
    #: How long a child process has to stop its run before it is killed, in milliseconds.
    cancel_grace_ms: int
    #: How often the supervisor polls the cancel flags of its runs, in milliseconds.
    cancel_poll_ms: int
    #: The grace period of a worker's runs after SIGTERM. Then they are put back.
    drain_grace_seconds: float
    #: How many counted attempts a run has before it ends with `error`.
    max_attempts: int
    #: The time limit of a run that has none of its own.
    run_timeout_seconds: float
    #: How often the sweeper searches for due runs, expired leases and lost doorbells.
    sweep_seconds: float
    #: After this time without a claim, a claimable run's doorbell is sent again.
    rering_seconds: float
    #: How often a worker sends a ping to itself to check that it consumes messages. 0: never.
    liveness_seconds: float
    #: How long a run's event log is kept in Redis after its last event.
    event_log_ttl_seconds: int
    #: How many events of one run are kept at most.
    event_log_max_events: int
    #: How many bytes of events are kept of one attempt of a run at most.
    event_log_max_bytes: int
    #: The size of a web process's pool of connections to Postgres. Cancels have a pool of two more.
    web_pool_size: int
    #: True behind PgBouncer in transaction mode: no prepared statements.
    pgbouncer: bool
    #: The time limit of a request's SQL statement, which Postgres enforces (not with `pgbouncer`).
    statement_seconds: float
    #: Replace a graph's exception message by "An internal error occurred".
    redact_errors: bool
    #: Size limit of one request body, in bytes.
    max_body_bytes: int
    #: Size limit of all large responses that a web process sends at once, in bytes.
    max_answers_bytes: int
    #: Size limit of all large bodies that a web process reads at once, in bytes.
    max_bodies_bytes: int
    #: How many values and keys one request body may have.
    max_body_values: int
    #: Size limit of a run's kwargs (with config and context) and metadata, in bytes of JSON.
    max_run_bytes: int
    #: Size limit of a page of rows, in bytes as Postgres sends them. One row is always allowed.
    max_answer_bytes: int
    #: Size limit of an assistant's, thread's or cron's metadata, config or context, in JSON bytes.
    max_metadata_bytes: int
    max_versions_bytes: int
    #: Size limit of a run's final values, in bytes of JSON. Larger ones are in its checkpoint only.
    max_outcome_bytes: int
    #: States of more bytes, as they are stored, are read by a state process.
    large_state_bytes: int
    #: How many state processes a web process may have.
    state_processes: int
    #: Prefix of every Redis key and channel.
    redis_prefix: str
    #: Verify the certificate of a `rediss://` server.
    redis_verify_tls: bool
    #: The key that signs webhook calls (`whsec_…` or any text). None: they are not signed.
    webhook_secret: str | None = field(repr=False)
    #: The AES key with which the values of checkpoints are encrypted. None: they are not.
    aes_key: bytes | None = field(repr=False)
    #: Allow only https URLs for webhooks.
    webhook_https_only: bool
    #: Allow webhooks to loopback and private addresses, for development or an internal network.
    webhook_allow_private: bool
    #: The domains that webhooks may call (`example.com`, `*.example.com`). Empty: any.
    webhook_domains: tuple[str, ...]
    #: How many times a webhook call is attempted at most, until it gets a 2xx response.
    webhook_attempts: int
    #: "keys": every request needs an API key. "none": no authentication. None: not set, which means
    #: no authentication, on loopback only. A project's own `auth` takes precedence.
    auth: str | None
    #: The rate limit of one caller (`100/second`, `5000/hour`). None: no limit.
    rate_limit: str | None
    #: The same for cancels, which are counted separately.
    cancel_rate_limit: str | None
    #: How many pending runs one caller may have. 0: no limit.
    max_pending_runs: int
    #: How many crons one caller may have. 0: no limit.
    max_crons: int
    #: Size limit of a cron's payload, in bytes: each of its runs has it.
    max_cron_bytes: int
    #: The shortest time between two runs of a cron, in seconds.
    cron_shortest_seconds: int
    #: How many requests, streams and waits included, one caller may have open in all web processes
    #: together. 0: no limit.
    max_open_requests: int
    #: The time limit for receiving a request's body.
    body_seconds: float
    #: How many Agent runs of one team may be queued or running at once.
    agent_runs_per_team: int
    #: Require the Exa-Beta header for Agent runs, as Exa's documentation does.
    exa_beta_required: bool
    #: The interval of heartbeat comments in a stream.
    heartbeat_seconds: float
    #: Origins of web pages that may call the API. `*` allows all.
    cors_origins: tuple[str, ...]
    #: Allow pages from public networks to call a server on a private one (for `belay dev`).
    cors_private_network: bool
    #: Host names, besides loopback's, under which a server without authentication may be called.
    hosts: tuple[str, ...]
    #: "text" or "json".
    log_format: str
    #: The level of Belay's own log records. None: not set.
    log_level: str | None
    #: Log a line for every request even if the level is not debug.
    access_log: bool
    #: The port on which a worker serves its metrics. 0: it does not.
    worker_metrics_port: int
    #: Whether `/metrics` of a web process also has the names of LangGraph's server.
    reference_metrics: bool
    #: The folder in which the web processes of one gunicorn share metrics, if there are several.
    web_metrics_dir: Path | None

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Settings:
        """Read the settings. Raises SettingsError, which names the first invalid variable."""
        for name in REFUSED:
            if environ.get(name, "").strip():
                raise SettingsError(
                    f"{name} is set, but Belay encrypts no JSON fields. Encrypt the disk or the "
                    "database, and unset it"
                )
        read = _Reader(environ)
        redis_verify_tls = read.boolean("BELAY_REDIS_VERIFY_TLS", "DYNO" not in environ)
        redis_url = _redis_url(_any_redis_url(read.required("REDIS_URL")), redis_verify_tls)
        settings = cls(
            database_url=_postgres_url(read.required("DATABASE_URL")),
            redis_url=redis_url,
            broker_url=_redis_url(read.text("BROKER_URL", redis_url), redis_verify_tls),
            config_path=config_path(environ),
            internal_url=_http_url(
                "BELAY_INTERNAL_URL", read.text("BELAY_INTERNAL_URL", _own_url(environ))
            ),
            concurrency=read.integer("BELAY_CONCURRENCY", 16, minimum=1),
            isolation=read.one_of("BELAY_ISOLATION", ISOLATION_WORDS) or AUTO,
            shared_concurrency=read.integer("BELAY_SHARED_CONCURRENCY", 200, minimum=1),
            run_hosts=read.integer("BELAY_RUN_HOSTS", 0, minimum=0),
            child_nice=read.integer("BELAY_CHILD_NICE", 10, minimum=0),
            keep_subprocesses=read.boolean("BELAY_KEEP_SUBPROCESSES", False),
            debug_port=read.integer("BELAY_DEBUG_PORT", 0, minimum=0),
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
            statement_seconds=read.number(
                "BELAY_STATEMENT_SECONDS", 30.0, minimum=1.0, maximum=_LONGEST_STATEMENT_SECONDS
            ),
            pgbouncer=read.boolean("BELAY_PGBOUNCER", False),
            redact_errors=read.boolean("BELAY_REDACT_ERRORS", False),
            max_body_bytes=read.integer("BELAY_MAX_BODY_BYTES", 8 * _MIB, minimum=1024),
            max_bodies_bytes=read.integer("BELAY_MAX_BODIES_BYTES", 128 * _MIB, minimum=_MIB),
            max_body_values=read.integer("BELAY_MAX_BODY_VALUES", 200_000, minimum=1000),
            max_run_bytes=read.integer("BELAY_MAX_RUN_BYTES", 16 * _MIB, minimum=1024),
            max_answer_bytes=read.integer("BELAY_MAX_ANSWER_BYTES", 64 * _MIB, minimum=1024),
            max_answers_bytes=read.integer("BELAY_MAX_ANSWERS_BYTES", 128 * _MIB, minimum=_MIB),
            max_metadata_bytes=read.integer("BELAY_MAX_METADATA_BYTES", 2 * _MIB, minimum=1024),
            max_versions_bytes=read.integer("BELAY_MAX_VERSIONS_BYTES", 64 * _MIB, minimum=1024),
            large_state_bytes=read.integer("BELAY_LARGE_STATE_BYTES", _MIB // 2, minimum=1024),
            state_processes=read.integer("BELAY_STATE_PROCESSES", 2, minimum=1),
            max_outcome_bytes=read.integer("BELAY_MAX_OUTCOME_BYTES", 16 * _MIB, minimum=1024),
            redis_prefix=read.text("BELAY_REDIS_PREFIX", "belay:"),
            redis_verify_tls=redis_verify_tls,
            aes_key=_aes_key(read.text("LANGGRAPH_AES_KEY", "")),
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
            max_cron_bytes=read.integer("BELAY_MAX_CRON_BYTES", _MIB, minimum=1024),
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
            reference_metrics=read.boolean("BELAY_REFERENCE_METRICS", False),
            # Prometheus's client library reads this variable too.
            web_metrics_dir=read.folder("PROMETHEUS_MULTIPROC_DIR"),
        )
        if settings.lease_renewal_seconds * 2 > settings.lease_seconds:
            raise SettingsError(
                "BELAY_LEASE_RENEWAL_SECONDS must be at most half of BELAY_LEASE_SECONDS: "
                "otherwise one slow renewal loses every lease"
            )
        return settings


def _own_url(environ: Mapping[str, str]) -> str:
    """Return the URL of a web process on this machine, by the address that gunicorn binds."""
    bound = environ.get("BELAY_BIND", "").strip()
    host, _, port = bound.rpartition(":")
    if not bound or "/" in bound or not port.isdecimal():
        host, port = "", environ.get("PORT", "").strip() or "2024"
    is_any = host.strip("[]") in ("", "0.0.0.0", "::")  # noqa: S104
    return f"http://{'127.0.0.1' if is_any else host}:{port}"


def config_path(environ: Mapping[str, str]) -> Path:
    """Return the `langgraph.json` to serve: BELAY_CONFIG's, the current folder's or the example's.

    Raises SettingsError if BELAY_CONFIG names no file.
    """
    named = environ.get("BELAY_CONFIG", "").strip()
    if named:
        path = Path(named).resolve()
        if not path.is_file():
            raise SettingsError(f"BELAY_CONFIG: there is no file {named}")
        return path
    here = Path("langgraph.json").resolve()
    return here if here.is_file() else EXAMPLE_CONFIG


class _Reader:
    """Reads one variable at a time. Its methods raise SettingsError, which names the variable."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._given = environ
        self._environ = with_own_names(environ)

    def _error(self, name: str, problem: str) -> SettingsError:
        """Return an error that names the variable that is set, which may be an alias."""
        return SettingsError(f"{alias_in_use(self._given, name)} {problem}")

    def words(self, name: str, default: str) -> tuple[str, ...]:
        """Return the words of a comma-separated list."""
        return tuple(word.strip() for word in self.text(name, default).split(",") if word.strip())

    def one_of(self, name: str, words: tuple[str, ...]) -> str | None:
        value = self.text(name, "").lower()
        if value and value not in words:
            raise self._error(name, f"must be one of {', '.join(words)}, not {value!r}")
        return value or None

    def rate(self, name: str) -> str | None:
        value = self.text(name, "")
        if value and _RATE.fullmatch(value) is None:
            raise self._error(name, f"must be like 100/second or 5000/hour, not {value!r}")
        return value or None

    def folder(self, name: str) -> Path | None:
        value = self.text(name, "")
        return Path(value) if value else None

    def text(self, name: str, default: str) -> str:
        return self._environ.get(name, "").strip() or default

    def required(self, name: str) -> str:
        value = self.text(name, "")
        if not value:
            raise self._error(name, "is not set")
        return value

    def integer(self, name: str, default: int, *, minimum: int) -> int:
        return int(self._bounded(name, default, int, minimum))

    def number(
        self, name: str, default: float, *, minimum: float, maximum: float = _YEAR_SECONDS
    ) -> float:
        """Return a number of seconds."""
        value = float(self._bounded(name, default, float, minimum))
        if not value <= maximum:  # also for `nan`
            raise self._error(name, f"must be at most {maximum:.0f}, not {self.text(name, '')}")
        return value

    def boolean(self, name: str, default: bool) -> bool:
        raw = self.text(name, "").lower()
        if not raw:
            return default
        if raw in ("1", "true", "yes", "on"):
            return True
        if raw in ("0", "false", "no", "off"):
            return False
        raise self._error(name, f"must be 1 or 0, not {raw!r}")

    def _bounded(self, name: str, default: Any, cast: Callable[[str], Any], minimum: Any) -> Any:
        raw = self.text(name, "")
        if not raw:
            return default
        try:
            value = cast(raw)
        except ValueError:
            raise self._error(name, f"must be a number, not {raw!r}") from None
        if value < minimum:
            raise self._error(name, f"must be at least {minimum}, not {raw}")
        return value


def _http_url(name: str, url: str) -> str:
    if not url.startswith(("http://", "https://")) or not urlsplit(url).hostname:
        raise SettingsError(f"{name} must start with http:// or https://")
    return url


def _secret(text: str) -> str | None:
    if text.startswith("whsec_"):
        try:
            base64.b64decode(text.removeprefix("whsec_"), validate=True)
        except binascii.Error:
            raise SettingsError("BELAY_WEBHOOK_SECRET: after whsec_ there must be base64") from None
    return text or None


def _aes_key(text: str) -> bytes | None:
    if not text:
        return None
    key = text.encode()
    if len(key) not in _AES_KEY_BYTES:
        raise SettingsError("LANGGRAPH_AES_KEY: must have 16, 24 or 32 bytes")
    if find_spec("Crypto") is None:
        raise SettingsError("LANGGRAPH_AES_KEY needs pycryptodome: pip install pycryptodome")
    return key


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
    """Add the certificate check to a `rediss://` URL, in the form that redis-py and kombu read."""
    parts = urlsplit(url)
    if parts.scheme != "rediss":
        return url
    query = dict(parse_qsl(parts.query))
    query.setdefault("ssl_cert_reqs", "required" if verify_tls else "none")
    return urlunsplit(parts._replace(query=urlencode(query)))
