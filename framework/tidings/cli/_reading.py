"""Shows on standard error how far a command has read the log, for people who wait at a terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Final, Self

__all__ = ["Reading"]

SECONDS: Final = 0.5
"""Seconds between two notes, and before the first one: a quick command shows none."""


class Reading:
    """A note of the progress, which is wiped away at the end of the block."""

    def __init__(self) -> None:
        self._noted_at = time.monotonic()
        self._shown = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def reached(self, events: int, position: int, end: int) -> None:
        """Show how many events were read, the position reached, and where reading ends (lower if backwards)."""
        now = time.monotonic()
        if now - self._noted_at < SECONDS or not sys.stderr.isatty():
            return
        self._noted_at, self._shown = now, True
        note = f"{events} events read, at position {position} on the way to {end}"
        print(f"\r\x1b[K{note}", end="", file=sys.stderr, flush=True)
