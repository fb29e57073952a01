"""The environment variables of LangGraph's own server that Belay understands.

A deployment can keep them. Belay's own name has precedence. The names are those of
https://docs.langchain.com/langsmith/env-var
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

log = logging.getLogger(__name__)

#: The names of LangGraph's server, and Belay's for the same setting. Of two for one setting, the
#: first has precedence.
ALIASES = {
    "DATABASE_URI": "DATABASE_URL",
    "POSTGRES_URI_CUSTOM": "DATABASE_URL",
    "POSTGRES_URI": "DATABASE_URL",
    "REDIS_URI_CUSTOM": "REDIS_URL",
    "REDIS_URI": "REDIS_URL",
    "REDIS_KEY_PREFIX": "BELAY_REDIS_PREFIX",
    "N_JOBS_PER_WORKER": "BELAY_CONCURRENCY",
    "BG_JOB_TIMEOUT_SECS": "BELAY_RUN_TIMEOUT_SECONDS",
    "BG_JOB_MAX_RETRIES": "BELAY_MAX_ATTEMPTS",
    "BG_JOB_SHUTDOWN_GRACE_PERIOD_SECS": "BELAY_DRAIN_GRACE_SECONDS",
    "RESUMABLE_STREAM_TTL_SECONDS": "BELAY_EVENT_LOG_TTL_SECONDS",
    "HTTP_MAX_REQUEST_BODY_BYTES": "BELAY_MAX_BODY_BYTES",
    "CORS_ALLOW_ORIGINS": "BELAY_CORS_ORIGINS",
}
#: Variables of LangGraph's server that change what a deployment does, and that Belay ignores.
IGNORED = (
    "BG_JOB_ISOLATED_LOOPS",
    "DD_API_KEY",
    "LANGGRAPH_POSTGRES_EXTENSIONS",
    "LANGGRAPH_POSTGRES_POOL_MAX_SIZE",
    "LOG_JSON",
    "REDIS_CLUSTER",
    "REDIS_CONNECT_TIMEOUT",
    "REDIS_MAX_CONNECTIONS",
)
#: Variables of LangGraph's server that stop the start: without effect, data would be in plain text.
REFUSED = ("LANGGRAPH_AES_JSON_KEYS",)
#: Variables of LangGraph's server that have precedence over keys of `langgraph.json`.
OF_THE_PROJECT = ("CORS_CONFIG", "LANGGRAPH_THREAD_TTL", "MOUNT_PREFIX")


def with_own_names(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment with Belay's names for what only LangGraph's names set."""
    own = dict(environ)
    for alias, name in ALIASES.items():
        if environ.get(alias, "").strip() and not own.get(name, "").strip():
            own[name] = environ[alias]
    return own


def alias_in_use(environ: Mapping[str, str], name: str) -> str:
    """Return the variable that sets `name`: an alias, or the name itself."""
    if environ.get(name, "").strip():
        return name
    aliases = [alias for alias, own in ALIASES.items() if own == name]
    return next((alias for alias in aliases if environ.get(alias, "").strip()), name)


def warn_of_ignored(environ: Mapping[str, str]) -> None:
    """Log a warning for each variable that is set and that Belay ignores."""
    for name in IGNORED:
        if environ.get(name, "").strip():
            log.warning("%s is set, but Belay does not support it: it has no effect", name)
