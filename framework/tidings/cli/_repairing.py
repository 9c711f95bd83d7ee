"""Carries out `tidings verify --repair`, and tells what it does. What is settled is never run again.

First it mends the relay's checkpoint. Then it appends staged events. Then every service that is behind reads the log:
over a network, one marker makes the running processes do that; embedded, the services run in this process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Final
from uuid import UUID

from tidings.adapters import open_bus
from tidings.buses import EventBus, Subscription
from tidings.errors import StreamDeleted, Unroutable
from tidings.operations.checking import opened_to_look
from tidings.operations.looking import existing_database, existing_store
from tidings.settings import Settings
from tidings.stores import EventStore

if TYPE_CHECKING:
    from tidings.database.engine import Database
    from tidings.modelling.declaration import Declaration
    from tidings.operations.report import Report, ServiceReport
    from tidings.operations.verify import Baseline
    from tidings.service import Service

__all__ = ["Repair"]

LOOK_SECONDS: Final = 0.25
"""Seconds between two looks at the progress of healing, at least; three times as long as a look takes, if more."""


class Repair:
    """A repair of services. `say` is called with a text for each thing that was done, or that somebody must do."""

    def __init__(
        self,
        settings: Settings,
        services: Sequence[Service],
        relay: str,
        seconds: float,
        say: Callable[[str], None],
        *,
        strict: bool = False,
    ) -> None:
        """With `strict`, events that come during the repair must be settled at its end, too."""
        self._settings = settings
        self._services = services
        self._relay = relay
        self._say = say
        self._strict = strict
        self._baseline: Baseline | None = None
        self._deadline = asyncio.get_running_loop().time() + seconds

    async def run(self, report: Report) -> Report:
        """Repair what a report names, until everything healable is settled or time is up; return a new report.

        Raises `StoreUnavailable`, `DatabaseUnavailable`, `BusUnavailable`.
        """
        if report.ok:
            self._say("nothing to repair")
            return report
        if not self._strict:
            from tidings.operations.verify import baseline_of

            async with self._looking() as (store, pairs):
                self._baseline = await baseline_of(store, pairs)
        await self._mend_checkpoint(report)
        if any(part.healable for part in report.services):
            if self._settings.embedded_bus:
                await self._run_here(report)
            else:
                await self._reach_others(report)
        async with self._looking() as (store, pairs):
            after = await self._look(store, pairs)
        for part in after.services:
            self._leave(part)
        return after

    async def _mend_checkpoint(self, report: Report) -> None:
        from tidings.operations.repair import move_checkpoint

        if report.relay is None or report.relay.ok:
            return
        async with existing_store(self._settings) as store:
            try:
                moved = await move_checkpoint(store, report)
            except StreamDeleted:
                self._say(f"relay {self._relay}: no checkpoint can be stored for it; give the relay another --name")
                return
        self._say(
            f"relay {self._relay}: its checkpoint is {moved} now. It publishes what follows again, which changes "
            "nothing. A running relay still has the old checkpoint: start it again"
        )

    def _leave(self, part: ServiceReport) -> None:
        """Tell what is not settled, and why."""
        if part.beyond >= 0:
            self._say(f"{part.service}: not repaired: it has settled more than this log holds; see above what to do")
        elif part.healable:
            self._say(
                f"{part.service}: not settled yet: {part.pending_count} pending, {part.staged_count} staged. The "
                "repair goes on by itself; if the numbers do not fall, the service's log says why"
            )
        elif part.held_count and part.held_due is None:
            self._say(
                f"{part.service}: {part.held_count} held events wait behind dead letters of their keys, or for a "
                "handler that is not in this code ('tidings held list' says which): mend the handler or bring it back, "
                "then 'tidings dead retry', or 'tidings dead drop'"
            )
        elif part.held_count:
            self._say(f"{part.service}: {part.held_count} held events run when they are due; nothing needs repair")

    # ---- embedded --------------------------------------------------------------------

    async def _run_here(self, report: Report) -> None:
        from tidings.hosting.runtime import Runtime

        chosen = []
        for service, part in zip(self._services, report.services, strict=True):
            why = await self._taken(service, report.log)
            if part.astray:
                continue
            if why is None:
                chosen.append(service)
            elif part.healable:
                self._say(f"{service.name}: not run here: {why}")
        if not chosen:
            return
        async with Runtime(*chosen, settings=self._settings, relay=self._relay) as runtime:
            await self._until(runtime.verify, lambda now: not any(part.healable for part in now.services))
        self._say(f"ran {', '.join(service.name for service in chosen)} here, because no other process does")

    async def _taken(self, service: Service, log: UUID) -> str | None:
        """Return why the service cannot run in this process, because another one may be running it; None if it can."""
        from tidings._support.holders import open_elsewhere
        from tidings.database.engine import file_of
        from tidings.database.layout import ranges_of

        url = self._settings.database_of(service.name)
        file = file_of(url)
        if file == "":
            return "its database is in the memory of its own process: start that one"
        if file is not None and not file.startswith("file:"):
            other = open_elsewhere(file)
            if other is not None:
                return f"process {other} has its database open. Let it work; if it does not, stop it and repair again"
            return None
        async with existing_database(self._settings, service.name) as database:
            if database is None:
                return None
            async with database.reading() as connection:
                if not any(part.active for part in await ranges_of(connection, service.name, log)):
                    return None
        return "a process is at work on it, or has ended without recording that: start it again where it ran"

    # ---- over a network --------------------------------------------------------------

    async def _reach_others(self, report: Report) -> None:
        from tidings.operations.repair import append_staged, publish_marker
        from tidings.operations.verify import last_carried

        async with self._looking() as (store, pairs), open_bus(self._settings.bus) as bus:
            for (service, database), part in zip(pairs, report.services, strict=True):
                if part.staged_count and database is not None and part.beyond < 0:
                    count, refused = await append_staged(
                        store, database, service.name, report.log, seconds=self._remaining
                    )
                    self._say(f"{service.name}: appended {count} staged events")
                    for why in refused:
                        self._say(f"{service.name}: cannot be appended, becomes a dead letter at the next start: {why}")
            position = await last_carried(store)
            try:
                await publish_marker(bus, report.log, position, self._settings.seal)
            except Unroutable:
                self._say(
                    "no service has a queue on this bus: start the services, and each reads from the log what it lacks"
                )
                return
            self._say(f"published a marker: every service that is behind position {position} reads the log up to it")
            idle = await self._idle(bus, pairs, report)
            await self._until(
                lambda: self._look(store, pairs),
                lambda now: not any(part.healable and part.service not in idle for part in now.services),
            )

    async def _idle(
        self, bus: EventBus, pairs: Sequence[tuple[Declaration, Database | None]], report: Report
    ) -> set[str]:
        """Return services that need healing, and have a queue that is missing or has no consumer."""
        idle = set()
        for (service, database), part in zip(pairs, report.services, strict=True):
            if not part.healable:
                continue
            wanted = await _subscriptions(service.name, database)
            found = {thing.name: thing for thing in await bus.inspect(wanted)}
            missing = [one.queue for one in wanted if one.queue not in found or found[one.queue].state == "missing"]
            unheard = [one.queue for one in wanted if one.queue in found and found[one.queue].consumers == 0]
            if missing:
                self._say(
                    f"{service.name}: has no queue {', '.join(missing)}; start it, and it reads from the log what it "
                    "lacks"
                )
            elif unheard:
                self._say(
                    f"{service.name}: no process of it is running; the marker waits in queue {', '.join(unheard)}: "
                    "start it"
                )
            if missing or unheard:
                idle.add(service.name)
        return idle

    # ---- looking ---------------------------------------------------------------------

    def _looking(self) -> AbstractAsyncContextManager[tuple[EventStore, list[tuple[Declaration, Database | None]]]]:
        return opened_to_look(self._settings, self._services)

    async def _look(self, store: EventStore, pairs: Sequence[tuple[Declaration, Database | None]]) -> Report:
        from tidings.operations.verify import verify

        return await verify(store, pairs, relay=self._relay, baseline=self._baseline)

    @property
    def _remaining(self) -> float:
        return max(self._deadline - asyncio.get_running_loop().time(), 0.0)

    async def _until(self, look: Callable[[], Awaitable[Report]], healed: Callable[[Report], bool]) -> None:
        """Verify until the report is healed, or time is up."""
        clock = asyncio.get_running_loop().time
        while True:
            began = clock()
            if healed(await look()) or clock() >= self._deadline:
                return
            # The more is pending, the more a look costs: leave most of the time to the processes that do the work.
            await asyncio.sleep(min(max(LOOK_SECONDS, 3 * (clock() - began)), self._remaining))


async def _subscriptions(service: str, database: Database | None) -> list[Subscription]:
    """Return the subscriptions of all partitions of a service."""
    from tidings.database.layout import layout_of

    if database is None:
        return [Subscription(service)]
    async with database.reading() as connection:
        layout = await layout_of(connection, service)
    return [Subscription(service)] if layout is None else layout.subscriptions
