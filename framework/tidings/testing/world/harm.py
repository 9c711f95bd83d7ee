"""What a test may do to a world: kill, pause and cut off processes, and lose, repeat and reorder messages."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any

from tidings.buses.memory import MemoryBus
from tidings.errors import ConfigurationError
from tidings.protocol.message import MARKER, Message
from tidings.stores import Appended, RecordedEvent
from tidings.testing.world.clock import Clock
from tidings.testing.world.entrance import check_service
from tidings.testing.world.failures import Failures, Injected
from tidings.testing.world.lines import Line
from tidings.testing.world.real import only_in_memory
from tidings.testing.world.seat import Seat

if TYPE_CHECKING:
    from tidings.service import Service

__all__ = ["Harm", "Messages"]

RESTART: float = 1.0
"""Virtual seconds until a process that was killed is started again."""


class Messages:
    """What becomes of the messages of events on their way into queues."""

    def __init__(self, bus: MemoryBus) -> None:
        self._bus = bus
        self._lose = 0
        self._lost: set[int] = set()
        self._swap = False
        self._waiting: dict[str, Message] = {}
        self._sent: dict[int, Message] = {}
        self._twice: set[int] = set()
        self.published: Callable[[int, int], None] = lambda count, position: None
        """Hears how many events were published, and the position of the last one."""
        bus.tamper(self._pass)

    def lose(self, number: int) -> None:
        """Lose the next messages, each for all queues."""
        self._lose += number

    def reorder(self) -> None:
        """Exchange the next two messages of each queue."""
        self._swap = True

    def duplicate(self, position: int) -> None:
        """Send the message of the event at a position once more, or twice if it was not sent yet."""
        message = self._sent.get(position)
        if message is None:
            self._twice.add(position)
        else:
            self._bus.repeat(message)

    def _pass(self, queue: str, message: Message) -> Iterable[Message]:
        if message.type == MARKER:
            return (message,)
        position = message.headers["tidings-position"]
        if position not in self._sent:
            self._sent[position] = message
            self.published(len(self._sent), position)
            if self._lose:
                self._lose -= 1
                self._lost.add(position)
                return ()
        elif position in self._lost:
            return ()  # in the next queue
        if self._swap:
            first = self._waiting.pop(queue, None)
            if first is None:
                self._waiting[queue] = message
                return ()
            self._swap = bool(self._waiting)
            return (message, first)
        return (message, message) if position in self._twice else (message,)


class Harm:
    """The part of a `World` that does harm. What it did is undone at the end of the world."""

    _clock: Clock
    _failures: Failures
    _relay_line: Line
    _relay_task: asyncio.Task[None]
    _bus: Any
    _opened_messages: Messages | None
    _seat: Callable[[Service], Seat]
    _check_inside: Callable[[], None]
    _seats: dict[str, Seat]
    _add: Callable[[Service], Coroutine[Any, Any, Seat]]
    _start: Callable[[Seat], Coroutine[Any, Any, None]]
    _start_relay: Callable[[], None]

    def __init__(self) -> None:
        self._under_way: set[asyncio.Task[None]] = set()
        """Processes that are being started again, and harm that is to end."""

    @property
    def _messages(self) -> Messages:
        self._check_inside()
        return self._opened_messages or only_in_memory("losing, repeating and reordering messages")

    def is_well(self, service: Service) -> bool:
        """Return whether the test has done nothing to a service that is still so."""
        return not self._seat(service).state

    def crash(self, service: Service, *, restart: float | None = RESTART) -> None:
        """Kill the process of a service now, as SIGKILL does: nothing that it has not committed stays.

        The next process starts after `restart` virtual seconds; with None, it takes `world.start(service)`.
        """
        seat = self._seat(service)
        self._clock.thaw(seat)
        seat.state = "is dead: the test has killed it"
        self._begin(self._revive(seat, seat.kill(), restart))

    async def _revive(self, seat: Seat, task: asyncio.Task[None] | None, restart: float | None) -> None:
        if task is not None:
            await asyncio.wait((task,))
        seat.bury()
        if restart is not None:
            await asyncio.sleep(restart)
            await self._restart(seat)

    async def start(self, service: Service) -> None:
        """Start a service that was killed with `restart=None`, or that is new: it joins the world as a service that is
        deployed later."""
        self._check_inside()
        check_service("start", service)
        seat = self._seats.get(service.name)
        if seat is None:
            await self._add(service)
        elif seat.running is not None:
            raise ConfigurationError(
                f"service {service.name!r} runs: only one that was killed, or that is not in this World, can be started"
            )
        else:
            await self._restart(seat)

    async def _restart(self, seat: Seat) -> None:
        await self._start(seat)
        seat.state = ""

    def crash_relay(self, *, restart: float = RESTART) -> None:
        """Kill the relay now. The next one starts after `restart` virtual seconds."""
        self._check_inside()
        self._relay_line.break_("the relay was killed")
        self._relay_task.cancel()
        self._begin(self._revive_relay(self._relay_task, restart))

    async def _revive_relay(self, task: asyncio.Task[None], restart: float) -> None:
        await asyncio.wait((task,))
        await asyncio.sleep(restart)
        self._relay_line.mend()
        self._start_relay()

    def pause(self, service: Service, *, seconds: float) -> None:
        """Stop the process of a service for some virtual seconds, as SIGSTOP does, wherever it is. A plain function
        that runs in a thread goes on."""
        seat = self._seat(service)
        self._clock.freeze(seat)
        seat.state = "is paused by the test"
        self._begin(self._resume(seat, seconds))

    async def _resume(self, seat: Seat, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self._clock.thaw(seat)
        seat.state = ""

    def cut_off(self, service: Service, *, seconds: float | None = None) -> None:
        """Cut the lines of a service to the log and to the bus, for some virtual seconds or until
        `world.reconnect(service)`."""
        seat = self._seat(service)
        if not isinstance(self._bus, MemoryBus):
            only_in_memory("cut_off()")
        seat.state = "is cut off from the log and the bus by the test"
        seat.line.break_(f"{seat} is cut off by the test")
        if seconds is not None:
            self._begin(self._reconnect(seat, seconds))

    async def _reconnect(self, seat: Seat, seconds: float) -> None:
        await asyncio.sleep(seconds)
        seat.line.mend()
        seat.state = ""

    def reconnect(self, service: Service) -> None:
        """Undo `cut_off`."""
        seat = self._seat(service)
        seat.line.mend()
        seat.state = ""

    def lose_next(self, number: int = 1) -> None:
        """Let the bus lose the messages of the next events, for all services."""
        self._messages.lose(number)

    def duplicate(self, event: RecordedEvent | Appended | int) -> None:
        """Let the bus deliver an event, given as what the log or `append` returned, or as its position, once more."""
        self._messages.duplicate(event if isinstance(event, int) else event.position)

    def reorder(self) -> None:
        """Let the bus deliver the next two messages of each queue in the wrong order."""
        self._messages.reorder()

    def fail(
        self,
        handler: Callable[..., Any] | str,
        *,
        times: int | None = 1,
        error: BaseException | type[BaseException] = Injected("the test lets this handler fail"),  # noqa: B008 - shared
    ) -> None:
        """Let the next attempts of a handler (its function or name) raise an error before it is called: `times` of
        them, or all with None. The test is not told of them."""
        self._failures.fail(handler, times, error)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._under_way.add(task)

    async def _end_harm(self) -> None:
        """Cancel what is under way, and wait for it."""
        for task in self._under_way:
            task.cancel()
        if self._under_way:
            await asyncio.wait(self._under_way)
        self._under_way.clear()
