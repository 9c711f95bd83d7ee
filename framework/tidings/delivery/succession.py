"""The succession of processes at work on a bucket range: take it over, find out how the last one ended, leave it.

The decisions are those of `tidings.delivery.crashes`; here they meet the database and the notebook. It runs no handler.
"""

from __future__ import annotations

import asyncio
from typing import Final

import structlog

from tidings.database.notebook import Notebook, notebook_of
from tidings.delivery.limits import FULL
from tidings.delivery.site import Joined
from tidings.errors import Fenced

__all__ = ["Succession"]

log = structlog.get_logger("tidings.delivery")


class Succession:
    """This process's place in the succession, for one bucket range that it has joined."""

    def __init__(self, joined: Joined) -> None:
        self._joined = joined
        self._database = joined.site.database
        self._memory = joined.site.memory
        self.turn: Final = asyncio.Lock()
        """Taking over reads the notes while none is being written."""
        self.notebook = Notebook(None, 0)
        """Told of each attempt's begin and end."""
        self.caution = joined.caution

    async def take_over(self, *, unless_at_work: bool = False) -> list[int]:
        """This process is at work on the range from now on. Returns positions whose notes were written again and
        are not needed any more. Raises `DatabaseUnavailable`, and `Fenced` when a replay sent the service back since
        it joined, or another process is at it too. `unless_at_work`: the bus has not chosen this process, so it raises
        `Fenced` if another one is noted as being at work."""
        service = self._joined.site.service
        if self.notebook.open:
            self.notebook.keep()
        else:
            at_once = service.concurrency * (2 if self._database.width else 1) + 1
            self.notebook = Notebook(self._notebook_of(self._joined.site.process), at_once)
        caution, inbox, me = self.caution, self._joined.inbox, self._joined.site.process
        async with self.turn:
            besides = caution.notes.own
            async with self._database.turn, self._database.transaction() as connection:
                await inbox.watermarks.fence(connection)
                before = await inbox.occupancy.take(connection, me)
                if unless_at_work and before not in (None, me):
                    raise Fenced(f"service {service.name!r}: another process has begun to read the log; joining again")
                notes = await inbox.notes.read(connection, service.names)
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
                again = {at: note for at, note in caution.notes.noted.items() if at not in notes}
                await inbox.notes.add(connection, fresh | again)
            if unclean:
                if before != me:
                    Notebook.discard(self._notebook_of(str(before)))
                self._suspect(notes | dict.fromkeys(fresh, 1), besides, blind=under_way is None)
            elif before is None:
                caution.forgotten()
        return [at for at in again if at not in caution.notes.noted]

    def _suspect(self, notes: dict[int, int], besides: frozenset[int], *, blind: bool) -> None:
        service = self._joined.site.service
        condemned = self.caution.begin(notes, int(FULL * service.prefetch), blind=blind, besides=besides)
        self._memory.bury({position: (failure, notes[position]) for position, failure in condemned.items()})
        log.warning(
            "service.unclean_end_found",
            service=service.name,
            suspected=sorted(self.caution.suspects),
            condemned=sorted(condemned),
            reason="the process that was at work before ended without a word, or has lost its connection to the bus; "
            "if an event crashes the process, it will be found",
        )

    async def leave(self) -> None:
        """This was a clean end, also of what was cut off in the middle. Raises `DatabaseUnavailable`."""
        async with self._database.turn, self._database.transaction() as connection:
            await self._joined.inbox.leave(connection, self._joined.site.process)

    def _notebook_of(self, process: str) -> str | None:
        return notebook_of(self._database.file, process, self._joined.inbox.buckets.start)
