"""The four services with no runtime between them: a log in a list, and a test that decides who is next, and who dies.

The handlers, their tables and the sandbox gateway are the real ones. What is played here is what the framework
promises: per order in log order, effects once, what is emitted appended after the commit, attempts repeated when a
process dies. So a test can try the interleavings that no load test ever meets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch
from uuid import UUID

from services.inventory import inventory
from services.order import Order, orders
from services.order import service as order_service
from services.payment import payment
from services.payment.gateway import SandboxGateway, open_sandbox
from services.shipping import shipping
from tidings import Context, Event, Repository, Service
from tidings.database.engine import Database, open_database
from tidings.delivery.attempt import Attempt, Attempts
from tidings.delivery.given import Given
from tidings.delivery.owned import Ours
from tidings.delivery.resources import Resources
from tidings.errors import StreamNotFound, WrongExpectedVersion
from tidings.modelling.codec import encode, read_metadata
from tidings.stores import NO_STREAM, Appended, EventData, Expected, RecordedEvent

LOG = UUID("00000000-0000-0000-0000-0000000000aa")


class ListStore:
    """The part of an event store that handlers need."""

    def __init__(self) -> None:
        self.log: list[RecordedEvent] = []

    async def append(self, stream: str, events: Sequence[EventData], *, expected: Expected) -> Appended:
        version = max((event.version for event in self.log if event.stream == stream), default=-1)
        if expected == NO_STREAM:
            expected = -1
        if isinstance(expected, int) and expected != version:
            raise WrongExpectedVersion(stream, f"version {expected}", version)
        for event in events:
            version += 1
            position = len(self.log) + 1
            row = RecordedEvent(
                position, stream, version, event.type, event.data, event.metadata, True, event.id.bytes, position
            )
            self.log.append(row)
        return Appended(version, len(self.log))

    async def read_stream(self, stream: str, *, limit: int | None = None) -> AsyncIterator[RecordedEvent]:
        found = [event for event in self.log if event.stream == stream]
        if not found:
            raise StreamNotFound(stream)
        for event in found[:limit]:
            yield event


@dataclass(slots=True)
class Actor:
    """A service at its place in the log, with the events that it has emitted but not appended."""

    service: Service
    database: Database
    resources: Resources
    position: int = 0
    staged: deque[tuple[str, EventData]] = field(default_factory=deque)


class Died(Exception):
    """Raised when a process dies between the handler's return and the commit."""


class World:
    """The services and the log. Get one from `world()`."""

    def __init__(self, store: ListStore, actors: dict[str, Actor], gateway: SandboxGateway) -> None:
        self.store = store
        self.actors = actors
        self.gateway = gateway
        self.repository = order_service.repository

    async def say(self, stream: str, event: Event) -> None:
        """Append an event from outside."""
        await self._append(stream, encode(event, id=UUID(int=len(self.store.log) + 1)))

    async def handle(self, name: str, *, dies: bool = False) -> bool:
        """Let a service handle its next event, or die in the attempt. Return False if it has nothing to do."""
        actor = self.actors[name]
        if actor.position >= len(self.store.log):
            return False
        event = self.store.log[actor.position]
        for handler in actor.service.handlers_of(event.type):
            context = Context(name, handler.name, LOG, event, read_metadata(event), 1)
            try:
                await self._attempt(actor, context, dies)
            except Died:
                return True
            actor.staged.extend(context.emissions)
        actor.position += 1
        return True

    async def emit(self, name: str) -> bool:
        """Let a service append the oldest event that it has emitted. Return False if there is none."""
        actor = self.actors[name]
        if not actor.staged:
            return False
        await self._append(*actor.staged.popleft())
        return True

    async def run_dry(self) -> None:
        """Let all services work until none has anything left to do."""
        busy = True
        while busy:
            busy = False
            for name in self.actors:
                busy |= await self.handle(name) | await self.emit(name)

    def said(self, key: str) -> list[str]:
        """Return the types of one order's (or sku's) events, in the order of the log."""
        return [event.type for event in self.store.log if read_metadata(event).get("partitionKey") == key]

    async def rows(self, name: str, table: Any) -> list[Any]:
        """Return the rows of a table in a service's database."""
        async with self.actors[name].database.reading() as connection:
            return list(await connection.execute(table.select()))

    async def _append(self, stream: str, data: EventData) -> None:
        version = max((event.version for event in self.store.log if event.stream == stream), default=-1)
        await self.store.append(stream, [data], expected=version)

    async def _attempt(self, actor: Actor, context: Context, dies: bool) -> None:
        handler = actor.service.named[context.handler]
        attempts = Attempts(actor.service, actor.resources, Ours(self.store, None, actor.database))
        async with actor.database.transaction() as connection:
            try:
                Given(context, actor.database.engine).open(connection)  # for `context.session()`
                begun = attempts.begin(handler, context, lambda _: connection)
                failure = await begun.outcome() if isinstance(begun, Attempt) else begun
            finally:
                attempts.close()
            assert failure is None, failure.detail
            if dies:
                raise Died


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    """Open all four services on databases in memory, at the beginning of an empty log."""
    store = ListStore()
    repository = Repository(Order, lambda: store)  # type: ignore[arg-type, return-value]
    async with AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(open_sandbox(":memory:"))
        actors = {}
        for service in (orders, inventory, payment, shipping):
            database = await stack.enter_async_context(open_database("sqlite://", service.tables))
            actors[service.name] = Actor(service, database, Resources(service.name, gateway))
        stack.enter_context(patch.object(order_service, "repository", repository))
        yield World(store, actors, gateway)
