"""The threads of a world, for plain handlers and for `asyncio.to_thread`: the process can end while one is stuck.

Nothing can end a thread that waits outside Python. So these are daemons, and what then is still at work when the world
ends is left behind.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from queue import SimpleQueue
from types import FrameType
from typing import Any, Final, NamedTuple

from tidings.delivery import attempt
from tidings.delivery.attempt import HandlerThreads
from tidings.modelling.handlers import Handler
from tidings.testing.world.blocking import debugged

__all__ = ["MOST", "Ended", "Place", "Threads", "place_of", "words_of"]

MOST: Final = 64
"""Threads, at most. What comes when all are at work waits for one."""
OVER: float = 10.0
"""Seconds of real time that a plain handler may go on after its timeout. Nothing can end its thread, so the test fails
then."""


class Ended(BaseException):
    """Raised in a thread whose process or world has ended: while it sleeps in virtual time, or runs Python code."""


class _Job(NamedTuple):
    done: Future[Any]
    call: Callable[[], Any]


class Threads(Executor):
    """Runs calls in threads that do not keep the process from ending."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads: set[threading.Thread] = set()
        self._busy: dict[int, float] = {}
        """Threads at work, by identifier: `time.monotonic()` when they began or last woke up from a virtual sleep."""
        self._unbegun = 0
        self._lock = threading.Lock()
        self._closed = False

    def instead_of(self, executor: Executor | None) -> Executor:
        """Return what runs a call that is meant for this executor. Those of the user's own are kept."""
        return self if executor is None or isinstance(executor, HandlerThreads) else executor

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run a call in a thread."""
        done: Future[Any] = Future()
        with self._lock:
            self._unbegun += 1
            idle = len(self._threads) - len(self._busy)
            if self._unbegun > idle and len(self._threads) < MOST:
                name = f"tidings-world-{len(self._threads)}"
                thread = threading.Thread(target=self._work, name=name, daemon=True)
                self._threads.add(thread)
                thread.start()
        self._jobs.put(_Job(done, lambda: fn(*args, **kwargs)))
        return done

    def _work(self) -> None:
        with suppress(Ended):
            self._run()

    def _run(self) -> None:
        me = threading.get_ident()
        while (job := self._jobs.get()) is not None:
            with self._lock:
                self._unbegun -= 1
                closed = self._closed
                if not closed:
                    self._busy[me] = time.monotonic()
            if closed:  # it came before the world's end, and nobody has begun it
                job.done.cancel()
                continue
            result, error = None, None
            begun = job.done.set_running_or_notify_cancel()
            try:
                result = job.call() if begun else None
            except BaseException as raised:  # as in any executor, whoever waits for the call is told
                error = raised
            with self._lock:
                del self._busy[me]
            if begun and not self._closed:  # later there is no loop to tell
                if error is None:
                    job.done.set_result(result)
                else:
                    job.done.set_exception(error)
            del job, result, error

    def woke(self) -> None:
        """Hear that the calling thread has slept in virtual time."""
        me = threading.get_ident()
        with self._lock:
            if me in self._busy:
                self._busy[me] = time.monotonic()

    def seconds_of(self, thread: int) -> float:
        """Return for how many seconds of real time a thread has been at its call; 0 where it has none."""
        began = self._busy.get(thread)
        return 0.0 if began is None else time.monotonic() - began

    def close(self) -> None:
        """End the threads that are idle or run Python code. Others are left behind, and end with their call."""
        with self._lock:
            self._closed = True
            busy = set(self._busy)
            for ident in busy:  # each is at its call as long as this holds the lock
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(Ended))
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            if thread.ident not in busy:
                thread.join()


class Place(NamedTuple):
    """Where the thread of a plain handler stands."""

    thread: int
    text: str
    debugged: bool


def place_of(handler: Handler, position: int) -> Place | None:
    """Return where the thread of a plain handler, which is at the event of this position, stands now; None where none
    is found."""
    for thread, frame in sys._current_frames().items():
        inner: FrameType | None = frame
        outer = frame
        while inner is not None:
            if inner.f_code is attempt._call.__code__:
                context: Any = inner.f_locals.get("context")
                if inner.f_locals.get("handler") is handler and context.position == position:
                    return Place(thread, _stands(outer, frame), debugged(frame))
                break
            outer, inner = inner, inner.f_back
    return None


def words_of(handler: Handler, whose: str, place: Place) -> str:
    """Say what is wrong with a plain handler that is long over its time."""
    return (
        f"handler {handler.name!r} of {whose} is a plain function, and its thread is still at work {OVER:g} seconds "
        f"of real time after its timeout of {handler.timeout:g} s. It stands in {place.text}. Nothing can end a "
        "thread, in production neither: later events wait until it returns. Give what it waits for a limit of its own"
    )


def _stands(handler: FrameType, innermost: FrameType) -> str:
    first = _line(handler)
    return first if innermost is handler else f"{first}, in {_line(innermost)}"


def _line(frame: FrameType) -> str:
    code = frame.f_code
    return f"{code.co_qualname} ({code.co_filename}, line {frame.f_lineno})"
