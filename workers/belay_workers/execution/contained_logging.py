"""Keep code of a run from breaking the log and the standard streams of its process.

The next runs of the process use them, too, and so does Belay when it ends a run: an exception in a
log handler there would leave the run without an end until its lease expires.
"""

from __future__ import annotations

import io
import logging
import sys
from functools import wraps

from belay_server.runtime import logs

log = logging.getLogger(__name__)


class _OpenStream(io.TextIOWrapper):
    """Standard output or standard error, which is not closed."""

    mode = "w"

    def close(self) -> None:
        self.flush()


def keep_streams_open() -> None:
    """Replace `sys.stdout` and `sys.stderr` by streams to the same files that cannot be closed."""
    for name in ("stdout", "stderr"):
        present = getattr(sys, name)
        if type(present) is io.TextIOWrapper:
            present.flush()
            setattr(sys, name, _of_same_file(present))


def _of_same_file(stream: io.TextIOWrapper) -> _OpenStream:
    return _OpenStream(
        stream.buffer,
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def contain_log_handlers() -> None:
    """Keep the exceptions of log handlers from the code that logs. Belay's handler logs them."""
    call_handlers = logging.Logger.callHandlers
    belays = [one for one in logging.getLogger().handlers if isinstance(one, logs.Handler)]

    @wraps(call_handlers)
    def contained(logger: logging.Logger, record: logging.LogRecord) -> None:
        try:
            call_handlers(logger, record)
        except (Exception, SystemExit, KeyboardInterrupt) as error:  # noqa: BLE001
            for handler in belays:
                handler.handle(_failure_of(error, record))

    logging.Logger.callHandlers = contained  # type: ignore[assignment,method-assign]


def _failure_of(error: BaseException, record: logging.LogRecord) -> logging.LogRecord:
    """Return a record about an exception of a handler. Only its type is used: the methods of an
    exception may raise."""
    given = (type(error).__name__, record.levelname, record.name)
    message = "a log handler raised %s, for a record with level %s of logger %s"
    return log.makeRecord(log.name, logging.WARNING, "", 0, message, given, None)
