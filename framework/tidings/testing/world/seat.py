"""The place of one service in a world: its process, which may die and be started again, and what outlives it."""

from __future__ import annotations

import asyncio
import inspect
import sqlite3
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, cast

from tidings.database.engine import Database
from tidings.delivery.attempt import HANDLER_TASK
from tidings.delivery.site import Witness
from tidings.errors import ConfigurationError
from tidings.hosting.hosted import HOST
from tidings.hosting.running import RunningService
from tidings.hosting.surroundings import SURROUNDINGS, Surroundings
from tidings.settings import Settings
from tidings.testing.world.clock import OWNER, USERS
from tidings.testing.world.condition import Condition
from tidings.testing.world.databases import in_memory
from tidings.testing.world.lines import KILLED, Line

if TYPE_CHECKING:
    from tidings.modelling.declaration import Declaration
    from tidings.service import Service

__all__ = ["Seat", "end_deaf"]


LIFESPAN: float = 60.0
"""Seconds that a lifespan may take to begin, and to end: virtual ones, unless it waits for something outside the event
loop."""


class Seat:
    """One service. Its database is in memory, and stays when its process dies."""

    def __init__(self, service: Service, settings: Settings, line: Line) -> None:
        self.service = service
        self.settings = settings
        self.line = line
        self.running: RunningService | None = None
        self.died: BaseException | None = None
        """What ended its process, if nobody meant it to."""
        self.condition = Condition()
        """What was done to it."""
        self._database: Database | None = None
        self._connections: list[sqlite3.Connection] = []
        self._stack = AsyncExitStack()
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"service {self.service.name}"

    @property
    def database(self) -> Database:
        """Its database, once it was opened."""
        assert self._database is not None, f"{self} has not been opened"
        return self._database

    @property
    def written(self) -> tuple[int, ...]:
        """How many rows each connection to its database has written."""
        return tuple(connection.total_changes for connection in self._connections)

    async def open(self) -> None:
        """Open its database."""
        self._database = database = await self._stack.enter_async_context(in_memory(self.service.tables))
        self._connections = database.connections

    async def start(self, clock: Callable[[], float], resources: Mapping[type, Any], witness: Witness) -> None:
        """Start its process. Raises what keeps it from starting."""
        started: asyncio.Future[RunningService] = asyncio.get_running_loop().create_future()
        self._stop = asyncio.Event()
        self.died = None
        around = Surroundings(clock, self._lend, resources, witness, lambda: self._entering(started))
        task = asyncio.create_task(self._live(around, started), name=f"{self}")
        self._task = task
        try:
            await asyncio.wait((task, started), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait((task,))
            raise
        try:
            if started.done():
                self.running = started.result()
            else:
                await task
        except Exception as error:
            self._task = None
            task.cancel()
            await asyncio.wait((task,))
            error.add_note(
                f"service {self.service.name!r} could not start in this World. If its lifespan opens what a test does "
                "not need, give what handlers ask for: World(..., resources={Gateway: FakeGateway()})"
            )
            raise

    async def _live(self, around: Surroundings, started: asyncio.Future[RunningService]) -> None:
        OWNER.set(self)
        HOST.set(None)
        SURROUNDINGS.set(around)
        async with self.service.running(self.settings, store=self.line.store, bus=self.line.bus) as running:
            started.set_result(running)
            await self._stop.wait()

    @contextmanager
    def _entering(self, started: asyncio.Future[RunningService]) -> Iterator[None]:
        """While the lifespan begins: what it starts is the user's, and it must not wait for ever."""

        def late() -> None:
            if not started.done():
                started.set_exception(self.hangs("begin"))

        token = USERS.set(True)
        timer = asyncio.get_running_loop().call_later(LIFESPAN, late)
        try:
            yield
        finally:
            timer.cancel()
            USERS.reset(token)

    def hangs(self, what: str) -> ConfigurationError:
        code = getattr(inspect.unwrap(self.service.resources or self.hangs), "__code__", None)
        where = "" if code is None else f", {code.co_qualname} ({code.co_filename}, line {code.co_firstlineno}),"
        return ConfigurationError(
            f"the lifespan of service {self.service.name!r}{where} does not {what}: for {LIFESPAN:g} s it has waited "
            "for something that has not come. Give that wait a limit of its own"
        )

    @asynccontextmanager
    async def _lend(self, service: Declaration) -> AsyncIterator[Database]:
        yield self.database

    async def stop(self) -> None:
        """End its process as SIGTERM does. Raises what it died of, if that is so."""
        task, self._task, self.running = self._task, None, None
        if task is not None:
            self._stop.set()
            ended, _ = await asyncio.wait((task,), timeout=LIFESPAN)
            if not ended:
                task.cancel()
                await asyncio.wait((task,))
                raise self.hangs("end")
            if not task.cancelled():
                task.result()

    @property
    def starting(self) -> bool:
        """Its process has begun, and is not ready yet."""
        return self.running is None and self._task is not None and not self._task.done()

    @property
    def ended(self) -> BaseException | None:
        """What its process died of by itself; None while it lives."""
        task = self._task
        return task.exception() if task is not None and task.done() and not task.cancelled() else None

    def kill(self) -> asyncio.Task[None] | None:
        """End its process as SIGKILL does: nothing that it has not committed stays. Return a task to wait for; None if
        there is no process."""
        task, self._task, self.running = self._task, None, None
        if task is None:
            return None
        self.line.break_(KILLED, f"{self} was killed")
        for connection in self._connections:
            with suppress(sqlite3.ProgrammingError):
                connection.rollback()
                connection.set_authorizer(_deny)
        task.cancel()
        return task

    def bury(self) -> None:
        """Let a new process use the line and the database."""
        for connection in self._connections:
            connection.rollback()
            connection.set_authorizer(None)
        self.line.mend(KILLED)

    async def close(self) -> None:
        """Close its database."""
        await self._stack.aclose()


async def end_deaf() -> None:
    """End handlers that have caught each cancellation, so that the event loop can close."""
    deaf = [task for task in asyncio.all_tasks() if task.get_name().startswith(HANDLER_TASK)]
    for task in deaf:
        with suppress(RuntimeError):  # it ignores this, too
            cast("Coroutine[Any, Any, Any]", task.get_coro()).close()
        task.cancel()
    if deaf:
        ended, _ = await asyncio.wait(deaf, timeout=LIFESPAN)
        for task in ended:
            if not task.cancelled():
                task.exception()


def _deny(action: int, *asked: object) -> int:
    return sqlite3.SQLITE_DENY if action in _WRITES else sqlite3.SQLITE_OK


_WRITES: Final = (sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE)
