"""Virtual time on the event loop that a test runs on: where nothing is left to do, it jumps to the next timer.

It waits in real time only for what happens outside the loop: calls in threads, sockets, subprocesses. It knows nothing
of Tidings but its threads.
"""

from __future__ import annotations

import asyncio
import heapq
import selectors
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextvars import Context, ContextVar, copy_context
from importlib import import_module
from typing import Any, Final

from tidings.errors import ConfigurationError
from tidings.testing.world.sleeps import replace_everywhere
from tidings.testing.world.threads import Ended, Threads

__all__ = ["OWNER", "USERS", "Clock", "RealSleep"]

TICK: Final = 1e-6
"""Seconds that a turn of the loop takes. If time stood still, code that waits for a deadline without sleeping would
never end."""
RESOLUTION: Final = 1e-6
"""Seconds by which a timer may be early, so that rounding never keeps one from being due."""
OUTSIDE: Final = 0.05
"""Seconds, at most, between two looks at whether anything outside the loop is still under way."""
IDLE: Final = 0.25
"""Seconds of real time without anything from outside the loop after which nobody waits for that any more, unless a
handler is at work: a connection that a lifespan keeps open, a thread that waits for work."""

OWNER: Final[ContextVar[object | None]] = ContextVar("owner of a callback", default=None)
"""What a callback belongs to, for `Clock.freeze`; None for the test."""
USERS: Final[ContextVar[bool]] = ContextVar("a task that a lifespan began", default=False)


class RealSleep(Exception):
    """A handler sleeps in real time, and blocks the event loop by it."""


class _Call:
    """A call in one of the world's threads."""

    def __init__(self, owner: object | None, internal: bool) -> None:
        self.owner = owner
        self.internal = internal
        """It is not of a handler, a lifespan or the test, and ends soon: a commit."""
        self.counts = True
        """Somebody waits for it: it was not cancelled, and its process lives."""


class _Sleep:
    """A thread that sleeps in virtual time."""

    def __init__(self, call: _Call | None) -> None:
        self.call = call
        self.over = threading.Event()
        self.cut_short = False


class _Selector(selectors.BaseSelector):
    """Stands before the loop's own selector: `select` ends without waiting."""

    def __init__(self, inner: selectors.BaseSelector, clock: Clock) -> None:
        self.inner = inner
        self._clock = clock

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self.inner.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self.inner.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self.inner.modify(fileobj, events, data)

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        return self.inner.get_key(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self.inner.get_map()

    def close(self) -> None:
        self.inner.close()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return self._clock.turn(self.inner, timeout)


class Clock:
    """The time of one event loop, between `start` and `stop`. While it runs, `time.time` and `time.time_ns` follow it,
    too, and so does `time.sleep`, by whatever name a module has it. `datetime.now` asks the system itself, and its
    class cannot be changed: it follows where time-machine, which changes what is below both, is installed."""

    def __init__(self, at_work: Callable[[], str | None], threads: Threads) -> None:
        """`at_work` names what the calling code is part of, if that must not block the loop."""
        self.horizon: Callable[[float], float] = lambda moment: moment
        """Given the moment of the next timer, returns the moment to jump to: the same, or a later one. What was due
        before happens then, in order."""
        self.limit: float | None = None
        """The moment over which time does not jump while somebody waits for a step."""
        self.awaited: Callable[[], bool] = lambda: True
        """Whether somebody may be waiting for what happens outside the loop."""
        self.skipped = 0.0
        """Seconds that were jumped over."""
        self._at_work = at_work
        self._threads = threads
        self._in_thread = threading.local()
        self._loop: Any = None
        self._thread = 0
        self._wall, self._wall_ns, self._sleep = time.time, time.time_ns, time.sleep
        self._virtual: Callable[[float], None] = self.sleep
        """What stands in the place of `time.sleep`: one object, so that it can be found again."""
        self._now = 0.0
        self._calls: set[_Call] = set()
        """Calls in threads that are under way, and do not sleep in virtual time."""
        self._asleep: set[_Sleep] = set()
        self._idle = 0.0
        """Seconds of real time since something has come from outside the loop."""
        self._travel: Any = None
        self._limiter: Any = None
        """What counts the threads of anyio, in which web applications run plain functions."""
        self._files: frozenset[int] = frozenset()
        """What the loop's selector watched before."""
        self._waiters: list[tuple[asyncio.Future[None], bool]] = []
        self._postponed: dict[int, tuple[Any, float]] = {}
        """Timers, by their ids, and the moments at which they were to ring."""
        self._frozen: dict[object, list[asyncio.Handle]] = {}

    def start(self) -> None:
        """Take over the running loop's time. Raises `ConfigurationError` for a loop whose time cannot be taken over."""
        loop: Any = asyncio.get_running_loop()
        selector = getattr(loop, "_selector", None)
        if not isinstance(selector, selectors.BaseSelector) or not hasattr(loop, "_clock_resolution"):
            raise ConfigurationError(
                f"a World needs asyncio's own selector event loop, not a {type(loop).__name__}: its virtual time works "
                "on that. Run this test with the default event loop policy (with pytest-asyncio: no uvloop policy)"
            )
        if isinstance(selector, _Selector):
            raise ConfigurationError(
                "another World is open in this event loop: close it first, or open one World with all services"
            )
        self._loop, self._thread = loop, threading.get_ident()
        self._now = loop.time()
        self._wall, self._wall_ns, self._sleep = time.time, time.time_ns, time.sleep
        self._epoch = time.time() - self._now
        self._files = frozenset(key.fd for key in selector.get_map().values())
        self._resolution = loop._clock_resolution
        if "anyio" in sys.modules:
            from anyio.to_thread import current_default_thread_limiter

            self._limiter = current_default_thread_limiter()
        loop.time, loop.run_in_executor = self.time, self._run_in_executor
        loop._selector, loop._clock_resolution = _Selector(selector, self), RESOLUTION
        self._travel = self._take_datetime()
        setattr(time, "time", self.wall)  # noqa: B010 - whatever asks for it follows the world's time
        setattr(time, "time_ns", self.wall_ns)  # noqa: B010
        self._virtual = self.sleep
        replace_everywhere(self._sleep, self._virtual)

    def stop(self) -> None:
        """Give the loop its own time back. Harmless when repeated."""
        loop, self._loop = self._loop, None
        if loop is None:
            return
        setattr(time, "time", self._wall)  # noqa: B010
        setattr(time, "time_ns", self._wall_ns)  # noqa: B010
        replace_everywhere(self._virtual, self._sleep)  # also in modules that were imported meanwhile
        if self._travel is not None:
            self._travel.stop()
        for owner in list(self._frozen):
            self._thaw(loop, owner)
        for sleep in list(self._asleep):
            self._cut_short(sleep)
        ahead = self._now - type(loop).time(loop)
        del loop.time, loop.run_in_executor
        loop._selector, loop._clock_resolution = loop._selector.inner, self._resolution
        for timer in loop._scheduled:  # those of the test's own tasks that are still to come
            timer._when -= ahead
        for waiter, _ in self._waiters:
            waiter.cancel()

    def time(self) -> float:
        """Return seconds, as the loop's `time` does."""
        return self._now

    def wall(self) -> float:
        """Return seconds since 1970."""
        return self._epoch + self._now

    def wall_ns(self) -> int:
        """Return nanoseconds since 1970."""
        return round(self.wall() * 1e9)

    def _take_datetime(self) -> Any:
        """Let `datetime.now` follow, where that can be. Return what is to be stopped."""
        try:
            travel = import_module("time_machine").travel(self.wall(), tick=False)
            traveller = travel.start()
        except (ImportError, RuntimeError):  # the second: freezegun is at work, and has the last word
            return None
        traveller.time, traveller.time_ns = self.wall, self.wall_ns
        return travel

    # ---- passing time ------------------------------------------------------------------------

    async def quiet(self) -> None:
        """Wait until the loop has nothing to do at this moment. No time passes, unless something outside the loop is
        waited for."""
        await self._wait(jump=False)

    async def step(self) -> None:
        """Let time pass up to the next timer, and wait until the loop has nothing to do again."""
        await self._wait(jump=True)

    def first(self, wanted: Callable[[Any], bool]) -> float | None:
        """Return the moment of the first timer of this kind (`asyncio.TimerHandle`), None without one."""
        timer = self.next(wanted)
        return None if timer is None else float(timer.when())

    def next(self, wanted: Callable[[Any], bool]) -> Any:
        """Return the first timer of this kind (`asyncio.TimerHandle`), None without one."""
        timers = (timer for timer in self._loop._scheduled if not timer.cancelled() and wanted(timer))
        return min(timers, default=None)

    def postpone(self, seconds: float, wanted: Callable[[Any], bool]) -> None:
        """Let the timers of this kind ring later, unless `recall` comes before."""
        timers = self._loop._scheduled
        for timer in timers:
            if wanted(timer):
                self._postponed.setdefault(id(timer), (timer, timer.when()))
                timer._when += seconds
        heapq.heapify(timers)

    def recall(self) -> None:
        """Let the timers that were postponed ring when they first were to."""
        for timer, moment in self._postponed.values():
            timer._when = moment
        self._postponed.clear()
        if self._loop is not None:
            heapq.heapify(self._loop._scheduled)

    def at(self, moment: float) -> asyncio.TimerHandle:
        """Let time stop at this moment of `time`, on its way to a later one."""
        timer: asyncio.TimerHandle = self._loop.call_at(moment, lambda: None, context=Context())
        return timer

    async def _wait(self, *, jump: bool) -> None:
        waiter = self._loop.create_future()
        entry = (waiter, jump)
        self._waiters.append(entry)
        try:
            await waiter
        finally:
            self._waiters = [other for other in self._waiters if other[0] is not waiter]

    def turn(self, selector: selectors.BaseSelector, timeout: float | None) -> list[tuple[selectors.SelectorKey, int]]:
        """What the loop's selector does, in the place of waiting for `timeout` seconds."""
        found = selector.select(0)
        self._now += TICK
        if found or timeout == 0:
            return self._heard(found)
        outside = bool(self._calls) or len(selector.get_map()) > len(self._files) or self._lent()
        if outside and self._waiters and self._idle >= IDLE:
            outside = any(call.internal for call in self._calls) or self.awaited()
        if not outside and self._tell():
            return []
        limit = self.limit if self._waiters else None
        held_up = timeout is None or (limit is not None and self._now >= limit)
        if held_up and not outside:  # nothing happens any more by itself
            self._waiters = [(waiter, False) for waiter, _ in self._waiters]
            if self._tell():
                return []
        if outside or timeout is None:
            before = time.monotonic()
            found = selector.select(OUTSIDE if timeout is None else min(timeout, OUTSIDE))
            passed = time.monotonic() - before
            self._now += passed
            self._idle += passed
            return self._heard(found)
        timeout = max(self.horizon(self._now + timeout) - self._now, timeout)
        if limit is not None:
            timeout = max(min(timeout, limit - self._now), 0.0)
        self._now += timeout
        self.skipped += timeout
        self._waiters = [(waiter, False) for waiter, _ in self._waiters]
        return []

    def _heard(self, found: list[tuple[selectors.SelectorKey, int]]) -> list[tuple[selectors.SelectorKey, int]]:
        if not self._files.issuperset(key.fd for key, _ in found):
            self._idle = 0.0
        return found

    def _tell(self) -> bool:
        """Wake whoever waits for this moment; False where all of them wait for the next timer."""
        told = False
        for waiter, jump in self._waiters:
            if not jump and not waiter.done():
                waiter.set_result(None)
                told = True
        return told

    def sleep(self, seconds: float) -> None:
        """What `time.sleep` does meanwhile: in a thread that works for the loop, virtual time passes.

        Raises `RealSleep` where that would block the loop.
        """
        name = self._at_work()
        if name is None:
            self._sleep(seconds)
        elif threading.get_ident() == self._thread:
            raise RealSleep(
                f"{name} calls time.sleep({seconds:g}), which blocks the event loop: nothing else runs meanwhile, in "
                "production neither. Write 'await asyncio.sleep(...)', or make the handler a plain function, which "
                "runs in a thread; both take virtual time here"
            )
        else:
            self._sleep_virtually(seconds)

    def _sleep_virtually(self, seconds: float) -> None:
        loop, sleep = self._loop, _Sleep(getattr(self._in_thread, "call", None))
        if loop is not None:
            loop.call_soon_threadsafe(self._fall_asleep, seconds, sleep)
            sleep.over.wait()
        if loop is None or sleep.cut_short:
            raise Ended("the process of this thread, or its world, is over")
        self._threads.woke()

    def _fall_asleep(self, seconds: float, sleep: _Sleep) -> None:
        if self._loop is None:
            self._cut_short(sleep)
            return
        self._asleep.add(sleep)
        if sleep.call is not None:
            self._calls.discard(sleep.call)  # it does not run, so time may jump
        self._loop.call_later(seconds, self._awake, sleep)

    def _awake(self, sleep: _Sleep) -> None:
        if sleep in self._asleep:
            self._asleep.discard(sleep)
            if sleep.call is not None and sleep.call.counts:
                self._calls.add(sleep.call)
            sleep.over.set()

    def _cut_short(self, sleep: _Sleep) -> None:
        self._asleep.discard(sleep)
        sleep.cut_short = True
        sleep.over.set()

    # ---- threads -----------------------------------------------------------------------------

    def _run_in_executor(self, executor: Any, function: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        loop, owner, runs = self._loop, OWNER.get(), self._threads.instead_of(executor)
        users = owner is None or USERS.get() or self._at_work() is not None
        call = _Call(owner, internal=runs is not self._threads and not users)
        if not call.internal:
            self._idle = 0.0
        if runs is self._threads:
            args, function = (call, function, *args), self._called
        work: asyncio.Future[Any] = type(loop).run_in_executor(loop, runs, function, *args)
        self._calls.add(call)
        work.add_done_callback(lambda _: self._forget(call))
        return work

    def _forget(self, call: _Call) -> None:
        self._calls.discard(call)
        call.counts = False

    def _called(self, call: _Call, function: Callable[..., Any], *args: Any) -> Any:
        self._in_thread.call = call
        try:
            return function(*args)
        finally:
            del self._in_thread.call

    def disown(self, owner: object) -> None:
        """Wait no more for the threads of `owner`: its process has ended. Those that sleep in virtual time end."""
        for call in [call for call in self._calls if call.owner is owner]:
            self._forget(call)
        for sleep in [sleep for sleep in self._asleep if sleep.call is not None and sleep.call.owner is owner]:
            self._cut_short(sleep)

    def _lent(self) -> bool:
        return self._limiter is not None and self._limiter.borrowed_tokens > 0

    # ---- pauses ------------------------------------------------------------------------------

    def freeze(self, owner: object) -> None:
        """Keep every callback of `owner` from now on, as if its process were stopped."""
        if owner in self._frozen:
            return
        if not self._frozen:
            self._loop.call_soon = self._call_soon
        self._frozen[owner] = []

    def thaw(self, owner: object) -> None:
        """Let the callbacks of `owner` run again, those that were kept first."""
        if owner in self._frozen:
            self._thaw(self._loop, owner)

    def is_frozen(self, owner: object) -> bool:
        """Return whether its callbacks are kept."""
        return owner in self._frozen

    def _thaw(self, loop: Any, owner: object) -> None:
        kept = self._frozen.pop(owner)
        if not self._frozen:
            del loop.call_soon
        loop._ready.extend(kept)

    def _call_soon(self, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> asyncio.Handle:
        loop = self._loop
        owner = OWNER.get() if context is None else context.get(OWNER)
        kept = None if owner is None else self._frozen.get(owner)
        if kept is None:
            handle: asyncio.Handle = type(loop).call_soon(loop, callback, *args, context=context)
            return handle
        handle = asyncio.Handle(callback, args, loop, context or copy_context())
        kept.append(handle)
        return handle
