"""One partition of a running service: join, work until fenced or cut off, pause, join again; drain when told to leave.

It knows nothing of the other partitions, which have other buckets, and never of how many processes there are: the bus
gives its queue to one process at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from math import inf
from typing import Final
from uuid import UUID

import structlog

from tidings._support.backoff import Backoff
from tidings._support.tasks import leaves, task_group
from tidings._support.telling import Telling
from tidings.buses import Subscription
from tidings.database.id_keys import keep_keys
from tidings.database.inbox import Inbox
from tidings.database.lineage import lineage_of
from tidings.delivery.attempt import is_infrastructure
from tidings.delivery.catchup import CatchUp
from tidings.delivery.healing import Pass
from tidings.delivery.inflight import InFlight
from tidings.delivery.intake import Intake
from tidings.delivery.pipeline import Pipeline
from tidings.delivery.site import Joined, Site
from tidings.errors import LogBehind
from tidings.hosting.beginning import say_that_it_begins
from tidings.protocol.position import Accepted

__all__ = ["DRAIN_SECONDS", "Partition", "persistently"]

log = structlog.get_logger("tidings.running")

DRAIN_SECONDS: Final = 3.5
"""Seconds that a process may take to stop."""
REFUSED_SECONDS: Final = 600.0
"""Seconds for which a refused message is spoken of."""
REJOIN_SECONDS: Final = (0.1, 5.0)
"""First and longest pause before joining again."""


class Partition:
    """One partition in one process. Its properties describe the membership under way, or the last one."""

    def __init__(self, site: Site, subscription: Subscription, epoch: int, ready: asyncio.Event) -> None:
        """`ready` is set when its queue may be made and consumed."""
        self.subscription = subscription
        self.joined = asyncio.Event()
        """Set after the first join."""
        self.joins = 0
        self.lost: BaseException | None = None
        """What ended the last membership; None where nothing did."""
        self.log_id: UUID | None = None
        self.pipeline: Pipeline | None = None
        self.intake: Intake | None = None
        self._healing: Pass | None = None
        self._site = site
        self._epoch = epoch
        self._ready = ready
        self._clock = site.clock
        self._told = {"service": site.service.name, "queue": subscription.queue}
        self._left = asyncio.Event()
        """Set when the partition is left for good."""
        self._leave = asyncio.Event()
        """The membership under way is to end."""
        self._patience = 0.0

    @property
    def floor(self) -> int:
        """Everything up to here is settled in its buckets, as far as this process knows; -1 before the first join."""
        return self.pipeline.floor if self.pipeline else -1

    @property
    def healing(self) -> bool:
        """A pass over the log is under way."""
        return self._healing is not None and self._healing.under_way

    @property
    def marker_age(self) -> float | None:
        """Seconds since the last marker on this connection to the bus; None before the first."""
        heard = self.intake.pulse.marker_at if self.intake else None
        return None if heard is None else self._clock() - heard

    @property
    def stranger(self) -> UUID | None:
        """Another log, whose relay publishes on this bus and was heard since the last marker of ours."""
        pulse = self.intake.pulse if self.intake else None
        if pulse is None or pulse.stranger_at is None or pulse.stranger_at < (pulse.marker_at or -inf):
            return None
        return pulse.stranger

    @property
    def refused(self) -> str | None:
        """How many messages were refused as none of this log's relay, and the last of them; None where none came
        lately."""
        pulse = self.intake.pulse if self.intake else None
        if pulse is None or pulse.refused_at is None or self._clock() - pulse.refused_at > REFUSED_SECONDS:
            return None
        return f"{pulse.refused} messages were refused; the last: {pulse.refusal}"

    @property
    def marker(self) -> int:
        """The position up to which the last marker says that everything was published; -1 before the first."""
        return self.intake.pulse.marker if self.intake else -1

    @property
    def consuming(self) -> bool:
        """Connected to the bus, at work or standing by."""
        return self.intake is not None and self.intake.pulse.connected

    @property
    def heard_age(self) -> float | None:
        """Seconds since the bus brought something new; None before that."""
        heard = self.intake.pulse.news.at if self.intake else None
        return None if heard is None else self._clock() - heard

    @property
    def came_age(self) -> float | None:
        """Seconds since the bus brought anything, new or not; None before that."""
        came = self.intake.pulse.news.came_at if self.intake else None
        return None if came is None else self._clock() - came

    @property
    def heard_upto(self) -> int:
        """The highest position that a message has named, or that was accepted before the connection."""
        return self.intake.pulse.news.furthest if self.intake else -1

    @property
    def read_age(self) -> float | None:
        """Seconds since it last had the log read because nothing new came; None while news comes."""
        read_at = self.intake.own_clock.read_at if self.intake else None
        return None if read_at is None else self._clock() - read_at

    @property
    def moves(self) -> int:
        """A number that changes whenever anything moves."""
        pipeline, intake = self.pipeline, self.intake
        if pipeline is None or intake is None:
            return self.joins
        return self.joins + pipeline.moves + pipeline.floor + intake.pulse.heard + intake.reached

    def at_work(self) -> list[InFlight]:
        """Handlers at work now."""
        return self.pipeline.working if self.pipeline else []

    def leave(self, seconds: float) -> None:
        """Begin nothing new; `serve` returns when what runs has ended, or after `seconds` seconds."""
        self._left.set()
        self._patience = seconds
        self._leave.set()

    def give_up(self) -> None:
        """Let another process have it: end what runs, however long that honestly takes, and wait in line again."""
        if not self._leave.is_set():
            self._patience = max((handler.timeout for handler in self._site.service.named.values()), default=0.0)
            self._patience += DRAIN_SECONDS
            self._leave.set()

    async def serve(self) -> None:
        """Run until it is to leave. Raises what no waiting mends: another log, a log that went back, settings."""
        await persistently(self._membership, self._left, self._clock, self._lost, **self._told)

    def _lost(self, error: BaseException) -> None:
        self.lost = error

    async def _membership(self, telling: Telling) -> None:
        """From joining to the first loss of what was joined, or to leaving it."""
        site, subscription = self._site, self.subscription
        service = site.service
        self._leave.clear()
        lineage = await lineage_of(site.store)
        self.log_id = log_id = lineage.log
        inbox = Inbox(site.database, service.name, log_id, subscription.buckets, epoch=self._epoch)
        remembered = await inbox.join()
        await keep_keys(site.database, service.name, site.trust.ids)
        head = await site.store.head()
        if remembered.highest > head:
            raise LogBehind(f"service {service.name!r}", log_id, head, remembered.highest)
        if remembered.highest < 0 and not self.joins and not subscription.buckets.start:
            await say_that_it_begins(service.name, site.store, site.database, log_id, subscription.queue)
        accepted = Accepted(subscription.buckets, remembered.floor, remembered.watermarks)
        joined = Joined.of(site, inbox, lineage)
        self.pipeline = pipeline = Pipeline(joined, remembered)
        admission, takeover = pipeline.admission, pipeline.takeover
        self._healing = healing = Pass(site, accepted, admission)
        catching_up = CatchUp(site, accepted, admission, takeover, pipeline.roster, pipeline.breakers)
        self.intake = intake = Intake(subscription, joined, accepted, pipeline, healing, head)
        self.joins += 1
        log.info("service.joined", log=str(log_id), floor=remembered.floor, joins=self.joins, **self._told)
        telling.seems_over("service.rejoined", **self._told)
        async with task_group() as tasks:
            working = tasks.create_task(pipeline.run())
            reading = tasks.create_task(healing.run())
            catching = tasks.create_task(catching_up.run())
            taking = tasks.create_task(self._take(intake))
            self.joined.set()
            await self._leave.wait()
            # The connection stays open meanwhile, and with it the place in line: nobody else begins before this ends.
            intake.hold()
            reading.cancel()
            catching.cancel()
            await pipeline.drain(self._patience)
            # It says that it ended cleanly before another process is given the queue, which looks for that.
            working.cancel()
            await asyncio.wait([working])
            taking.cancel()
        log.info("service.stopped" if self._left.is_set() else "service.gave_up", floor=pipeline.floor, **self._told)

    async def _take(self, intake: Intake) -> None:
        await self._ready.wait()
        await intake.run()


async def persistently(
    membership: Callable[[Telling], Awaitable[None]],
    stop: asyncio.Event,
    clock: Callable[[], float],
    lost: Callable[[BaseException], None] | None = None,
    **told: str,
) -> None:
    """Run one membership after the other until `stop` is set, with growing pauses while they fail for what waiting may
    heal. A membership that has begun says so to its argument. Raises any other error, out of any group."""
    backoff, telling = Backoff(*REJOIN_SECONDS), Telling(log, clock)
    while not stop.is_set():
        began = clock()
        try:
            await membership(telling)
            backoff.reset()
        except Exception as error:
            causes = list(leaves(error))
            strange = [cause for cause in causes if not is_infrastructure(cause)]
            if strange:
                raise strange[0] from None
            if clock() - began > REJOIN_SECONDS[1]:
                backoff.reset()
            if lost is not None:
                lost(causes[0])
            telling.failed("service.rejoining", causes[0], pause=backoff.pause, **told)
        await backoff.wait(until=stop)
