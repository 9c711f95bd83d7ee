"""The log for a program that is no service: append, load and read, asynchronously or not. It claims no queue."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, AsyncExitStack
from types import TracebackType
from typing import Any, TypeVar

from tidings._support.holding import held
from tidings.adapters import open_store
from tidings.errors import ConfigurationError
from tidings.logs import configure_by_default
from tidings.modelling.aggregate import Aggregate
from tidings.modelling.appending import Appends
from tidings.modelling.codec import decode, read_metadata
from tidings.modelling.events import Event, Registry
from tidings.modelling.repository import HistoryEntry, Repository
from tidings.settings import Settings
from tidings.stores import ANY, Appended, AppendedSeveral, EventStore, Expected, RecordedEvent, StreamAppend

__all__ = ["BlockingLog", "Connecting", "Log", "connect"]

A = TypeVar("A", bound=Aggregate)
T = TypeVar("T")


class Log(Appends):
    """What `async with tidings.connect() as log` gives."""

    def __init__(self, store: EventStore) -> None:
        self.store = store
        """The event store itself: bytes, expected versions, subscriptions."""

    def _appends_to(self) -> EventStore:
        return self.store

    def repository(self, aggregate: type[A]) -> Repository[A]:
        """Aggregates of one kind: `create`, `change`, `load`, `history`."""
        return Repository(aggregate, lambda: self.store)

    async def read(
        self, stream: str, *views: type[Event], start: int = 0, limit: int | None = None
    ) -> AsyncIterator[HistoryEntry]:
        """Yield a stream's events of the types that are given, oldest first, each as its view declares it; other types
        pass by. `start` is a stream version; `limit` bounds what is read. Raises `StreamNotFound`, `SchemaError`, and
        `ConfigurationError` when no type is given."""
        if not views:
            raise ConfigurationError(
                f"log.read({stream!r}) was given no class of events to read: name them, as in "
                f"log.read({stream!r}, OrderPlaced), or use log.recorded({stream!r}) for events of all types as bytes"
            )
        types = Registry(f"reading stream {stream!r}")
        for view in views:
            types.add(view)
        async for event in self.store.read_stream(stream, start=start, limit=limit):
            known = types.get(event.type)
            if known is not None:
                metadata = read_metadata(event)
                typed = decode(event, known, metadata, reader="this program", until="")
                yield HistoryEntry(event.version, event.position, typed, event.recorded_at, metadata)

    async def recorded(self, stream: str, *, start: int = 0, limit: int | None = None) -> AsyncIterator[RecordedEvent]:
        """Yield a stream's events as the log holds them, of all types, oldest first. Raises `StreamNotFound`."""
        async for event in self.store.read_stream(stream, start=start, limit=limit):
            yield event


class BlockingLog:
    """What `with tidings.connect() as log` gives: for code without an event loop, from any number of threads.

    The connection lives in a thread of its own. A process that was forked needs one of its own.
    """

    def __init__(self, log: Log, loop: asyncio.AbstractEventLoop) -> None:
        self._log = log
        self._loop = loop
        self._process = os.getpid()

    def append(
        self,
        stream: str,
        *events: Event,
        expected: Expected = ANY,
        metadata: Mapping[str, Any] | None = None,
        correlation_id: str | None = None,
    ) -> Appended:
        """As `Log.append`; returns when the events are in the log."""
        return self.run(
            lambda log: log.append(stream, *events, expected=expected, metadata=metadata, correlation_id=correlation_id)
        )

    def append_several(
        self,
        *appends: StreamAppend[Event],
        metadata: Mapping[str, Any] | None = None,
        correlation_id: str | None = None,
    ) -> AppendedSeveral:
        """As `Log.append_several`; returns when the events are in the log."""
        return self.run(lambda log: log.append_several(*appends, metadata=metadata, correlation_id=correlation_id))

    def read(self, stream: str, *views: type[Event], start: int = 0, limit: int | None = None) -> list[HistoryEntry]:
        """As `Log.read`, all at once."""

        async def entries(log: Log) -> list[HistoryEntry]:
            return [entry async for entry in log.read(stream, *views, start=start, limit=limit)]

        return self.run(entries)

    def recorded(self, stream: str, *, start: int = 0, limit: int | None = None) -> list[RecordedEvent]:
        """As `Log.recorded`, all at once."""

        async def events(log: Log) -> list[RecordedEvent]:
            return [event async for event in log.recorded(stream, start=start, limit=limit)]

        return self.run(events)

    def run(self, work: Callable[[Log], Awaitable[T]]) -> T:
        """Do anything with the asynchronous log and wait for it: `log.run(lambda log: log.repository(Order).load(id))`.

        Raises `ConfigurationError` after the block, in a forked process, and where an event loop runs, which it would
        block.
        """
        if self._process != os.getpid():
            raise ConfigurationError(
                "this connection was opened before the process was forked: open one in each process"
            )
        if self._loop.is_closed():
            raise ConfigurationError("the connection to the log is closed: use it inside 'with tidings.connect()'")
        if asyncio._get_running_loop() is not None:
            raise ConfigurationError(
                "an event loop runs here, and this would block it: use 'async with tidings.connect() as log' instead"
            )

        async def done() -> T:
            return await work(self._log)

        future = asyncio.run_coroutine_threadsafe(done(), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C, for instance: nobody waits for it any more
            raise


class Connecting:
    """What `tidings.connect()` returns: enter it with `async with`, or with `with` where no event loop runs."""

    def __init__(self, settings: Settings | None) -> None:
        self._settings = settings
        self._stack = AsyncExitStack()
        self._held: AbstractContextManager[tuple[Log, asyncio.AbstractEventLoop]] | None = None

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"tidings.connect() is not entered, so it has no {name!r}: write  with tidings.connect() as log:  or, in "
            "an event loop,  async with tidings.connect() as log:"
        )

    async def __aenter__(self) -> Log:
        configure_by_default()
        settings = self._settings or Settings()
        return Log(await self._stack.enter_async_context(open_store(settings.store)))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def __enter__(self) -> BlockingLog:
        if asyncio._get_running_loop() is not None:
            raise ConfigurationError("an event loop runs here: use 'async with tidings.connect() as log'")
        self._held = held(self, "tidings-log")
        return BlockingLog(*self._held.__enter__())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._held is not None
        self._held.__exit__(kind, error, trace)


def connect(settings: Settings | None = None) -> Connecting:
    """Connect to the log, without being a service: to produce events, from a script or from synchronous code.

    `async with tidings.connect() as log` or `with tidings.connect() as log`. No queue, no database and no relay is
    needed or touched. `settings` are by default those of the environment. Entering raises `StoreUnavailable`.
    """
    return Connecting(settings)
