"""An event loop with virtual time, and the processes in it, which can be paused and killed. It never waits.

Within a process, callbacks run in the order that asyncio promises. When there is nothing to run, time jumps to the next
timer. So the order of everything follows from how long things take, and that follows from the seed.
"""

from __future__ import annotations

import asyncio
import heapq
import random
import sys
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from itertools import count
from typing import Any, Final, TypeVar

__all__ = ["PROCESS", "Endless", "Process", "SimulatedLoop", "Stuck"]

T = TypeVar("T")

QUICK: Final = 0.004
"""Seconds that an I/O takes at most, unless it is a slow one."""
SLOW: Final = 1.5
"""Seconds that a slow I/O takes at most."""
SELDOM: Final = 0.03
"""Share of slow I/Os."""

TICK: Final = 1e-6
"""Seconds that a callback takes. If time stood still, code that waits for a tiny rest of time would never end."""
STEPS: Final = 100_000
"""Callbacks after which a world counts as endless. Most need 2,000."""

PROCESS: Final[ContextVar[Process | None]] = ContextVar("simulated process", default=None)
"""The process to which a callback belongs; None for the world around them."""


class Endless(Exception):
    """A world runs more than `STEPS` callbacks without an end."""


class Stuck(RuntimeError):
    """All tasks wait for one another."""


class Process:
    """A simulated operating system process: it stops and dies as a whole, at any point."""

    def __init__(self, name: str, loop: SimulatedLoop, seed: str, *, hasty: bool = False) -> None:
        self.name = name
        self.loop = loop
        self.hasty = hasty
        """Its I/O takes hardly any time."""
        self.clock_error = 0.0
        """Seconds by which its wall clock is wrong."""
        self.paused = self.dead = self.gone = False
        """`gone`: the world is over; its tasks end without any effect."""
        self.kept: list[asyncio.Handle] = []
        """Callbacks that would run if it were not paused or dead."""
        self.tasks: list[asyncio.Task[Any]] = []
        self.calls: list[asyncio.Future[Any]] = []
        """Calls in an executor."""
        self._traps: dict[tuple[str, int], Callable[[], None]] = {}
        self._did: Counter[str] = Counter()
        self._random = random.Random(seed)

    def __repr__(self) -> str:
        return self.name

    def seconds(self) -> float:
        """Return the seconds that the next I/O takes."""
        if self.hasty:
            return 0.001
        chance = self._random.random()
        return SLOW * self._random.random() ** 2 if chance < SELDOM else QUICK * chance

    def chance(self, probability: float) -> bool:
        """Return True with this probability; never for a hasty process."""
        return not self.hasty and self._random.random() < probability

    async def io(self, kind: str) -> None:
        """Take the time of an I/O. The process may be hit before it and after it."""
        self.spring(kind)
        await asyncio.sleep(self.seconds())
        if self.gone:
            raise asyncio.CancelledError

    def spring(self, kind: str) -> None:
        """Count an I/O, and spring the trap that waits for it."""
        if self.gone:
            raise asyncio.CancelledError
        self._did[kind] += 1
        trap = self._traps.pop((kind, self._did[kind]), None)
        if trap is not None:
            trap()

    def trap(self, kind: str, nth: int, snap: Callable[[], None]) -> None:
        """Call `snap` at the n-th I/O of a kind from now on."""
        self._traps[kind, self._did[kind] + nth] = snap

    def run(self, main: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a task of this process."""
        context = copy_context()
        context.run(PROCESS.set, self)
        return self.loop.create_task(main, name=self.name, context=context)

    def pause(self) -> None:
        """Keep its callbacks until `resume`."""
        self.paused = True

    def resume(self) -> None:
        """Run the callbacks that were kept, unless the process is dead."""
        self.paused = False
        if not self.dead:
            self._release()

    def kill(self) -> None:
        """Keep its callbacks for good."""
        self.dead = True

    def bury(self) -> None:
        """Let its remaining tasks end without any effect."""
        self.paused = self.dead = False
        self.gone = True
        for call in self.calls:
            call.cancel()
        self._release()

    def _release(self) -> None:
        kept, self.kept = self.kept, []
        for handle in kept:
            self.loop.enqueue(self, handle)


class _Task(asyncio.Task[T]):
    """A task with a fixed hash: task groups keep tasks in sets, whose order must not depend on memory addresses."""

    _numbers = count()

    def __init__(self, coroutine: Coroutine[Any, Any, T], *, context: Context | None = None, **options: Any) -> None:
        self._number = next(self._numbers)
        owner = _owner(context)
        if owner is not None:
            owner.tasks.append(self)
        super().__init__(coroutine, context=context, **options)

    def __hash__(self) -> int:
        return self._number


class SimulatedLoop(asyncio.AbstractEventLoop):
    """The part of an event loop that code without sockets, signals and subprocesses needs."""

    task_class: Final = _Task
    """What tasks of this loop are, also those that do not ask it to make them."""

    def __init__(self) -> None:
        self._now = 0.0
        self._ready: deque[tuple[Process | None, asyncio.Handle]] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle, Process | None]] = []
        self._numbers = count()
        self._running = False
        self.steps = 0
        """Number of callbacks that were run."""
        self.complaints: list[str] = []
        """Exceptions that nobody looked at, which asyncio would have logged."""
        _Task._numbers = count()

    # ---- running ------------------------------------------------------------------------

    def run_until_complete(self, future: Any) -> Any:
        """Run a coroutine to its end. Raises `Stuck` if nothing can happen any more."""
        hooks = sys.get_asyncgen_hooks()
        task = future if isinstance(future, asyncio.Future) else self.create_task(future)
        asyncio._set_running_loop(self)
        sys.set_asyncgen_hooks(finalizer=self._finalize)
        self._running = True
        try:
            while not task.done():
                self._turn()
        finally:
            self._running = False
            sys.set_asyncgen_hooks(*hooks)
            asyncio._set_running_loop(None)
        return task.result()

    def _turn(self) -> None:
        while not self._ready:
            if not self._timers:
                raise Stuck("all tasks wait, and no timer is set")
            when, _, timer, owner = heapq.heappop(self._timers)
            if not timer.cancelled():
                self._now = max(self._now, when)
                self._ready.append((owner, timer))
        owner, handle = self._ready.popleft()
        if handle.cancelled():
            return
        if owner is not None and (owner.paused or owner.dead):
            owner.kept.append(handle)
            return
        self.steps += 1
        self._now += TICK
        if self.steps > STEPS:
            self.steps = 0
            raise Endless(f"{STEPS} callbacks were run without an end")
        handle._run()

    def enqueue(self, owner: Process | None, handle: asyncio.Handle) -> None:
        """Let a callback run in its turn."""
        self._ready.append((owner, handle))

    def _finalize(self, generator: AsyncGenerator[Any, Any]) -> None:
        self.create_task(_close(generator))

    # ---- the methods that asyncio needs ---------------------------------------------------

    def time(self) -> float:
        """Return the virtual time, in seconds."""
        return self._now

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        """Schedule a callback for the next turn."""
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append((_owner(context), handle))
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """Schedule a callback after some virtual seconds."""
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """Schedule a callback at a virtual time."""
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._numbers), timer, _owner(context)))
        return timer

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Do nothing: a cancelled timer is dropped when its time comes."""

    def create_future(self) -> asyncio.Future[Any]:
        """Return a new future of this loop."""
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: object = None, context: Context | None = None) -> asyncio.Task[Any]:
        """Start a task, which belongs to the process of its context."""
        return _Task(coro, loop=self, name=None if name is None else str(name), context=context)

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """Run the call without a thread: it happens in one step some time later, and its result comes later still."""
        work: asyncio.Future[T] = self.create_future()
        process = PROCESS.get()
        if process is None:
            work.set_result(func(*args))
            return work
        if process.gone:
            work.cancel()
            return work

        def begin() -> None:
            if not process.gone:
                process.spring("executing")
                self.call_soon(call)  # not now: the process may be paused or dead

        def call() -> None:
            if process.gone:
                return
            try:
                result = func(*args)
            except Exception as error:
                self.call_later(process.seconds(), _fail, work, error)
            else:
                self.call_later(process.seconds(), _succeed, work, result)
                process.spring("executed")

        process.calls = [call for call in process.calls if not call.done()] + [work]
        self.call_later(process.seconds(), begin)
        return work

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Keep an exception that nobody looked at."""
        error = context.get("exception")
        self.complaints.append(f"{context['message']}: {error!r}")

    def get_debug(self) -> bool:
        """Return False."""
        return False

    def is_running(self) -> bool:
        """Return whether it runs."""
        return self._running

    def is_closed(self) -> bool:
        """Return False: it holds no resources."""
        return False


def _owner(context: Context | None) -> Process | None:
    return PROCESS.get() if context is None else context.get(PROCESS)


def _succeed(work: asyncio.Future[T], result: T) -> None:
    if not work.done():
        work.set_result(result)


def _fail(work: asyncio.Future[Any], error: BaseException) -> None:
    if not work.done():
        work.set_exception(error)


async def _close(generator: AsyncGenerator[Any, Any]) -> None:
    await generator.aclose()
