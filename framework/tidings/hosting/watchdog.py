"""Notices from a thread that the event loop stands still, and names the handler and the line that block it."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Final

import structlog

__all__ = ["Watchdog"]

log = structlog.get_logger("tidings.watchdog")

BLOCKED_SECONDS: Final = 2.0
"""A loop that does not turn for so long misses heartbeats before long."""


class Watchdog:
    """A context manager around what runs in the loop: service `name`, whose handlers at work `working` names.

    It only tells; nothing can stop a handler that blocks its loop.
    """

    def __init__(self, name: str, working: Callable[[], Iterable[str]], *, seconds: float = BLOCKED_SECONDS) -> None:
        self._name = name
        self._working = working
        self._seconds = seconds
        self._turned = time.monotonic()
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

    def _watch(self) -> None:
        told = 0.0
        while not self._stop.wait(self._seconds / 4):
            still = time.monotonic() - self._turned
            if still > self._seconds and self._turned != told:
                told = self._turned
                self._tell(still)
            try:
                self._loop.call_soon_threadsafe(self._turn)
            except RuntimeError:  # the loop was closed
                return

    def _tell(self, still: float) -> None:
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
