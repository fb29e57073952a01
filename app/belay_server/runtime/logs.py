"""Configure the logs of the web process and the worker: lines of text or of JSON.

A record has the fields of its request (`in_request`) or, in a worker's processes, of its run
(`about_run`, `about_run_here`). Headers and bodies are never logged, but exceptions of graphs are,
whose messages may quote an input.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, TextIO

from belay_server.configuration.settings import Settings

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_JSON = "%(levelname)s %(name)s %(message)s"
#: The loggers that `BELAY_LOG_LEVEL` applies to. Libraries log at INFO or above, because some of
#: them log headers at DEBUG.
_OURS = ("belay_server", "belay_workers", "belay")
#: The fields that a line of text shows.
_SHOWN = ("request_id", "run_id", "attempt")

#: Characters of a message or a traceback. Of a longer one, the beginning and the end are logged.
_LONGEST = 20_000
#: Escapes for control characters and line separators.
_VISIBLE = {
    code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
    for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)
}

#: The fields of the run in whose context code is executed, in a process with several runs.
_run_here: ContextVar[Mapping[str, Any] | None] = ContextVar("belay_run_fields", default=None)
_request: ContextVar[Mapping[str, Any] | None] = ContextVar("belay_request", default=None)
#: The fields of a child process's run, for all of its threads. It executes one run at a time.
_run: Mapping[str, Any] | None = None


class Handler(logging.StreamHandler[TextIO]):
    """Writes records to standard error. A failure to write is never raised in the code that
    logs."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (logging's name)
        with suppress(Exception):  # there is nowhere to report it
            super().handleError(record)


def in_request(fields: Mapping[str, Any]) -> None:
    """Add a request's fields to what this greenlet or thread logs from now on.

    The mapping may still change: it is read when a record is made.
    """
    _request.set(fields)


def about_run(fields: Mapping[str, Any] | None) -> None:
    """Add a run's fields to what this process logs from now on. None ends that."""
    global _run  # noqa: PLW0603  (logging is global to the process)
    _run = fields


def about_run_here(fields: Mapping[str, Any] | None) -> None:
    """Add a run's fields to what is logged in the current context. None ends that."""
    _run_here.set(fields)


def configure(settings: Settings, level: int = logging.INFO) -> None:
    """Log to standard error. `level` applies if the settings have no level."""
    if settings.log_level is not None:
        level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    handler = Handler()
    handler.setFormatter(formatter(settings.log_format))
    handler.addFilter(_add_fields)
    handler.addFilter(_shorten)
    logging.basicConfig(level=max(level, logging.INFO), handlers=[handler], force=True)
    for name in _OURS:
        logging.getLogger(name).setLevel(level)
    # It logs the URL of each request that a graph makes, with the query string.
    logging.getLogger("httpx").setLevel(max(level, logging.WARNING))


def formatter(log_format: str) -> logging.Formatter:
    """Return the formatter for `text` or `json`."""
    if log_format == "text":
        return _TextFormatter(_TEXT)
    from pythonjsonlogger.orjson import OrjsonFormatter  # noqa: PLC0415  (only if it is used)

    class JsonFormatter(OrjsonFormatter):
        def formatException(self, ei: Any) -> str:  # noqa: N802  (logging's name)
            return _shortened(logging.Formatter.formatException(self, ei))

    return JsonFormatter(
        _JSON, rename_fields={"levelname": "level", "name": "logger"}, timestamp=True
    )


def _shorten(record: logging.LogRecord) -> bool:
    try:
        message = record.getMessage()
    except Exception:  # noqa: BLE001  (arguments that do not fit: the handler reports it)
        return True
    if len(message) > _LONGEST:
        record.msg, record.args = _shortened(message), ()
    return True


def _shortened(text: str) -> str:
    over = len(text) - _LONGEST
    if over <= 0:
        return text
    half = _LONGEST // 2
    return f"{text[:half]}… ({over} characters left out) …{text[-half:]}"


def _add_fields(record: logging.LogRecord) -> bool:
    for fields in (_request.get(), _run_here.get(), _run):
        for name, value in (fields or {}).items():
            if name not in record.__dict__:  # the record's own fields take precedence
                setattr(record, name, value)
    return True


def without_request_lines(record: logging.LogRecord) -> bool:
    """Remove client data, such as query strings and headers, from gunicorn's own log records.

    A logging filter; always returns True.
    """
    message = record.getMessage()
    if message.startswith(("Invalid request from", "Error handling request")):
        record.msg = message.partition("'")[0].partition("?")[0].rstrip(": ")
        record.args = ()
    elif message.startswith("Socket error processing request"):
        record.msg, record.args = "the client's connection closed before its response was sent", ()
        record.exc_info = record.exc_text = None
    return True


def without_failed_boots(record: logging.LogRecord) -> bool:
    """Drop gunicorn's log records about a process that could not start.

    A logging filter. The process has logged the reason itself, and that line must be the last.
    """
    message = record.getMessage()
    return not (
        message.startswith(("Shutting down: Master", "Reason: Worker failed to boot"))
        or message.endswith("exited with code 3.")
    )


class _TextFormatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's name)
        shown = [f"{name}={record.__dict__[name]}" for name in _SHOWN if name in record.__dict__]
        line = super().formatMessage(record)
        line = f"{line} [{' '.join(shown)}]" if shown else line
        # A message may quote a client. Escape line breaks and a terminal's control sequences.
        return line.translate(_VISIBLE)

    def formatException(self, ei: Any) -> str:  # noqa: N802  (logging's name)
        return _indented(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802  (logging's name)
        return _indented(super().formatStack(stack_info))


def _indented(text: str) -> str:
    """Return an indented traceback, so that no line of it looks like a log record."""
    lines = _shortened(text).split("\n")
    return "\n".join(f"    {line.translate(_VISIBLE)}" for line in lines)
