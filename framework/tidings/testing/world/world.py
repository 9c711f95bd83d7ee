"""`World`: services with the production relay and delivery, on a log, bus and databases in memory, in virtual time."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, Self, TypeVar, overload

from tidings._support.only_async import OnlyAsync
from tidings.buses.memory import MemoryBus
from tidings.database.layout import lay_out
from tidings.delivery.due import HELD_SECONDS
from tidings.delivery.owned import OwnStore
from tidings.errors import ConfigurationError, StreamNotFound
from tidings.modelling.appending import Appends
from tidings.modelling.events import Event
from tidings.operations.report import Report, ServiceReport
from tidings.relay.relay import EMBEDDED_MARKERS, Relay
from tidings.settings import Settings
from tidings.stores import EventStore
from tidings.testing.replaced import check_replaced
from tidings.testing.world import place
from tidings.testing.world.blocking import Guard
from tidings.testing.world.clock import OWNER, Clock
from tidings.testing.world.entrance import CLOSED, check_change, check_world, seconds_of
from tidings.testing.world.failures import Failures
from tidings.testing.world.harm import RELAY, Harm, Messages
from tidings.testing.world.lines import Line
from tidings.testing.world.looking import Looking, Sought
from tidings.testing.world.movement import Movement
from tidings.testing.world.real import RealClock, only_in_memory, open_servers
from tidings.testing.world.seat import Seat, end_deaf
from tidings.testing.world.seeds import STORY, Chaos
from tidings.testing.world.standing import Unsettled, at_work, faults_of, handler_at_work, is_left, told
from tidings.testing.world.store import InlineStore
from tidings.testing.world.threads import Threads
from tidings.testing.world.wakes import Wakes
from tidings.testing.world.web import Application, client_of

if TYPE_CHECKING:
    from httpx import AsyncClient

    from tidings.hosting.running import RunningService
    from tidings.modelling.aggregate import Aggregate
    from tidings.modelling.repository import Changed, Repository
    from tidings.service import Service

__all__ = ["World"]

A = TypeVar("A", bound="Aggregate")
P = ParamSpec("P")
E = TypeVar("E", bound=Event)

GRACE: Final = 0.1
"""Virtual seconds that what is due at the end of `advance` may take."""
LATE: Final = 0.001
"""Virtual seconds after which a held event is surely due, whatever was rounded."""
PATIENCE: Final = 60.0
"""Virtual seconds without any handler at work, after which what is not settled counts as stuck."""

_NUMBERS: Final = itertools.count(1)


class World(OnlyAsync, Looking, Harm, Appends):
    """Services in one test: `async with World(order, inventory) as world`.

    They run with the production relay, delivery, inbox and staged appends, and with a log, a bus and databases in
    memory. Time is virtual: it passes only while the test waits, and then at once. Leaving the block stops everything;
    a test that ends with unsettled events, or without having heard of a handler's error, fails.
    """

    def __init__(self, *services: Service, resources: Mapping[type, Any] | None = None) -> None:
        """`resources` are objects to inject in the place of what lifespans yield, by the type that handlers ask for. A
        lifespan is not entered if everything that its service's handlers ask for is replaced."""
        super().__init__()
        check_world(services)
        self._services = services
        self._resources = dict(resources or {})
        self._real = place.WHERE.name != place.MEMORY
        self._threads = Threads()
        self._clock: Any = RealClock(self._threads) if self._real else Clock(handler_at_work, self._threads)
        self._failures = Failures()
        for service in services:
            self._failures.know(service)
        check_replaced(self._resources, services)
        self._stack: AsyncExitStack | None = None
        self._opened = False
        self._relay: Relay | None = None
        """The one that carries events now."""
        self._opened_messages: Messages | None = None
        self._story = None if self._real else STORY.get()
        self._known: tuple[object, Report] | None = None
        """The last report, and how much had been written by then."""

    # ---- opening and closing -----------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._opened:
            raise ConfigurationError("this World was opened before: make a new one, World(...), for each test")
        self._opened = True
        async with AsyncExitStack() as stack:
            stack.callback(self._close)
            stack.callback(self._threads.close)
            self._clock.start()
            stack.callback(self._clock.stop)
            stack.enter_context(Guard(at_work))
            self._outside = ""
            self._tap(stack)
            await self._open(stack)
            self._stack = stack.pop_all()
        return self

    def _close(self) -> None:
        self._outside = CLOSED

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack, self._stack = self._stack, None
        assert stack is not None
        try:
            if error is None:
                await self._check_end()
        finally:
            await stack.__aexit__(kind, error, trace)

    async def _open(self, stack: AsyncExitStack) -> None:
        self._name = f"world-{next(_NUMBERS)}"
        self._settings = Settings(
            store=f"memory://{self._name}", bus=f"memory://{self._name}", database="sqlite:///:memory:"
        )

        def inline() -> InlineStore:
            return InlineStore(lambda: round(self._clock.wall() * 1e7))

        self._movement = Movement(self._seats, self._clock, self._threads, lambda: self._relay)
        if self._real:
            self._store, self._bus = await open_servers(stack, inline)
        else:
            self._store = self._movement.store = inline()
            stack.push_async_callback(self._store.close)
            self._bus = MemoryBus(self._name)
            stack.push_async_callback(self._bus.close)
            self._clock.horizon, self._clock.awaited = self._movement.horizon, self._movement.awaits_outside
            self._opened_messages = Messages(self._bus)
        self._relay_line = self._line()
        self._outer = Line(self._store, self._bus, None, self._see)
        stack.push_async_callback(self._stop_services)
        for service in self._services:
            await self._add(service)
        self._start_relay()
        stack.push_async_callback(self._stop_relay)
        await self._clock.quiet()
        self._begin_story(stack)

    def _line(self) -> Line:
        return Line(self._store, self._bus, None if self._story is None else self._story.delay, self._see)

    def _begin_story(self, stack: AsyncExitStack) -> None:
        """Do the harm of a random world."""
        if self._story is not None and self._opened_messages is not None:
            chaos = Chaos(self, self._story, self._services)
            self._opened_messages.published = chaos.published
            stack.callback(chaos.stop)

    async def _add(self, service: Service) -> Seat:
        """Add a service and start it."""
        if service.name in self._seats:
            raise ConfigurationError(f"service {service.name!r} is in this World already: name each service once")
        seat = Seat(service, self._settings, self._line())
        self._failures.know(service)
        await seat.open()
        self._seats[service.name] = seat
        try:
            if self._real:  # tests share a broker that a variable names: the queue may hold what an earlier one left
                layout = await lay_out(seat.database, service.name, service.partitions)
                await self._bus.delete(layout.subscriptions)
            await self._start(seat)
        except BaseException:
            del self._seats[service.name]
            await seat.close()
            raise
        return seat

    async def _start(self, seat: Seat) -> None:
        await seat.start(self._clock.time, self._resources, self._failures)

    def _start_relay(self) -> None:
        line = self._relay_line
        clock, seal = self._clock.time, self._settings.seal
        relay = Relay(OwnStore(line.store), line.bus, marker_seconds=EMBEDDED_MARKERS, clock=clock, seal=seal)
        self._relay = relay
        self._relay_task = asyncio.create_task(_owned(RELAY, relay), name="relay")

    async def _stop_relay(self) -> None:
        task = self._relay_task
        if not task.done() and self._relay is not None:
            await self._relay.part()
        task.cancel()
        await asyncio.wait((task,))

    async def _stop_services(self) -> None:
        wrong = await self._end_harm()
        seats = list(self._seats.values())
        for seat, _, _ in self._movement.stuck():
            self._clock.disown(seat)
        for seat in seats:
            self._clock.thaw(seat)
            self._mend(seat)
            seat.bury()
        ended = await asyncio.gather(*(seat.stop() for seat in seats), return_exceptions=True)
        await end_deaf()
        for seat in seats:
            await seat.close()
        for error in (*wrong, *ended):
            if isinstance(error, BaseException):
                raise error

    async def _check_end(self) -> None:
        """Fail for what the test has left behind."""
        await self._clock.quiet()
        self._surface()
        report = None if self._movement.working else await self.verify()  # a handler may hold the database's connection
        log = self._store.carried() if isinstance(self._store, InlineStore) else self._seen
        parts = [] if report is None else [part for part in report.services if self._is_well(part)]
        if report is None or any(is_left(part, self._failures.heard, log) for part in parts):
            raise Unsettled(
                "the test ended while events were under way: end it with 'await world.settled()'. "
                + told(report, self._seats.values(), self._logs)
            )

    def _is_well(self, report: ServiceReport) -> bool:
        return self._seats[report.service].condition.well

    @asynccontextmanager
    async def host(self, service: Any) -> AsyncIterator[RunningService]:
        """See `Host`: what a web application's lifespan asks for."""
        seat = self._seats.get(service.name) or await self._add(service)
        if seat.running is None:
            raise ConfigurationError(f"{seat} is not running: it {seat.condition}")
        yield seat.running

    def client(self, api: Application, *, base_url: str = "http://world") -> AbstractAsyncContextManager[AsyncClient]:
        """Enter an HTTP client (httpx) of an ASGI application: `async with world.client(api) as http`.

        The application's lifespan is entered, too. A service that it runs is the one in this world, and is added if it
        is not there yet.
        """
        self._check_inside()
        return client_of(api, self, base_url)

    # ---- what a test does --------------------------------------------------------------------

    def _appends_to(self) -> EventStore:
        self._check_inside()
        return self._outer.store

    @overload
    async def change(
        self,
        repository: Repository[A],
        id: str,
        method: Callable[Concatenate[A, P], Any],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Changed[A]: ...
    @overload
    async def change(
        self,
        repository: Repository[A],
        id: str,
        method: Callable[Concatenate[A, ...], Any],
        *args: Any,
        metadata: Mapping[str, Any],
        **kwargs: Any,
    ) -> Changed[A]: ...
    async def change(
        self, repository: Repository[A], id: str, method: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Changed[A]:
        """Change an aggregate through one of its methods, or create it with that when it has no stream yet. This works
        whatever was done to the service of the repository."""
        self._check_inside()
        check_change(repository, method)
        outside = repository.on(self._outer.store)
        try:
            return await outside.change(id, method, *args, **kwargs)
        except StreamNotFound:
            return await outside.create(id, method, *args, **kwargs)

    async def settled(self) -> Report:
        """Wait until nothing is under way: everything is handled, or waits for nothing but time after errors that the
        test tolerates.

        Raises what handlers raised, unless it is tolerated; and `Unsettled`, with who stands where and why, as soon as
        nothing moves any more.
        """
        self._check_waits("settled")
        report = await self._rest(None)
        assert report is not None
        faults = faults_of(report, self._failures)
        if faults:
            raise Unsettled(f"{faults}. " + told(report, self._seats.values(), self._logs))
        return report

    async def until(
        self,
        of: type[E],
        *,
        stream: str | None = None,
        by: Service | None = None,
        where: Callable[[E], bool] | None = None,
    ) -> E:
        """Wait until an event of this class is in the log (of this stream, emitted by this service, for which `where`
        is true), and return the first one. Others may still be under way then.

        Raises what handlers raised, unless it is tolerated; and `Unsettled` as soon as nothing moves any more.
        """
        self._check_waits("until")
        sought = Sought(of, stream, by, where)
        found = asyncio.create_task(sought.in_log(self._store))
        rest = asyncio.create_task(self._rest(None))
        try:
            await asyncio.wait((found, rest), return_when=asyncio.FIRST_COMPLETED)
            if rest.done() or not found.done():
                await rest  # it raises what went wrong, also where both have ended
            if found.done():
                return found.result()
            await self._see()
            for event in self.events(of, stream=stream, by=by):  # one that came last may not have been heard of yet
                if where is None or where(event):
                    return event
        finally:
            for task in (found, rest):
                task.cancel()
            await asyncio.wait((found, rest))
        raise Unsettled(
            f"no {sought} has come, and nothing moves any more; the log has {self._counted()}. "
            + told(await self.verify(), self._seats.values(), self._logs)
        )

    async def advance(self, *, days: float = 0, hours: float = 0, minutes: float = 0, seconds: float = 0) -> None:
        """Let time pass. What is due happens in order: held events, timers and sleeps of handlers, lifespans and the
        test. Raises what handlers raised, unless it is tolerated."""
        if self._real:
            only_in_memory("advance()")
        self._check_waits("advance")
        target = self._clock.time() + seconds_of(days, hours, minutes, seconds)
        self._clock.limit = target
        wakes = Wakes(self._clock)
        last: Report | None = None
        try:
            while True:
                report = await self._rest(target)
                if report is None or self._clock.time() >= target:
                    break
                # A look at what is held was made since the last report: until something is written, or held, it finds
                # nothing.
                held = any(part.held_due is not None or part.held for part in report.services)
                self._movement.lull = report is last and not held
                last = report
                wakes.note()
                await self._pass(report, target)
            self._movement.lull = False
            self._clock.recall()
            self._clock.limit = target + GRACE
            await self._rest(target + GRACE)
        finally:
            self._movement.lull = False
            self._clock.recall()
            self._clock.limit = None

    def _check_waits(self, what: str) -> None:
        """Raise `ConfigurationError` where waiting would be in vain."""
        self._check_inside()
        if not self._seats:
            raise ConfigurationError(
                f"{what}(): this World has no service: name those that it is made of, World(order)"
            )
        self._check_no_session(f"call world.{what}()")

    async def _pass(self, report: Report, target: float) -> None:
        """Let time pass until something happens, at most up to a moment."""
        now = self._clock.time()
        ahead = now - self._clock.wall() + LATE
        due = [
            # One that is overdue is found by the next look, unless it waits for a paused handler.
            part.held_due + ahead if part.held_due + ahead > now else now + HELD_SECONDS + LATE
            for part in report.services
            if part.held_due is not None and not self._is_paused(part.service)
        ]
        stops = [self._clock.at(moment) for moment in [*due, target]]
        try:
            await self._clock.step()
        finally:
            for stop in stops:
                stop.cancel()

    def _is_paused(self, service: str) -> bool:
        running = self._seats[service].running
        return running is not None and running.paused is not None

    async def _rest(self, until: float | None) -> Report | None:
        """Let everything move that moves by itself, but not beyond a moment; None when that has come first."""
        deadline = self._clock.time() + PATIENCE
        while True:
            await self._clock.quiet()
            self._surface()
            self._movement.check_handlers()
            if not self._movement.busy():
                report = await self._report()
                if not any(service.pending_count or service.staged_count for service in report.services):
                    return report
            now = self._clock.time()
            if until is not None and now >= until:
                return None
            working = self._movement.working
            if not working and until is None and now > deadline:
                return await self.verify()
            await self._clock.step()
            if working:
                deadline = self._clock.time() + PATIENCE

    async def _report(self) -> Report:
        """Return what `verify` does, without looking again where nothing has been written since."""
        if self._real:
            return await self.verify()
        written = self._movement.written()
        if self._known is None or self._known[0] != written:
            self._known = (written, await self.verify())
        return self._known[1]

    def _surface(self) -> None:
        """Raise what went wrong since the last look."""
        self._failures.surface()
        for seat in self._seats.values():
            if (error := seat.ended) is not None:
                seat.condition.die("has died")
                raise error
        if self._relay_task is not None and self._relay_task.done() and not self._relay_task.cancelled():
            self._relay_task.result()
        self._check_harm()


async def _owned(owner: object, relay: Relay) -> None:
    OWNER.set(owner)
    await relay.run()
