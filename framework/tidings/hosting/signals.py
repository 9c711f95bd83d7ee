"""From a signal to the end of the process: the first asks for a clean end, the second ends it, and so does the time.

It never raises in the program, and it needs no event loop that turns: a thread watches, so that handlers which block
the loop, and threads which would hold up the interpreter's exit, hold up nothing.
"""

from __future__ import annotations

import asyncio
import concurrent.futures.thread
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Set
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Final, Self

import structlog

from tidings.delivery.attempt import HANDLER_TASK
from tidings.errors import ConfigurationError

__all__ = ["STOP_SECONDS", "StopSignals", "left_behind"]

log = structlog.get_logger("tidings.signals")

STOP_SECONDS: Final = 4.8
"""From the first signal to the end of the process, whatever hangs; supervisors allow 10 and more before they kill."""
FLUSH_SECONDS: Final = 0.5
"""A log that nobody reads any more must not hold up the end."""
THREADS_SECONDS: Final = 0.3
"""Idle threads of closed executors end within this."""

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """A context manager around what should end cleanly, in the main thread and a running loop.

    The first SIGINT or SIGTERM sets `requested` and calls `on_request` in the loop. A second ends the process at once
    with 130 or 143. If the block has not ended `STOP_SECONDS` after the first, or if threads and handlers of it hold up
    the program's exit, the process ends with 0: what was not settled comes again. `unfinished` is asked what to name.
    """

    def __init__(self, unfinished: Callable[[], list[dict[str, Any]]] = list, *, seconds: float = STOP_SECONDS) -> None:
        self.requested = asyncio.Event()
        self.on_request: Callable[[], None] = lambda: None
        self._unfinished = unfinished
        self._seconds = seconds

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            raise ConfigurationError("signals reach the main thread only: in another, use 'async with Runtime(...)'")
        self._loop = asyncio.get_running_loop()
        self._threads = set(threading.enumerate())
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        threading.Thread(target=self._watch, name="tidings-signals", daemon=True).start()
        self._before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.requested.is_set() and (left := left_behind(self._threads)):
            log.warning(
                "process.hangs",
                left=left,
                advice="the process ends without them; the events that they worked on come again at the next start",
            )
            return  # the watching thread stays, with its deadline, and so does the meaning of a second signal
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._writing)

    # Handlers run between two bytecodes of the main thread, in the middle of whatever it does: no lock may be taken.

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        with suppress(BlockingIOError):
            os.write(self._writing, bytes([number]))

    def _watch(self) -> None:
        first = os.read(self._reading, 1)
        if not first:
            os.close(self._reading)
            return
        deadline = time.monotonic() + self._seconds
        with suppress(RuntimeError):  # the loop was closed this moment
            self._loop.call_soon_threadsafe(self._request, signal.Signals(first[0]))
        readable, _, _ = select.select([self._reading], [], [], deadline - time.monotonic())
        if not readable:
            self._leave(0, "process.out_of_time", seconds=self._seconds)
        second = os.read(self._reading, 1)
        if second:
            number = signal.Signals(second[0])
            self._leave(128 + number, "process.ended_at_once", signal=number.name)
        os.close(self._reading)

    def _request(self, number: signal.Signals) -> None:
        log.info("process.stopping", signal=number.name, advice="a second signal ends the process at once")
        self.requested.set()
        self.on_request()

    def _leave(self, status: int, what: str, **facts: Any) -> None:
        """End the process, with a line that says what becomes of what it did."""

        def tell() -> None:
            unfinished: list[dict[str, Any]] = []
            with suppress(Exception):  # the loop's thread may go on changing what is looked at
                unfinished = self._unfinished()
            with suppress(Exception):
                log.warning(
                    what,
                    **facts,
                    status=status,
                    unfinished=unfinished,
                    advice="what was not settled comes again at the next start",
                )
            for stream in (sys.stdout, sys.stderr):
                with suppress(Exception):
                    stream.flush()
            logging.shutdown()

        with suppress(RuntimeError):  # no threads any more: the interpreter is on its way out
            telling = threading.Thread(target=tell, daemon=True)
            telling.start()
            telling.join(FLUSH_SECONDS)
        os._exit(status)


def left_behind(before: Set[threading.Thread]) -> list[str]:
    """What was begun since there were these threads, and would be waited for: threads, with their place, and
    handlers."""
    deadline = time.monotonic() + THREADS_SECONDS
    deaf = [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith(HANDLER_TASK)]
    while True:
        frames = sys._current_frames()
        left: dict[str, threading.Thread] = {}
        for thread in set(threading.enumerate()) - before:
            frame = frames.get(thread.ident or 0)
            if thread.daemon or frame is None or frame.f_code.co_filename == concurrent.futures.thread.__file__:
                continue  # the last is an executor's thread without work, which ends when the interpreter says so
            left[f"{thread.name} in {frame.f_code.co_qualname}, {frame.f_code.co_filename}:{frame.f_lineno}"] = thread
        if not left or time.monotonic() > deadline:
            return sorted([*left, *deaf])
        next(iter(left.values())).join(deadline - time.monotonic())
