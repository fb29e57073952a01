"""Celery's prefork pool, with child processes that only the supervisor ends."""

from __future__ import annotations

from multiprocessing.process import AuthenticationString  # type: ignore[attr-defined]  # no stub
from typing import Any

from billiard import pool
from billiard.process import current_process
from celery.concurrency import asynpool, prefork

from belay_workers.child import signals


class _ChildMixin:
    def after_fork(self) -> None:
        super().after_fork()  # type: ignore[misc]  # its handlers raise SystemExit inside a node
        signals.do_nothing_at_ending_signals()
        # The pool's children are daemonic, which prevents a node from using `multiprocessing`.
        # Processes that a node starts still end with its run (`Child.run`).
        config = current_process()._config
        config["daemon"] = False
        # `multiprocessing` takes this for its own process, whose key it gives to those it spawns.
        config["authkey"] = AuthenticationString(config["authkey"])


class _ChildWorker(_ChildMixin, asynpool.Worker):
    pass


class _ChildPool(asynpool.AsynPool):
    Worker = _ChildWorker


class _BlockingWorker(_ChildMixin, pool.Worker):
    pass


class _BlockingPool(prefork.BlockingPool):
    """The pool for brokers that Celery cannot use from its event loop."""

    Worker = _BlockingWorker


class ChildTaskPool(prefork.TaskPool):
    """The `worker_pool` of the Celery app."""

    Pool: Any = _ChildPool
    BlockingPool: Any = _BlockingPool
