"""Who is at work on a bucket range, and what it has begun, so that an event that ends the process is found out.

The decisions are those of `tidings.delivery.crashes`; here they meet the database and the notebook. It runs no handler.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import structlog

from tidings.database.engine import Database
from tidings.database.inbox import Inbox
from tidings.database.notebook import Notebook, notebook_of
from tidings.delivery.commits import FULL
from tidings.delivery.crashes import Caution
from tidings.delivery.work import Item, Troubles

if TYPE_CHECKING:
    from tidings.modelling.declaration import Declaration

__all__ = ["Guard"]

log = structlog.get_logger("tidings.dispatch")

LOOK_SECONDS: Final = 0.01
"""Seconds until what waits for others to end, or for a commit, looks again."""


class Guard:
    """Of one dispatcher. What `caution` wants to be noted is given to it first; `run` notes it, and gives it out."""

    def __init__(
        self,
        service: Declaration,
        database: Database,
        inbox: Inbox,
        troubles: Troubles,
        clock: Callable[[], float],
        give_out: Callable[[Item], None],
    ) -> None:
        self._service = service
        self._database = database
        self._inbox = inbox
        self._troubles = troubles
        self._give_out = give_out
        self._waiting: list[Item] = []
        self._some = asyncio.Event()
        self._turn = asyncio.Lock()
        """Taking over reads the notes while none is being written."""
        self.notebook = Notebook(None, 0)
        """Told of each attempt's begin and end."""
        self.caution = troubles.cautions.setdefault(inbox.buckets, Caution(clock))
        self.caution.cut_off()

    # ---- taking over and leaving

    async def take_over(self) -> list[int]:
        """This process is at work on the range from now on. Returns positions whose notes were written again and
        are not needed any more. Raises `DatabaseUnavailable`, and `Fenced` when a replay sent the service back since
        it joined, or another process is at it too."""
        if self.notebook.open:
            self.notebook.keep()
        else:
            self.notebook = Notebook(self._notebook_of(self._troubles.process), self._service.concurrency + 1)
        caution, inbox, me = self.caution, self._inbox, self._troubles.process
        async with self._turn:
            besides = caution.own
            async with self._database.turn, self._database.transaction() as connection:
                await inbox.watermarks.fence(connection)
                before = await inbox.occupancy.take(connection, me)
                notes = await inbox.notes.read(connection, self._service.names)
                # A takeover whose commit was cut off has marked the range, and nobody has looked at what it found.
                unclean, under_way = before is not None and (before != me or not caution.informed), None
                fresh: dict[int, tuple[int, int]] = {}
                if unclean:
                    under_way = None if before == me else Notebook.read(self._notebook_of(str(before)))
                    fresh = {at: (bucket, 1) for at, bucket in (under_way or {}).items() if at not in notes}
                else:
                    if before == me:
                        await inbox.notes.count(connection, caution.rejoined(notes))
                    mine = caution.known | besides if before == me else besides
                    await inbox.notes.forget(connection, notes.keys() - mine)
                again = {at: note for at, note in caution.noted.items() if at not in notes}
                await inbox.notes.add(connection, fresh | again)
            if unclean:
                if before != me:
                    Notebook.discard(self._notebook_of(str(before)))
                self._suspect(notes | dict.fromkeys(fresh, 1), besides, blind=under_way is None)
            elif before is None:
                caution.forgotten()
        return [at for at in again if at not in caution.noted]

    def _suspect(self, notes: dict[int, int], besides: frozenset[int], *, blind: bool) -> None:
        condemned = self.caution.begin(notes, int(FULL * self._service.prefetch), blind=blind, besides=besides)
        self._troubles.bury({position: (failure, notes[position]) for position, failure in condemned.items()})
        log.warning(
            "service.unclean_end_found",
            service=self._service.name,
            suspected=sorted(self.caution.suspects),
            condemned=sorted(condemned),
            reason="the process that was at work before ended without a word, or has lost its connection to the bus; "
            "if an event crashes the process, it will be found",
        )

    async def leave(self) -> None:
        """This was a clean end, also of what was cut off in the middle. Raises `DatabaseUnavailable`."""
        async with self._database.turn, self._database.transaction() as connection:
            await self._inbox.leave(connection, self._troubles.process)

    def _notebook_of(self, process: str) -> str | None:
        return notebook_of(self._database.file, process, self._inbox.buckets.start)

    # ---- noting

    def __len__(self) -> int:
        """Events that wait to be noted."""
        return len(self._waiting)

    def give(self, item: Item) -> None:
        """Note it, then give it out."""
        self.caution.taken(item.event.position, item.bucket)
        self._waiting.append(item)
        self._some.set()

    def take_back(self) -> int:
        """Forget what waits to be noted, and say how many that were."""
        number = len(self._waiting)
        self._waiting.clear()
        return number

    async def run(self, busy: Callable[[], int]) -> None:
        """Until cancelled. `busy` says how many events are at work, or wait for their commit. Raises
        `DatabaseUnavailable`, and `Fenced` when another process has taken the range over."""
        while True:
            await self._some.wait()
            self._some.clear()
            while self._waiting:
                async with self._turn:
                    group = self._next(busy)
                    await self._note(group)
                for item in group:
                    self._give_out(item)
                if not group:
                    await asyncio.sleep(LOOK_SECONDS)

    def _next(self, busy: Callable[[], int]) -> list[Item]:
        """Those that are noted now, taken out of what waits."""
        waiting = {item.event.position: item for item in self._waiting}
        positions = self.caution.group(waiting)
        if not positions or (busy() and self.caution.patience(positions[0])):
            return []
        group = [waiting[position] for position in positions]
        self._waiting = [item for item in self._waiting if item not in group]
        return group

    async def _note(self, group: list[Item]) -> None:
        if group:
            async with self._database.turn, self._database.transaction() as connection:
                await self._inbox.occupancy.lock(connection, self._troubles.process)
                notes = {item.event.position: self.caution.note(item.event.position) for item in group}
                await self._inbox.notes.add(connection, notes)
