"""A thread that notices when the event loop stands still. It only logs: nothing can stop a handler that blocks.

A process that was stopped (SIGSTOP, a paused container, a suspended machine) stands still too, and no handler is to
blame. Then this thread did not run either, and the process used no CPU time; it says so instead.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Final, NamedTuple

import structlog

__all__ = ["Watchdog"]

log = structlog.get_logger("tidings.watchdog")

BLOCKED_SECONDS: Final = 2.0
"""Seconds without a turn of the event loop after which it counts as blocked: it is about to miss heartbeats."""
BUSY_SHARE: Final = 0.1
"""CPU seconds per second above which a process was running, though this thread was not: C code may keep it waiting."""


class _Moment(NamedTuple):
    """Clock readings, in seconds."""

    running: float
    """Does not count while the machine is suspended."""
    passed: float
    """Counts while the machine is suspended, where the system knows."""
    worked: float
    """CPU time of the process."""

    @classmethod
    def now(cls) -> _Moment:
        running = time.monotonic()
        boot = getattr(time, "CLOCK_BOOTTIME", None)
        return cls(running, running if boot is None else time.clock_gettime(boot), time.process_time())

    def since(self, earlier: _Moment) -> _Moment:
        return _Moment(*(now - before for now, before in zip(self, earlier, strict=True)))

    @property
    def busy(self) -> bool:
        """Whether the process ran in the time that this difference of two moments covers."""
        return self.worked >= BUSY_SHARE * self.passed


class Watchdog:
    """A context manager around what runs in the loop: service `name`, whose handlers at work `working` names."""

    def __init__(self, name: str, working: Callable[[], Iterable[str]], *, seconds: float = BLOCKED_SECONDS) -> None:
        self._name = name
        self._working = working
        self._seconds = seconds
        self._turned = time.monotonic()
        self._told = False
        """This block of the loop was told already."""
        self._stop = threading.Event()

    def __enter__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, name="tidings-watchdog", daemon=True)
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _turn(self) -> None:
        self._turned = time.monotonic()
        self._told = False

    def _watch(self) -> None:
        pause, before = self._seconds / 4, _Moment.now()
        while not self._stop.wait(pause):
            now = _Moment.now()
            elapsed, before = now.since(before), now
            if not elapsed.busy:  # the time that this thread overslept is time that the loop did not have either
                self._turned = min(self._turned + max(elapsed.running - pause, 0.0), now.running)
                if elapsed.passed - pause > self._seconds:
                    self._tell_of_stop(elapsed.passed)
            still = now.running - self._turned
            if still > self._seconds and not self._told:
                self._told = True
                self._tell_of_block(still)
            try:
                self._loop.call_soon_threadsafe(self._turn)
            except RuntimeError:  # the loop was closed
                return

    def _tell_of_stop(self, seconds: float) -> None:
        log.warning(
            "process.was_stopped",
            service=self._name,
            seconds=round(seconds, 1),
            advice="the process did not run at all, and no handler is to blame: it was stopped (SIGSTOP, a debugger, a "
            "paused container), the machine was suspended, or it has far too little CPU time. Others may have taken "
            "over meanwhile; the service joins again by itself",
        )

    def _tell_of_block(self, still: float) -> None:
        frame = sys._current_frames().get(self._loop_thread)
        where = traceback.format_stack(frame)[-3:] if frame else []
        log.error(
            "loop.blocked",
            service=self._name,
            seconds=round(still, 1),
            handlers=sorted(self._working()),
            stack="".join(where),
            advice="a handler computes or waits without await: make it a plain function, which runs in a thread",
        )
