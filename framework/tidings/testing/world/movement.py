"""Whether anything in a world moves by itself, and when the next thing happens that is not housekeeping.

While nothing is under way, services and relay still look at this and that each second. Time jumps over these looks, as
if the machine had slept: each of them happens once, after the jump. While `World.advance` passes many timers and
nothing comes of them, they wait for the last jump.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from tidings._support.timers import Timers
from tidings.delivery.pipeline import Pipeline
from tidings.hosting.partition import Partition
from tidings.modelling.context import ATTEMPT
from tidings.relay.relay import Relay
from tidings.testing.world.clock import OWNER, Clock
from tidings.testing.world.seat import USERS, Seat
from tidings.testing.world.store import InlineStore

__all__ = ["Movement", "happens"]

_RING: Final = Timers.later.__qualname__
"""Timers of deliveries: the end of a pause between two attempts, the time of a held event."""


class Movement:
    """Looks at the running objects themselves, without waiting. Only databases know for certain."""

    def __init__(self, seats: Mapping[str, Seat], clock: Clock, relay: Callable[[], Relay | None]) -> None:
        self._seats = seats
        self.store: InlineStore | None = None
        """The log, if it is in memory."""
        self._clock = clock
        self._relay = relay
        self.lull = False
        """Nothing is held, and nothing was written since the last look: the next jump skips these looks altogether."""

    def written(self) -> object:
        """Return how much has been written: a value that changes with every write to the log or to a database."""
        log = None if self.store is None else self.store.written
        return log, *(seat.written for seat in self._seats.values())

    def busy(self) -> bool:
        """Whether a service says that something is under way."""
        return any(part.pipeline is None or part.healing or _holds(part.pipeline) for part in self._parts(frozen=True))

    @property
    def working(self) -> bool:
        """A handler is at work."""
        return any(part.at_work() for part in self._parts(frozen=True))

    def horizon(self, moment: float) -> float:
        """Return the moment to which time may jump: the first at which something happens, if all that is left is to
        wait for it, else `moment`, when the next timer is due."""
        if not all(self._only_waits(part) for part in self._parts()) or not self._published():
            return moment
        found = self._clock.first(happens)
        ends = [work.since + work.handler.timeout for part in self._parts() for work in part.at_work()]
        until = max(moment, min([*ends, *([] if found is None else [found])], default=moment))
        limit = self._clock.limit
        if self.lull and limit is not None and until < limit:
            self._clock.postpone(until - self._clock.time(), lambda timer: not happens(timer))
        return until

    def _parts(self, *, frozen: bool = False) -> Iterator[Partition]:
        for seat in self._seats.values():
            if seat.running is not None and (frozen or not self._clock.is_frozen(seat)):
                yield from seat.running.partitions

    @property
    def _last(self) -> int:
        assert self.store is not None
        return self.store.last_carried

    def _published(self) -> bool:
        relay = self._relay()
        return relay is not None and relay.leading and relay.confirmed >= self._last

    def _only_waits(self, part: Partition) -> bool:
        """Whether everything that this partition is to have is accepted, and is done or waits for time."""
        pipeline, intake = part.pipeline, part.intake
        if pipeline is None or intake is None or part.healing or not part.consuming:
            return False
        stages = pipeline.stages
        if stages.pending.batch or stages.stager or max(pipeline.floor, intake.reached) < self._last:
            return False
        return stages.lanes.under_way == len(pipeline.working) + stages.lanes.resting


def _holds(pipeline: Pipeline) -> bool:
    stages = pipeline.stages
    return bool(stages.lanes.under_way or stages.lanes or stages.pending.batch or stages.stager)


def happens(timer: Any) -> bool:
    """Whether a timer is the test's, a handler's or a lifespan's, or of a delivery; else it is housekeeping."""
    context = timer._context
    mine = context.get(OWNER) is None or context.get(USERS) or context.get(ATTEMPT) is not None
    return bool(mine) or getattr(timer._callback, "__qualname__", "").startswith(_RING)
