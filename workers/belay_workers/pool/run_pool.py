"""Celery's pool of a worker: it hands the doorbells of runs to child processes and hosts.

A child executes one run at a time. Children are forked when they are needed, up to the worker's
concurrency, and one is kept ready for the next run. Others that have been idle for a minute end,
unless runs have left work in them.

A host executes many runs at once (`host/`), those of the graphs that share hosts (`placement.py`).
Their doorbells come from queues of their own (`broker.py`). A run that a host does not claim,
because its graph does not share hosts here, is given to a child.

All of this happens on one thread: that of Celery's event loop or, for a broker that Celery cannot
read from an event loop, the pool's own.
"""

from __future__ import annotations

import json
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any
from uuid import UUID

from celery.concurrency.base import BasePool
from celery.worker import state

from belay_server.doorbell import RUN_TASK, is_hosted_queue
from belay_workers.background_thread import BackgroundThread
from belay_workers.child.serving import serve
from belay_workers.host.serving import serve as serve_host
from belay_workers.pool.child_process import ChildProcess, Message
from belay_workers.pool.host_process import HostProcess
from belay_workers.pool.zygote import CHILD, HOST, Zygote
from belay_workers.supervision import processes

log = logging.getLogger(__name__)

#: With so many runs in each host, another one is forked.
_RUNS_OF_A_HOST = 32
#: Children that wait for a run beside those that have one.
_READY_CHILDREN = 1
_IDLE_SECONDS = 60.0
_LOOK_SECONDS = 1.0
#: The time limit for a child's start, and how many may fail before the first one succeeds.
_START_SECONDS = 60.0
_MOST_FAILED_STARTS = 5
#: Exit code of a worker for which a restart does not help.
_CANNOT_START = 3


_Process = ChildProcess | HostProcess


class RunPool(BasePool):
    """The `worker_pool` of the Celery app. It executes `limit` runs at once at most."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._zygote: Zygote
        self._children: list[ChildProcess] = []
        self._hosts: list[HostProcess] = []
        #: The messages for children, and those that a host is to try first.
        self._messages: deque[Message] = deque()
        self._for_hosts: deque[Message] = deque()
        self._hub: Any = None
        self._fork_at = 0.0
        #: Starts that have failed before any child was ready; None once one was.
        self._failed_starts: int | None = 0
        #: Used where there is no event loop of Celery's.
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._stopping = threading.Event()
        self._has_ended = False
        self._thread: BackgroundThread | None = None

    def _new_zygote(self) -> Zygote:
        app = self.app
        bodies = {CHILD: partial(serve, app), HOST: partial(serve_host, app)}
        zygote = Zygote(app.child_signals, bodies, app.slots.pids)
        app.orphans.keep(zygote.pid)
        return zygote

    # -- called by Celery -------------------------------------------------------------------------

    def on_start(self) -> None:
        # The supervisor starts after the pool. Loading the graphs may have taken longer than the
        # guardian leaves children unsupervised.
        self.app.slots.note_supervised()
        self._zygote = self._new_zygote()
        self._grow()
        if self.options["threads"]:
            self._thread = BackgroundThread("pool", self._run, self._stopping)
            self._thread.start()

    def register_with_event_loop(self, hub: Any) -> None:
        """Watch the children from Celery's event loop, which is made anew after errors."""
        self._hub = hub
        for process in self._processes():
            self._watch(process)
        hub.call_repeatedly(_LOOK_SECONDS, self.maintain_pool)

    def on_apply(
        self,
        _target: Any,
        args: tuple[Any, ...],
        _kwargs: Any,
        *,
        callback: Callable[[Any], None],
        accept_callback: Callable[[int, float], None],
        **_: Any,
    ) -> None:
        """Take a message. `args` are those of Celery's tracer, which the pool does not use: the
        name of the task, its id, its request, and its body."""

        def accepted(pid: int) -> None:
            accept_callback(pid, time.monotonic())

        def done() -> None:
            callback((0, None, 0.0))  # the three parts of Celery's result: it has not failed

        run_id = _run_id_of(args[0], args[3])
        if run_id is None:
            accepted(os.getpid())
            done()
            return
        wanted = self._for_hosts if self._is_for_hosts(args[2]) else self._messages
        wanted.append(Message(run_id, accepted, done))
        if self._thread is None:
            self._dispatch()
        else:
            self._wake()

    def takes(self, *, hosted: bool) -> bool:
        """Return whether there is a place for one more run, of a graph that shares hosts or of
        another."""
        if self._hosted_limit and (hosted or not self.app.needs_children):
            return len(self._for_hosts) < self._hosted_room
        runs = len(self._messages) + sum(child.message is not None for child in self._children)
        return bool(runs < self.limit - self._hosted_limit)

    def _is_for_hosts(self, request: Mapping[str, Any]) -> bool:
        """Return whether hosts get the run of a message first. `request` is Celery's."""
        if not self.app.placement.shared_graphs:
            return False
        queue = request.get("delivery_info", {}).get("routing_key") or ""
        return is_hosted_queue(queue) or not self.app.needs_children

    def maintain_pool(self, *_: Any) -> None:
        """Replace a dead zygote and dead children, and end children that are idle or stuck."""
        if self._thread is None:
            self._maintain()
        else:
            self._wake()

    def grow(self, n: int = 1) -> None:
        """Execute `n` more runs at once: for Celery's `--autoscale`."""
        self.limit += n

    def shrink(self, n: int = 1) -> None:
        """Execute `n` fewer runs at once."""
        self.limit -= n

    def on_stop(self) -> None:
        """End all children. Those with a run have been ended by then (`Supervisor.drain`)."""
        self._stopping.set()
        self._wake()
        if self._thread is not None:
            self._thread.join(_LOOK_SECONDS)
        for process in self._processes():
            self._disconnect(process)
        self.end_children()

    on_terminate = on_stop

    def end_children(self) -> None:
        """End the zygote and its children, without Celery's event loop. The guardian must not be
        stopped before."""
        if not self._has_ended:
            self._has_ended = True
            self._zygote.stop()

    # -- its thread, where there is no event loop of Celery's --------------------------------------

    def _run(self) -> None:
        while not self._stopping.is_set():
            poller = select.poll()
            poller.register(self._wake_read, select.POLLIN)
            watched: dict[int, _Process] = {
                one.fileno(): one for one in self._processes() if one.fileno() != -1
            }
            for descriptor in watched:
                poller.register(descriptor, select.POLLIN)
            for descriptor, _event in poller.poll(_LOOK_SECONDS * 1000):
                if descriptor in watched:
                    self._receive(watched[descriptor])
            with suppress(BlockingIOError):
                os.read(self._wake_read, 4096)
            self._maintain()

    def _wake(self) -> None:
        with suppress(BlockingIOError):
            os.write(self._wake_write, b"!")

    # -- children ---------------------------------------------------------------------------------

    def _maintain(self) -> None:
        if self._zygote.has_died():
            self._replace_zygote()
        self._forget_dead()
        self._look_for_stopped_hosts()
        self._end_idle()
        self._end_stuck()
        self._dispatch()

    def _receive(self, process: _Process) -> None:
        if process.receive():
            if not process.is_starting:
                self._failed_starts = None
            if isinstance(process, HostProcess):
                self._try_in_children(process.take_declined())
            self._dispatch()
            return
        if process.is_starting:
            self._start_has_failed()
        self._disconnect(process)
        self._forget_dead()

    def _try_in_children(self, declined: list[Message]) -> None:
        """Let children claim the runs that a host could not: they may be of other graphs."""
        for message in declined:
            if self.app.needs_children:
                self._messages.append(replace(message, is_second=True))
            else:
                message.done()

    def _start_has_failed(self) -> None:
        """Wait a second before the next fork. End the worker if no child has ever started."""
        log.error("a child process ended at its start; forking another in a second")
        self._fork_at = time.monotonic() + _LOOK_SECONDS
        if self._failed_starts is not None:
            self._failed_starts += 1
            if self._failed_starts >= _MOST_FAILED_STARTS:
                log.error("no child process can start; ending this worker")
                state.should_stop = _CANNOT_START

    def _dispatch(self) -> None:
        """Give the waiting messages to idle children, and fork what is missing.

        The child whose last run ended latest gets the next one, so that others can end.
        """
        self._dispatch_to_hosts()
        idle = self._idle()
        while self._messages and idle:
            child = idle.pop()
            message = self._messages[0]
            if child.pid is None or not child.give(message):
                self._disconnect(child)
                continue
            self._messages.popleft()
            if not message.is_second:
                message.accepted(child.pid)
        self._grow()

    def _processes(self) -> list[_Process]:
        return [*self._children, *self._hosts]

    def _dispatch_to_hosts(self) -> None:
        """Give the waiting messages to the hosts with the fewest runs."""
        room = self._hosted_room
        if room <= 0 and self.app.needs_children:
            self._messages += self._for_hosts  # a child can execute runs of all graphs
            self._for_hosts.clear()
        while self._for_hosts and room > 0:
            ready = [host for host in self._hosts if host.takes_runs]
            if not ready:
                return
            host = min(ready, key=lambda host: host.load)
            message = self._for_hosts[0]
            if host.pid is None or not host.give(message):
                self._disconnect(host)
                continue
            self._for_hosts.popleft()
            room -= 1
            if not message.is_second:
                message.accepted(host.pid)

    @property
    def _hosted_limit(self) -> int:
        return self.app.placement.hosted_of(self.limit)  # type: ignore[no-any-return]

    @property
    def _hosted_room(self) -> int:
        """How many more runs hosts may be given."""
        return self._hosted_limit - sum(host.load for host in self._hosts)

    def _idle(self) -> list[ChildProcess]:
        """Return the idle children, that which has been idle for longest first."""
        idle = [child for child in self._children if child.is_idle]
        return sorted(idle, key=lambda child: child.idle_since)

    def _grow(self) -> None:
        """Request forks until each waiting message has an idle or starting child, and one more is
        ready."""
        if self.app.slots.draining or time.monotonic() < self._fork_at:
            return
        if self._wants_host():
            self._fork_host()
        if not self.app.needs_children:
            return
        free = sum(child.is_idle or child.is_starting for child in self._children)
        wanted = len(self._messages) + _READY_CHILDREN - free
        room = self.limit - self._hosted_limit - len(self._children)
        for _ in range(min(wanted, room)):
            try:
                child = ChildProcess(self._zygote.fork(CHILD))
            except OSError:  # it has died; replaced by the next look
                return
            self._children.append(child)
            self._watch(child)

    def _wants_host(self) -> bool:
        """Return whether another host is needed: all that take runs have many, or none does."""
        if not self.app.placement.hosts or any(host.is_starting for host in self._hosts):
            return False
        able = [host for host in self._hosts if host.takes_runs]
        is_full = all(host.load >= _RUNS_OF_A_HOST for host in able)
        return is_full and len(able) < self.app.placement.hosts

    def _fork_host(self) -> None:
        with suppress(OSError):  # the zygote has died; replaced by the next look
            host = HostProcess(self._zygote.fork(HOST))
            self._hosts.append(host)
            self._watch(host)

    def _look_for_stopped_hosts(self) -> None:
        """Note which hosts a signal has stopped: they are given no runs."""
        for host in self._hosts:
            host.is_stopped = host.pid is not None and processes.is_stopped(host.pid)

    def _end_idle(self) -> None:
        """End the child that has been idle for longest, if others are idle, too, and worn hosts."""
        for host in self._hosts:
            if host.is_worn and not host.load:
                self._disconnect(host)
        idle = [child for child in self._idle() if not child.has_work]
        if len(idle) > _READY_CHILDREN and idle[0].idle_since < time.monotonic() - _IDLE_SECONDS:
            self._disconnect(idle[0])

    def _end_stuck(self) -> None:
        """Kill processes that have not started within a minute."""
        for one in self._processes():
            is_late = one.started_at < time.monotonic() - _START_SECONDS
            if one.is_starting and is_late and one.pid is not None:
                log.error("child process %d has not started in time; killing it", one.pid)
                processes.kill_tree(one.pid)
                self._start_has_failed()
                self._disconnect(one)

    def _watch(self, process: _Process) -> None:
        if self._hub is not None and process.fileno() != -1:
            self._hub.add_reader(process.fileno(), partial(self._receive, process))

    def _disconnect(self, process: _Process) -> None:
        if self._hub is not None and process.fileno() != -1:
            self._hub.remove_reader(process.fileno())
        process.close()

    def _forget_dead(self) -> None:
        """Forget the processes that have ended.

        A run is over when the supervisor has freed the dead child's slot: what its node had
        started is dead then, and the run has been handed over for recovery.
        """
        in_use = set(self.app.slots.pids())
        for child in list(self._children):
            if child.fileno() == -1 and child.pid not in in_use:
                self._children.remove(child)
                _reap(child.pid)
                message = child.message
                if message is not None and not message.is_second:
                    # The row decides: if the run was claimed, this does nothing.
                    self._messages.appendleft(replace(message, is_second=True))
                else:
                    child.done()
        for host in list(self._hosts):
            if host.fileno() == -1 and host.pid not in in_use:
                self._hosts.remove(host)
                _reap(host.pid)
                for message in host.outstanding():
                    if message.is_second:
                        message.done()
                    else:  # the row decides, as above
                        self._for_hosts.appendleft(replace(message, is_second=True))

    def _replace_zygote(self) -> None:
        """Start another zygote. The children of the first are killed, as the kernel has stopped
        them (`processes.stop_when_parent_dies`). Their runs are recovered like those of any child
        that dies."""
        log.error("the process that forks this worker's children has ended; starting it again")
        for pid in self.app.slots.pids():
            processes.kill_tree(pid)
        for process in self._processes():
            if process.is_starting:
                self._disconnect(process)
        self._zygote = self._new_zygote()


def _run_id_of(task: str, body: str | bytes) -> UUID | None:
    """Return the run of a doorbell. None for a ping, whose receipt is all that counts, and for a
    message that Belay has not sent."""
    if task != RUN_TASK:
        return None
    try:
        positional, *_ = json.loads(body)
        return UUID(positional[0])
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        log.warning("ignored a message on the queue that is not a doorbell: %r", error)
        return None


def _reap(pid: int | None) -> None:
    """Have the kernel forget a dead child whose zygote has died, too: it is the parent's then."""
    if pid is not None:
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
