"""Attribute asynchronous generators to the runs in which their iteration began.

The garbage collector finalizes a generator in whatever code it interrupts, which may be another
run's. Its `finally` block belongs to the run of the generator all the same.
"""

from __future__ import annotations

import time
from collections import deque
from types import AsyncGeneratorType
from weakref import ref

from belay_workers.host.gated_run import GatedRun

#: Seconds for which the run of an unreachable generator is kept; its finalization follows at once.
_KEPT_SECONDS = 1.0


class Generators:
    """The asynchronous generators of a host's runs."""

    def __init__(self) -> None:
        #: The runs of generators to which nothing refers any longer.
        self._dying: dict[int, tuple[ref[GatedRun], float]] = {}
        #: The keys of these, and when they died, the oldest first.
        self._deaths: deque[tuple[int, float]] = deque()

    def note(self, run: GatedRun, generator: AsyncGeneratorType[object, object]) -> None:
        """Note that the iteration of a generator begins in a run."""
        generators, key, of = run.generators, id(generator), ref(run)

        def die(_: object) -> None:
            generators.pop(key, None)
            died_at = time.monotonic()
            self._dying[key] = of, died_at
            self._deaths.append((key, died_at))

        self._dying.pop(key, None)  # another one that had the same address
        generators[key] = ref(generator, die)
        self._forget_dead()

    def run_of_dying(self, generator: AsyncGeneratorType[object, object]) -> GatedRun | None:
        """Return the run of a generator that is to be finalized, None if it is of no run."""
        run, _ = self._dying.pop(id(generator), (lambda: None, 0))
        return run()

    def _forget_dead(self) -> None:
        """Forget generators that had nothing left to execute. They are not finalized."""
        oldest = time.monotonic() - _KEPT_SECONDS
        while self._deaths and self._deaths[0][1] < oldest:
            key, died_at = self._deaths.popleft()
            if self._dying.get(key, (None, None))[1] == died_at:
                self._dying.pop(key, None)
