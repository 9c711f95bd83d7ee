"""What a test may do to a world: kill, pause and cut off processes, and lose, repeat and reorder messages."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any, Final

from tidings.buses.memory import MemoryBus
from tidings.errors import ConfigurationError
from tidings.protocol.message import MARKER, Message
from tidings.stores import Appended, RecordedEvent
from tidings.testing.world.clock import Clock
from tidings.testing.world.condition import FOR_GOOD
from tidings.testing.world.entrance import check_service, number_of, seconds_for
from tidings.testing.world.failures import Failures, Injected
from tidings.testing.world.lines import CUT, KILLED, Line
from tidings.testing.world.real import only_in_memory
from tidings.testing.world.seat import LIFESPAN, Seat

if TYPE_CHECKING:
    from tidings.service import Service

__all__ = ["Harm", "Messages"]

RESTART: float = 1.0
"""Virtual seconds until a process that was killed is started again."""
RELAY: Final = "relay"
"""The owner of the relay's callbacks."""
BURY, RISE, RESUME, RECONNECT = "bury", "rise", "resume", "reconnect"
"""What may be under way: a killed process is not quite gone; one is to start, to go on, or to be connected again."""


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
        self._under_way: dict[tuple[object, str], asyncio.Task[None]] = {}
        """Processes that are being started again, and harm that is to end: by whom it is of, and what it is."""
        self._dropped: set[asyncio.Task[None]] = set()
        """Tasks that were under way and are being cancelled."""

    @property
    def _messages(self) -> Messages:
        self._check_inside()
        return self._opened_messages or only_in_memory("losing, repeating and reordering messages")

    def is_well(self, service: Service) -> bool:
        """Return whether the test has done nothing to a service that is still so."""
        return self._seat(service).condition.well

    # ---- processes ---------------------------------------------------------------------------

    def crash(self, service: Service, *, restart: float | None = RESTART) -> None:
        """Kill the process of a service now, as SIGKILL does: nothing that it has not committed stays.

        The next process starts after `restart` virtual seconds; with None, it takes `world.start(service)`. If the
        service is dead already, `restart` counts anew. A pause ends with its process; lines that are cut stay so.
        """
        seat = self._seat(service)
        wait = None if restart is None else seconds_for("crash", "restart", restart)
        killed = seat.kill()
        self._drop(seat, RISE)
        self._drop(seat, RESUME)
        self._clock.disown(seat)
        self._clock.thaw(seat)
        seat.condition.die("is dead: the test has killed it")
        if killed is not None:
            self._begin(seat, BURY, self._bury(seat, self._under_way.get((seat, BURY)), killed))
        if wait is not None:
            self._begin(seat, RISE, self._rise(seat, wait))

    async def _bury(self, seat: Seat, *dying: asyncio.Task[None] | None) -> None:
        """Wait until nothing of a killed process is left, and let the next one use its lines and its database."""
        _, left = await asyncio.wait([task for task in dying if task is not None], timeout=LIFESPAN)
        for task in left:
            task.cancel()  # its lifespan waits for something in spite of being cancelled
        if left:
            await asyncio.wait(left, timeout=LIFESPAN)
        seat.bury()
        if left:
            raise seat.hangs("end")

    async def _rise(self, seat: Seat, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if (burial := self._under_way.get((seat, BURY))) is not None:
            await asyncio.wait((burial,))
        await self._start(seat)
        seat.condition.dead = ""

    async def start(self, service: Service) -> None:
        """Start a service that is dead, at once, or one that is new: it joins the world as a service that is deployed
        later."""
        self._check_inside()
        check_service("start", service)
        seat = self._seats.get(service.name)
        if seat is None:
            await self._add(service)
            return
        if not seat.condition.dead:
            raise ConfigurationError(
                f"service {service.name!r} runs: only one that was killed, or that is not in this World, can be started"
            )
        if seat.condition.cut_until == FOR_GOOD:
            raise ConfigurationError(
                f"start({service.name}): service {service.name!r} is cut off, so it would wait for ever: call "
                f"world.reconnect({service.name}) before"
            )
        rising = self._under_way.get((seat, RISE))
        if rising is None or not seat.starting:
            self._drop(seat, RISE)
            rising = self._begin(seat, RISE, self._rise(seat, 0))
        await asyncio.wait((rising,))
        if self._under_way.get((seat, RISE)) is rising:
            del self._under_way[seat, RISE]
        if not rising.cancelled():  # the test crashed it meanwhile
            rising.result()

    def crash_relay(self, *, restart: float = RESTART) -> None:
        """Kill the relay now. The next one starts after `restart` virtual seconds; if it is dead already, they count
        anew."""
        self._check_inside()
        wait = seconds_for("crash_relay", "restart", restart)
        self._drop(RELAY, RISE)
        self._relay_line.break_(KILLED, "the relay was killed")
        self._relay_task.cancel()
        self._begin(RELAY, RISE, self._revive_relay(self._relay_task, wait))

    async def _revive_relay(self, task: asyncio.Task[None], restart: float) -> None:
        await asyncio.wait((task,))
        await asyncio.sleep(restart)
        self._relay_line.mend(KILLED)
        self._start_relay()

    def pause(self, service: Service, *, seconds: float) -> None:
        """Stop the process of a service for some virtual seconds, as SIGSTOP does, wherever it is. Of two pauses that
        overlap, the one that ends later counts. A plain function that runs in a thread goes on.

        Raises `ConfigurationError` for a service that is dead.
        """
        seat = self._seat(service)
        length = seconds_for("pause", "seconds", seconds)
        if seat.condition.dead:
            raise ConfigurationError(
                f"pause({service.name}): service {service.name!r} {seat.condition}, so it has no process to stop: wait "
                f"until it runs again ('await world.start({service.name})'), or pause it before you crash it"
            )
        self._clock.freeze(seat)
        until = seat.condition.pause(self._clock.time() + length)
        self._begin(seat, RESUME, self._resume(seat, until))

    async def _resume(self, seat: Seat, until: float) -> None:
        await asyncio.sleep(until - self._clock.time())
        seat.condition.paused_until = None
        self._clock.thaw(seat)

    # ---- lines -------------------------------------------------------------------------------

    def cut_off(self, service: Service, *, seconds: float | None = None) -> None:
        """Cut the lines of a service to the log and to the bus, for some virtual seconds or until
        `world.reconnect(service)`. Of two cuts that overlap, the one that ends later counts. A process that starts
        meanwhile waits until it is connected."""
        seat = self._seat(service)
        if not isinstance(self._bus, MemoryBus):
            only_in_memory("cut_off()")
        length = FOR_GOOD if seconds is None else seconds_for("cut_off", "seconds", seconds)
        until = seat.condition.cut(self._clock.time() + length)
        seat.line.break_(CUT, f"{seat} is cut off by the test")
        self._drop(seat, RECONNECT)
        if until < FOR_GOOD:
            self._begin(seat, RECONNECT, self._reconnect(seat, until))

    async def _reconnect(self, seat: Seat, until: float) -> None:
        await asyncio.sleep(until - self._clock.time())
        self._mend(seat)

    def reconnect(self, service: Service) -> None:
        """Undo `cut_off`."""
        seat = self._seat(service)
        self._drop(seat, RECONNECT)
        self._mend(seat)

    def _mend(self, seat: Seat) -> None:
        seat.condition.cut_until = None
        seat.line.mend(CUT)

    # ---- messages and handlers ---------------------------------------------------------------

    def lose_next(self, number: int = 1) -> None:
        """Let the bus lose the messages of the next events, for all services. Calls add up."""
        messages = self._messages
        messages.lose(number_of("lose_next", "number", number))

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
        them, or all with None. The test is not told of them. For each handler the last call counts."""
        self._check_inside()
        if times is not None:
            number_of("fail", "times", times)
        self._failures.fail(handler, times, error)

    def tolerate(self, *what: type[BaseException] | Callable[..., Any] | str) -> None:
        """From now on, do not fail the test for these errors, or for any error of these handlers (functions or names).
        Without arguments, every error is tolerated."""
        self._failures.tolerate(*what)

    # ---- what is under way -------------------------------------------------------------------

    def _begin(self, of: object, what: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Let something be under way, in the place of what there is of the same kind."""
        self._drop(of, what, unless=BURY)
        task = self._under_way[of, what] = asyncio.create_task(work, name=f"{what} {of}")
        return task

    def _drop(self, of: object, what: str, unless: str = "") -> None:
        task = self._under_way.pop((of, what), None)
        if task is not None and what != unless:
            task.cancel()
            self._dropped.add(task)
            task.add_done_callback(self._dropped.discard)

    def _check_harm(self) -> None:
        """Raise what has gone wrong in it: a process that could not be started again."""
        for key, task in list(self._under_way.items()):
            if task.done():
                del self._under_way[key]
                task.result()

    async def _end_harm(self) -> list[BaseException | None]:
        """Let killed processes end, cancel all else that is under way, and wait for it. Return what went wrong in the
        ends of killed processes."""
        for (_, what), task in self._under_way.items():
            if what != BURY:
                task.cancel()
        burials = [task for (_, what), task in self._under_way.items() if what == BURY]
        left = {*self._under_way.values(), *self._dropped}
        if left:
            await asyncio.wait(left)
        self._under_way.clear()
        return [task.exception() for task in burials if not task.cancelled()]
