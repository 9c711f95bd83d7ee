"""The embedded store in memory, without its threads: what is asked of it is done in the loop, at once and in order.

Its rules are those of `tidings.stores.sqlite`, which it is; only who runs it differs.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar, cast

from tidings.protocol.position import CARRIED, carried
from tidings.stores import APPEND_LIMIT, RecordedEvent
from tidings.stores.sqlite.log import Database
from tidings.stores.sqlite.store import Log, SqliteStore
from tidings.stores.sqlite.writer import Appender, Member, Outcome, Write

__all__ = ["InlineStore"]

P = ParamSpec("P")
T = TypeVar("T")


class _Writer:
    """In the place of the thread that writes."""

    def __init__(self, database: Database, appender: Appender) -> None:
        self._database = database
        self._appender = appender
        self._members: dict[Member, None] = {}

    def join(self, member: Member) -> int:
        self._members[member] = None
        return self._appender.head

    def submit(self, writes: list[Write]) -> None:
        outcomes = list(zip(writes, self._appender.commit(writes), strict=True))
        for member in list(self._members):
            member.settled([pair for pair in outcomes if pair[0].member is member], self._appender.head)

    def watch(self, more: int) -> None:
        """Nobody else appends."""

    def leave(self, member: Member, *, last: bool) -> None:
        del self._members[member]
        if last:
            self._database.close()
        member.left()

    def wait(self) -> None:
        """No thread is to be waited for."""


class _Log(Log):
    def __init__(self, clock: Callable[[], int]) -> None:
        self.database = Database(None, 0.0)
        self.clock = clock
        self.limit = APPEND_LIMIT
        self.users = 1
        self.writer = _Writer(self.database, Appender(self.database, clock))  # type: ignore[assignment]


class InlineStore(SqliteStore):
    """A new, empty log. `clock` gives ticks of 100 ns since 1970."""

    def __init__(self, clock: Callable[[], int]) -> None:
        super().__init__(_Log(clock), None)
        self._seen, self._last_carried = -1, -1

    async def look(
        self, job: Callable[Concatenate[sqlite3.Connection, P], T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        self._check_usable()
        return self._log.database.read(job, *args, **kwargs)

    def settled(self, outcomes: list[tuple[Write, Outcome]], head: int) -> None:
        self._settle(outcomes, head)

    def left(self) -> None:
        self._closed.set()

    @property
    def written(self) -> int:
        """How many rows have been written, from the first on."""
        return self._log.database.read(lambda connection: connection.total_changes)

    @property
    def last_carried(self) -> int:
        """Position of the last event that is carried to services; -1 before the first."""
        if self.heard > self._seen:
            found = self.carried(self._seen)
            self._seen = self.heard
            if found:
                self._last_carried = found[-1].position
        return self._last_carried

    def carried(self, after: int = -1) -> list[RecordedEvent]:
        """Return the events above a position that are carried to services, without waiting."""

        async def read() -> list[RecordedEvent]:
            return [event async for event in self.read_all(after=after, filter=CARRIED) if carried(event) is not None]

        try:
            read().send(None)
        except StopIteration as done:
            return cast("list[RecordedEvent]", done.value)
        raise RuntimeError("the inline store waited for something; this is a bug in Tidings")
