"""The gate: may an event begin? What is condemned, skipped or passed over by a replay ends here; what may end the
process is noted first. What its key or its handler's breaker blocks is known only when it would begin: `hindrances`.

It runs no handler, and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from tidings.database.replays import Replay
from tidings.delivery.guard import Guard
from tidings.delivery.inflight import InFlight, Role
from tidings.delivery.runners import Runners
from tidings.delivery.site import Joined
from tidings.delivery.verdicts import Verdicts

__all__ = ["Gate"]


class Gate:
    """Takes what comes out of the lanes; gives it to the guard, to the runners, or straight to the verdicts."""

    def __init__(self, joined: Joined, guard: Guard, runners: Runners, verdicts: Verdicts, replay: Replay) -> None:
        self._memory = joined.site.memory
        self.caution = joined.caution
        self._guard = guard
        self._runners = runners
        self._verdicts = verdicts
        self.replay = replay

    def shut(self) -> float:
        """Seconds until an event may be taken, 0 for now."""
        caution = self.caution
        return caution.holds() if caution.alert else 0.0

    def take(self, item: InFlight) -> None:
        """One event out of its lane."""
        memory, caution, concurrent = self._memory, self.caution, self._runners.concurrent
        if concurrent is not None and concurrent.take(item):
            return
        if item.replayed and self._is_passed_over(item):
            self._verdicts.passed_over(item)
        elif memory.condemned and item.turn in memory.condemned:
            self._verdicts.failed(item, memory.condemned[item.turn])
        elif memory.crashed and (crash := memory.crash(item)) is not None:
            failure, times = crash
            memory.attempts[item.turn] = times - 1
            self._verdicts.failed(item, failure)
        elif caution.alert and caution.wants(*item.turn):
            self._guard.give(item)
        else:
            self._runners.give(item)

    def take_all(self, items: Sequence[InFlight]) -> None:
        """As `take` of each, while `caution` is not alert: there is nothing to decide about most of them."""
        memory, runners = self._memory, self._runners
        careful = runners.concurrent is not None or memory.condemned or memory.crashed
        if careful or any(item.replayed for item in items):
            for item in items:
                self.take(item)
        else:
            runners.give_all(items)

    def _is_passed_over(self, item: InFlight) -> bool:
        """A replay does not run it: its handler is not to be run again, or a held row will run it."""
        if item.role >= Role.AGAIN:
            return False
        return not item.handler.replay or item.role is Role.END or item.turn in self.replay.waiting
