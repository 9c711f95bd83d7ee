"""Retries events a few at a time, so that whatever they failed in is not overloaded when it is back."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Final

import typer

__all__ = ["Rate", "in_waves"]

TOLD_SECONDS: Final = 10.0
"""Seconds between two lines about the progress."""

WAVE: Final = 500
"""Events to hand over at once, at most: all their names are in one statement."""

Rate = Annotated[
    float | None,
    typer.Option(
        "--rate",
        min=0.001,
        max=1_000_000,
        metavar="N",
        help="Hand over N events a second, and run until all are handed over; Ctrl-C ends it between two of them. By "
        "default, all at once.",
    ),
]


async def in_waves(names: Sequence[int], rate: float, act: Callable[[Sequence[int]], Awaitable[int]], done: str) -> int:
    """Act on a few at a time, `rate` a second, and return on how many. `done` is what they are afterwards.

    When it is cancelled, it prints how far it came. Those that were handed over stay handed over.
    """
    size = min(max(1, int(rate)), WAVE)
    pause, count, told_at = size / rate, 0, time.monotonic()
    try:
        for start in range(0, len(names), size):
            if start:
                await asyncio.sleep(pause)
            count += await act(names[start : start + size])
            if time.monotonic() - told_at >= TOLD_SECONDS:
                told_at = time.monotonic()
                print(f"{count} of {len(names)} {done}", file=sys.stderr, flush=True)
    except asyncio.CancelledError:
        print(f"stopped: {count} of {len(names)} {done}; the others are as they were", file=sys.stderr, flush=True)
        raise
    return count
