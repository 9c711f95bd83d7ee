"""Timers ring once, and never after they were closed; a clock counts the time that a machine sleeps."""

from __future__ import annotations

import asyncio
import time

import pytest

from tidings._support.timers import Timers, counting_sleep


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


def test_a_clock_that_counts_sleep_goes_on_while_the_monotonic_one_stands_still(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time, "CLOCK_BOOTTIME", 77, raising=False)
    monkeypatch.setattr(time, "clock_gettime", lambda clock: 3600.0 if clock == 77 else 0.0)
    assert counting_sleep(time.monotonic)() == 3600.0


def test_another_clock_is_left_alone() -> None:
    def clock() -> float:
        return 1.0

    assert counting_sleep(clock) is clock


def test_a_system_without_such_a_clock_has_the_monotonic_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(time, "CLOCK_BOOTTIME", raising=False)
    assert counting_sleep(time.monotonic) is time.monotonic
