"""Timers ring once, and never after they were closed."""

from __future__ import annotations

import asyncio

from tidings.timers import Timers


async def test_one_rings_and_is_forgotten() -> None:
    timers, rung = Timers(), asyncio.Event()
    timer = timers.later(0, rung.set)
    assert timer in timers
    await asyncio.wait_for(rung.wait(), 5)
    assert timer not in timers
    assert None not in timers


async def test_none_rings_after_the_end() -> None:
    timers, rung = Timers(), list[int]()
    timer = timers.later(0, lambda: rung.append(1))
    timers.close()
    await asyncio.sleep(0.01)
    assert rung == []
    assert timer.cancelled()
    assert timer not in timers
