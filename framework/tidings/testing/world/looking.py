"""What a test sees of a world: the log's events, held events and dead letters, tables, timelines and log lines."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, overload
from uuid import UUID

import structlog

from tidings.errors import ConfigurationError
from tidings.modelling.codec import decode, read_metadata
from tidings.modelling.events import Event, wire_name
from tidings.operations.dead import DeadLetter, DeadLetters
from tidings.operations.held import HeldEntry, HeldOperations
from tidings.operations.report import Report
from tidings.operations.timeline import Timeline, trace
from tidings.operations.verify import verify
from tidings.protocol.position import CARRIED, carried
from tidings.stores import Appended, EventStore, RecordedEvent
from tidings.testing.world.entrance import UNOPENED, check_class, check_service
from tidings.testing.world.seat import Seat
from tidings.testing.world.store import InlineStore

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

    from tidings.service import Service

__all__ = ["Looking", "Sought"]

E = TypeVar("E", bound=Event)

MOST: Final = 1_000_000
"""Held events or dead letters that are returned, at most."""


class Sought(Generic[E]):
    """Events of one class, of one stream, emitted by the handlers of one service, for which something holds."""

    def __init__(
        self, of: type[E] | None, stream: str | None, by: Service | None, where: Callable[[E], bool] | None = None
    ) -> None:
        """Raises `ConfigurationError` for what is no class or no service."""
        if of is not None:
            check_class(of)
        if by is not None:
            check_service("events", by)
        self._of, self._stream, self._by, self._where = of, stream, by, where

    def __str__(self) -> str:
        return "".join(
            (
                "event" if self._of is None else self._of.__name__,
                "" if self._stream is None else f" of stream {self._stream!r}",
                "" if self._by is None else f" by service {self._by.name!r}",
                "" if self._where is None else " for which `where` is true",
            )
        )

    def is_like(self, event: RecordedEvent) -> bool:
        """Whether an event is of this class, stream and service."""
        return (
            (self._of is None or event.type == wire_name(self._of))
            and self._stream in (None, event.stream)
            and (self._by is None or _author(event) == self._by.name)
        )

    def decoded(self, event: RecordedEvent) -> E:
        """Return an event as its class."""
        assert self._of is not None
        return decode(event, self._of, read_metadata(event), reader="this test")

    async def in_log(self, store: EventStore) -> E:
        """Wait until there is one, and return it."""
        async with aclosing(store.subscribe_all(filter=CARRIED)) as log:  # type: ignore[type-var]
            async for event in log:
                if isinstance(event, RecordedEvent) and self.is_like(event):
                    found = self.decoded(event)
                    if self._where is None or self._where(found):
                        return found
        raise RuntimeError("the log ended; this is a bug in Tidings")


class Looking:
    """The part of a `World` that shows what there is, and changes nothing."""

    _store: EventStore

    def __init__(self) -> None:
        super().__init__()
        self._seats: dict[str, Seat] = {}
        self._seen: list[RecordedEvent] = []
        """Events that were read from a real log."""
        self._seeing = asyncio.Lock()
        self._logs: list[dict[str, Any]] = []
        self._outside = UNOPENED
        """Why it does nothing now; empty within its block."""
        self._sessions: dict[str, asyncio.Task[Any] | None] = {}
        """Services on whose databases sessions are open, and the tasks in which they are."""

    def _check_inside(self) -> None:
        """Raise `ConfigurationError` outside the world's block."""
        if self._outside:
            raise ConfigurationError(self._outside)

    def _check_no_session(self, then: str, *, of: Service | None = None) -> None:
        """Raise `ConfigurationError` where the calling task keeps a database to itself, which would be waited for."""
        task = asyncio.current_task()
        for name, owner in self._sessions.items():
            if owner is task and (of is None or of.name == name):
                raise ConfigurationError(
                    f"a session on the database of service {name!r} is open, so the service cannot use it: end the "
                    f"block of world.session({name}) before you {then}"
                )

    @property
    def store(self) -> EventStore:
        """The log."""
        self._check_inside()
        return self._store

    async def verify(self) -> Report:
        """Return how far each service is, without waiting."""
        self._check_inside()
        self._check_no_session("call world.verify()")
        await self._see()
        return await verify(self._store, [(seat.service, seat.database) for seat in self._seats.values()])

    async def _see(self) -> None:
        """Read what is new in a real log, so that `events` need not wait for it."""
        if isinstance(self._store, InlineStore):
            return
        async with self._seeing:
            after = self._seen[-1].position if self._seen else -1
            found = [each async for each in self._store.read_all(after=after, filter=CARRIED)]
            self._seen += [each for each in found if carried(each) is not None]

    @overload
    def events(self, of: type[E], *, stream: str | None = None, by: Service | None = None) -> list[E]: ...
    @overload
    def events(
        self, of: None = None, *, stream: str | None = None, by: Service | None = None
    ) -> list[RecordedEvent]: ...
    def events(
        self, of: type[E] | None = None, *, stream: str | None = None, by: Service | None = None
    ) -> list[E] | list[RecordedEvent]:
        """Return the events in the log, in its order: of one class (as its objects), of one stream, or emitted by the
        handlers of one service."""
        self._check_inside()
        sought = Sought(of, stream, by)
        log = self._store.carried() if isinstance(self._store, InlineStore) else self._seen
        found: list[RecordedEvent] = [event for event in log if sought.is_like(event)]
        return found if of is None else [sought.decoded(event) for event in found]

    def _counted(self) -> str:
        """Say which events the log has."""
        number = Counter(event.type for event in self.events())
        return ", ".join(f"{count} {name}" for name, count in number.items()) or "no events"

    def emitted(self, service: Service) -> list[RecordedEvent]:
        """Return the events in the log that handlers of this service emitted."""
        return self.events(by=service)

    async def held(self, service: Service) -> list[HeldEntry]:
        """Return the held events of a service, the oldest first."""
        database = self._seat(service).database
        self._check_no_session("call world.held()", of=service)
        log_id = await self._store.log_id()
        return await HeldOperations(database, service.name, log_id).list(limit=MOST)

    async def dead(self, service: Service) -> list[DeadLetter]:
        """Return the dead letters of a service, the oldest first."""
        database = self._seat(service).database
        self._check_no_session("call world.dead()", of=service)
        log_id = await self._store.log_id()
        return await DeadLetters(database, service.name, log_id).list(limit=MOST)

    @asynccontextmanager
    async def session(self, service: Service) -> AsyncIterator[AsyncSession]:
        """Enter a session on a service's database. The end of the block commits. Do not wait for the service in it: it
        cannot write meanwhile."""
        from sqlalchemy.ext.asyncio import AsyncSession

        database = self._seat(service).database
        self._check_no_session("enter another", of=service)
        async with (
            database.turn,
            database.transaction() as connection,
            AsyncSession(bind=connection, expire_on_commit=False) as session,
        ):
            self._sessions[service.name] = asyncio.current_task()
            try:
                yield session
                await session.flush()
            finally:
                del self._sessions[service.name]

    async def timeline(self, event: RecordedEvent | Appended | UUID | int) -> Timeline:
        """Return what `tidings why` shows of an event: what the log or `append` returned, an id, or a position."""
        self._check_inside()
        self._check_no_session("call world.timeline()")
        target = event.position if isinstance(event, RecordedEvent | Appended) else event
        return await trace(self._store, [(seat.service, seat.database) for seat in self._seats.values()], target)

    def logs(self, event: str | None = None) -> list[dict[str, Any]]:
        """Return the log lines since the world was opened, or those of one kind, such as "event.held"."""
        return [line for line in self._logs if event in (None, line.get("event"))]

    def _seat(self, service: Service) -> Seat:
        self._check_inside()
        check_service("world", service)
        seat = self._seats.get(service.name)
        if seat is None:
            raise ConfigurationError(
                f"service {service.name!r} is not in this World, which has {', '.join(self._seats) or 'none'}"
            )
        return seat

    def _tap(self, stack: AsyncExitStack) -> None:
        """Keep the log lines of this process."""
        from tidings.logs import configure_by_default

        configured = structlog.is_configured()
        configure_by_default()
        before = structlog.get_config()

        def keep(logger: object, method: str, entry: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
            self._logs.append({"level": method, **structlog.contextvars.get_contextvars(), **entry})
            return entry

        structlog.configure(processors=[keep, *before["processors"]])

        def restore() -> None:
            structlog.configure(**before)
            if not configured:
                structlog.reset_defaults()

        stack.callback(restore)


def _author(event: RecordedEvent) -> str | None:
    """The service whose handler emitted an event."""
    by = read_metadata(event).get("tidingsHandler")
    return by.partition(".")[0] if isinstance(by, str) else None
