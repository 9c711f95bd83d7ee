"""A service in memory on which single attempts of its handlers run. The attempt, its injection and its transaction are
the production code; nothing else of a running service is there."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

from sqlalchemy import Executable
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.adapters import open_bus, open_store
from tidings.database.engine import Database, connected
from tidings.delivery.attempt import Attempt, Attempts
from tidings.delivery.failure import RAISED, Failure
from tidings.delivery.given import Given
from tidings.delivery.owned import Ours
from tidings.delivery.resources import Resources
from tidings.delivery.savepoint import GroupBroken, in_savepoint, roll_back
from tidings.errors import ConfigurationError
from tidings.hosting.running import RunningService
from tidings.modelling.events import Event, wire_name
from tidings.modelling.handlers import Handler, Inject
from tidings.protocol.position import CARRIED
from tidings.service import Service
from tidings.stores import EventStore, RecordedEvent
from tidings.testing.replaced import asked_for
from tidings.testing.scenario.context import RecordingContext
from tidings.testing.scenario.stating import Raw, data_of
from tidings.testing.world import threads
from tidings.testing.world.blocking import Blocked
from tidings.testing.world.threads import Threads, place_of, words_of

__all__ = ["Stage", "stage_of"]

_NUMBERS: Final = itertools.count(1)
LIFESPAN: float = 60.0
"""Seconds that a lifespan may take to begin."""


class Stage:
    """The service, its log and its database."""

    def __init__(self, service: Service, running: RunningService, attempts: Attempts) -> None:
        self.service = service
        self.store: EventStore = running.store
        self.database: Database = running.database
        self._attempts = attempts
        self._handled = -1
        """Position up to which the service has handled the log."""

    async def execute(self, statement: Executable) -> None:
        """Execute a statement in the service's database."""
        async with self.database.transaction() as connection:
            await connection.execute(statement)

    async def append(self, stream: str, event: Event | Raw, metadata: Mapping[str, Any] | None = None) -> RecordedEvent:
        """Append an event and return it as the log holds it."""
        done = await self.store.append(stream, [data_of(event, metadata)])
        return await anext(aiter(self.store.read_all(after=done.position - 1, limit=1)))

    async def catch_up(self) -> None:
        """Let the service handle everything in the log, and what it emits itself. A handler's exception passes
        through."""
        behind = True
        while behind:
            rows = await self.after(self._handled)
            behind = bool(rows)
            for row in rows:
                for handler in self.service.handlers_of(row.type):
                    context, error = await self.attempt(handler, row)
                    if error is not None:
                        error.add_note(f"handler {handler.name!r} raised this for {context.event.type}, which is given")
                        raise error
                self._handled = row.position

    async def after(self, position: int) -> list[RecordedEvent]:
        """Return the events of applications after a position."""
        return [row async for row in self.store.read_all(after=position, filter=CARRIED)]

    async def attempt(
        self, handler: Handler, event: RecordedEvent, attempt: int = 1, replayed: bool = False
    ) -> tuple[RecordingContext, BaseException | None]:
        """Run one attempt. If it succeeds, its effects are committed, and then its emitted events appended. Return its
        context and what it raised."""
        context = RecordingContext(
            event,
            service=self.service.name,
            handler=handler.name,
            log=await self.store.log_id(),
            attempt=attempt,
            replayed=replayed,
            was=handler.was,
        )
        raised = list[BaseException]()
        token = RAISED.set(raised)
        try:
            failure = await self._run(handler, context)
        except GroupBroken as broken:  # it ended the transaction that its effects are part of
            error = broken.__cause__ or broken
            return context, raised[-1] if raised else error
        finally:
            RAISED.reset(token)
        if failure is not None:
            return context, raised[-1]
        for emission in context.emissions:
            await self.store.append(emission.stream, [emission.event])
        return context, None

    async def _run(self, handler: Handler, context: RecordingContext) -> Failure | None:
        async def run(provide: Callable[[Inject], Any]) -> Failure | None:
            begun = self._attempts.begin(handler, context, provide)
            return await _outcome(begun, handler, context) if isinstance(begun, Attempt) else begun

        if not handler.transactional:
            return await self._late(context, run)
        async with self.database.turn, self.database.transaction() as connection:
            await _begin(connection)
            given = Given(context, self.database.engine)
            return await in_savepoint(connection, given, handler, lambda: run(given.provide))

    async def _late(
        self, context: RecordingContext, run: Callable[[Callable[[Inject], Any]], Awaitable[Failure | None]]
    ) -> Failure | None:
        """Run a handler that may enter `context.session()`: the transaction begins there."""
        begun = list[AsyncConnection]()
        async with AsyncExitStack() as stack:

            async def begin() -> AsyncConnection:
                await stack.enter_async_context(self.database.turn)
                begun.append(await stack.enter_async_context(self.database.transaction()))
                await _begin(begun[0])
                given.open(begun[0])
                return begun[0]

            given = Given(context, self.database.engine, begin)
            failure = await run(_nothing)
            if failure is not None and begun:
                await roll_back(begun[0])
        return failure


async def _outcome(begun: Attempt, handler: Handler, context: RecordingContext) -> Failure | None:
    """Wait until an attempt ends. Raises `Blocked` for a thread that goes on long after the handler's time."""
    if not handler.threaded:
        return await begun.outcome()
    ending = asyncio.create_task(begun.outcome())
    try:
        while not ending.done():
            await asyncio.wait((ending,), timeout=handler.timeout + threads.OVER)
            place = None if ending.done() else place_of(handler, context.position)
            if place is not None and not place.debugged:
                raise Blocked(words_of(handler, f"service {context.service}", place))
        return ending.result()
    finally:
        ending.cancel()


def _nothing(wanted: Inject) -> Any:
    raise AssertionError(f"{wanted} is not for a handler outside a transaction")


async def _begin(connection: AsyncConnection) -> None:
    """Begin the transaction before the handler's savepoint: drivers begin with the first statement."""
    await connection.exec_driver_sql("SELECT 1")


class _Replaced(Resources):
    """What the lifespan yielded, and what a test gives instead, by the type that handlers ask for."""

    def __init__(self, service: str, yielded: Any, instead: Mapping[type, Any]) -> None:
        super().__init__(service, yielded)
        self._found.update(instead)


@asynccontextmanager
async def stage_of(service: Service, instead: Mapping[type, Any]) -> AsyncIterator[Stage]:
    """Open a service on an empty log and an empty database, both in memory.

    `instead` replaces resources of the service's lifespan by type. The lifespan is entered unless everything that
    handlers ask for is replaced.
    """
    number = next(_NUMBERS)
    async with AsyncExitStack() as stack:
        stack.enter_context(service.claimed())
        store = await stack.enter_async_context(open_store(f"memory://given-{number}"))
        bus = await stack.enter_async_context(open_bus(f"memory://given-{number}"))
        database = await stack.enter_async_context(connected("sqlite:///:memory:"))
        if service.tables is not None:
            async with database.transaction() as connection:
                await connection.run_sync(service.tables.create_all)
        running = RunningService(service, store, bus, database)
        stack.enter_context(service.bound_to(running))
        yielded = None
        if service.resources is not None and not asked_for([service]).keys() <= instead.keys():
            limit = asyncio.timeout(LIFESPAN)
            try:
                async with limit:
                    yielded = await stack.enter_async_context(service.resources(service))
            except TimeoutError as error:
                if not limit.expired():
                    raise
                raise ConfigurationError(
                    f"the lifespan of service {service.name!r} has not begun after {LIFESPAN:g} s. If a test does not "
                    "need what it opens, give what handlers ask for: handling(..., resources={Gateway: FakeGateway()})"
                ) from error
        running.resources = _Replaced(service.name, yielded, instead)
        workers = Threads()
        stack.callback(workers.close)
        attempts = Attempts(service, running.resources, Ours(store, bus, database), threads=workers)
        attempts.open()
        stack.callback(attempts.close)
        yield Stage(service, running, attempts)


def view_of(kinds: Sequence[type[Event]], wire: str) -> type[Event] | None:
    """Return the first of these classes that has the wire name."""
    return next((kind for kind in kinds if wire_name(kind) == wire), None)
