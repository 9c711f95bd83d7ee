"""Interrupts a handler that blocks the event loop, so that its test fails there and does not hang.

Only what a signal can interrupt: Python code, sleeps and system calls in the main thread. It lets debuggers be.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Final

__all__ = ["Blocked", "Guard", "debugged"]

LOOK: float = 1.0
"""Seconds between two looks at the event loop."""
LOOKS: Final = 20
"""Looks without a turn of the loop after which it counts as blocked. A process that was stopped is not blamed, because
it does not look."""
SIGNAL: Final = getattr(signal, "SIGVTALRM", None)
"""Interrupts the main thread. Debuggers, pytest and its plugins do not use it."""
DEBUGGERS: Final = frozenset({"bdb", "pdb", "pydevd", "_pydevd_bundle", "debugpy"})
"""Packages of debuggers: where one of their functions is at work, somebody looks at the handler."""


class Blocked(Exception):
    """A handler keeps the event loop to itself, so that nothing else runs."""


class Guard:
    """A context manager around what runs in the loop. `at_work` names what the calling code is part of, if that must
    not block the loop."""

    def __init__(self, at_work: Callable[[], str | None]) -> None:
        self._at_work = at_work
        self._looks = 0
        """Looks since the last turn of the loop."""
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> None:
        main = threading.current_thread() is threading.main_thread()
        if SIGNAL is None or not main or signal.getsignal(SIGNAL) is not signal.SIG_DFL:
            return
        signal.signal(SIGNAL, self._interrupt)
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._watch, name="tidings-world-guard", daemon=True)
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None and SIGNAL is not None:
            self._over.set()
            self._thread.join()
            signal.signal(SIGNAL, signal.SIG_DFL)

    def _turn(self) -> None:
        self._looks = 0

    def _watch(self) -> None:
        main = threading.main_thread().ident
        assert main is not None
        assert SIGNAL is not None
        while not self._over.wait(LOOK):
            self._looks += 1
            if self._looks > LOOKS:
                signal.pthread_kill(main, SIGNAL)
            elif self._looks == 1:
                with suppress(RuntimeError):  # the loop was closed
                    self._loop.call_soon_threadsafe(self._turn)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        __tracebackhide__ = True  # so that pytest ends at the line that blocks
        who = self._at_work()
        if self._looks <= LOOKS or who is None or frame is None or debugged(frame):
            return
        self._looks = 1
        code = frame.f_code
        raise Blocked(
            f"{who} has kept the event loop for {LOOK * LOOKS:g} seconds of real time, and stands in "
            f"{code.co_qualname} ({code.co_filename}, line {frame.f_lineno}). Nothing else runs meanwhile, in "
            "production neither. Await what it waits for, or make the handler a plain function, which runs in a thread"
        )


def debugged(frame: FrameType | None) -> bool:
    """Return whether somebody looks at this frame, or at what it has called, with a debugger."""
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] in DEBUGGERS:
            return True
        frame = frame.f_back
    return False
