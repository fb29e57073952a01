"""The Celery app: `celery -A belay_workers worker`. The app is the only global.

The worker's parent process loads the graphs before the pool forks, so children start warm
(`parent.prepare`), then starts its background threads (`parent.BackgroundStep`). `pool.run_pool`
forks the children, whose body is `child.serving`.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

from celery import signals
from celery.concurrency import get_implementation
from celery.platforms import SecurityWarning

from belay_server.configuration.settings import SettingsError
from belay_server.runtime import logs, startup_gc  # noqa: F401  (startup_gc disables garbage collection)
from belay_workers import parent
from belay_workers.application import make_app, refuse_to_start
from belay_workers.broker import Doorbells

app = make_app()
app.steps["worker"].add(parent.BackgroundStep)
app.steps["consumer"].add(Doorbells)
# Celery warns about running as root because of pickle; messages here are JSON with one run id.
warnings.filterwarnings("ignore", category=SecurityWarning)


@signals.setup_logging.connect
def _configure_logging(loglevel: Any = None, **_: Any) -> None:
    """Log Celery's records and Belay's to standard error, in the same format."""
    logs.configure(app.settings, loglevel if isinstance(loglevel, int) else logging.INFO)
    # The supervisor kills children on purpose and logs the reason; Celery's tracebacks of lost
    # messages add no information.
    logging.getLogger("celery.worker.request").setLevel(logging.CRITICAL)
    logging.getLogger("celery.app.trace").setLevel(logging.ERROR)
    logging.getLogger("celery.worker.strategy").setLevel(logging.WARNING)


@signals.worker_init.connect
def _prepare_parent(sender: Any = None, **_: Any) -> None:
    if get_implementation(sender.pool_cls) is not get_implementation(app.conf.worker_pool):
        refuse_to_start(SettingsError("only Belay's own pool executes runs: omit --pool"))
    sender.concurrency = parent.prepare(app, sender.concurrency)


@signals.worker_shutting_down.connect
def _take_no_more(**_: Any) -> None:
    """Claim no more runs, from the first SIGTERM on, before Celery closes anything."""
    app.slots.start_draining()
