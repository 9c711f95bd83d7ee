"""Whether anything in a world moves by itself, and when the next thing happens that is not housekeeping.

While nothing is under way, services and relay still look at this and that each second. Time jumps over these looks, as
if the machine had slept: each of them happens once, after the jump. While `World.advance` passes many timers and
nothing comes of them, they wait for the last jump.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from tidings._support.timers import Timers
from tidings.delivery.inflight import InFlight
from tidings.delivery.pipeline import Pipeline
from tidings.hosting.partition import Partition
from tidings.modelling.context import ATTEMPT
from tidings.relay.relay import Relay
from tidings.testing.world import threads
from tidings.testing.world.blocking import Blocked
from tidings.testing.world.clock import OWNER, USERS
from tidings.testing.world.seat import Seat
from tidings.testing.world.store import InlineStore
from tidings.testing.world.threads import Place, Threads, place_of, words_of

__all__ = ["Movement", "happens"]

_RING: Final = Timers.later.__qualname__
"""Timers of deliveries: the end of a pause between two attempts, the time of a held event."""
DEAF: Final = 600.0
"""Seconds that an async handler may go on after its timeout, in which it waits for its transaction, too."""


class Movement:
    """Looks at the running objects themselves, without waiting. Only databases know for certain."""

    def __init__(
        self, seats: Mapping[str, Seat], clock: Any, workers: Threads, relay: Callable[[], Relay | None]
    ) -> None:
        self._seats = seats
        self._threads = workers
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

    def stuck(self) -> list[tuple[Seat, InFlight, Place]]:
        """Return the plain handlers that are long over their time, and where their threads stand."""
        found = []
        for seat in self._seats.values():
            for work in seat.running.at_work() if seat.running is not None else ():
                if work.handler.threaded and self._clock.time() - work.since > work.handler.timeout + threads.OVER:
                    place = place_of(work.handler, work.event.position)
                    if (
                        place is not None
                        and not place.debugged
                        and self._threads.seconds_of(place.thread) > threads.OVER
                    ):
                        found.append((seat, work, place))
        return found

    def check_handlers(self) -> None:
        """Raise `Blocked` if a handler goes on long after its time: in a thread, or in spite of being cancelled."""
        for seat, work, place in self.stuck():
            raise Blocked(f"{words_of(work.handler, str(seat), place)} ({work.event.type} {work.event.id})")
        for seat, work in self._deaf():
            raise Blocked(
                f"handler {work.handler.name!r} of {seat} is still at work on {work.event.type} {work.event.id}, "
                f"{DEAF:g} s after its timeout of {work.handler.timeout:g} s: it catches each CancelledError and goes "
                "on, so nothing can end it, in production neither. Let CancelledError pass through"
            )

    def _deaf(self) -> list[tuple[Seat, InFlight]]:
        return [
            (seat, work)
            for seat in self._seats.values()
            for work in (seat.running.at_work() if seat.running is not None else ())
            if not work.handler.threaded and self._clock.time() - work.since > work.handler.timeout + DEAF
            if not self._clock.is_frozen(seat)
        ]

    def awaits_outside(self) -> bool:
        """Whether a handler, or a process that starts, may be waiting for what happens outside the event loop."""
        if any(seat.starting for seat in self._seats.values()):
            return True
        at_work = [work for part in self._parts(frozen=True) for work in part.at_work()]
        return len(at_work) > len(self.stuck())

    def horizon(self, moment: float) -> float:
        """Return the moment to which time may jump: the first at which something happens, if all that is left is to
        wait for it, else `moment`, when the next timer is due."""
        if not all(self._only_waits(part) for part in self._parts()) or not self._published():
            return moment
        found = self._clock.first(happens)
        ends = [work.since + work.handler.timeout for part in self._parts() for work in part.at_work()]
        ends = [end for end in ends if end > self._clock.time()]  # a thread may go on after its time
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
