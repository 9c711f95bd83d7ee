"""The garbage collector in a process that handles events. It changes the collector's settings, and collects nothing."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["spared_by_the_collector"]

YOUNG: Final = 10_000
"""Objects made, less those given back, after which the collector looks through the young ones. Python's own is 700."""


@contextmanager
def spared_by_the_collector() -> Iterator[None]:
    """Have the garbage collector cost little within the block.

    What exists now (modules, classes, mapped tables) is kept out of its passes. It lives as long as the process, and
    events in flight set off a pass over all of it again and again: up to a seventh of the CPU of a service that reads
    the log. Unless an application has frozen objects itself: it knows when to end that.

    Passes over what was made last become rarer. What is made for an event mostly goes with its last reference, so they
    find little, and look through what is in flight each time: with 10,000 a pass over the log took a tenth less CPU
    than with Python's own threshold (`bench_healing`, on a busy machine). A threshold that is higher already stays, and
    so does 0, which switches the collector off.
    """
    thresholds, freezes = gc.get_threshold(), not gc.get_freeze_count()
    if freezes:
        gc.freeze()
    if 0 < thresholds[0] < YOUNG:
        gc.set_threshold(YOUNG, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        if freezes:
            gc.unfreeze()
