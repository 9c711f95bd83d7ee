"""Pauses grow from the first to the longest, start over when told, and pass by the clock of the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tidings._support.backoff import Backoff, becomes_true, nth_pause
from tidings.testing.simulation.loop import SimulatedLoop

SECONDS = st.floats(0, 1e6)
FACTORS = st.floats(1, 1e9)
SHARES = st.floats(0, 1)
NUMBERS = st.integers(1, 100_000)


def virtually(work: Coroutine[Any, Any, Any]) -> tuple[Any, float]:
    """Run it where time jumps to the next timer. Return its result and the seconds that it took."""
    loop = SimulatedLoop()  # type: ignore[abstract]
    result = loop.run_until_complete(work)
    return result, round(loop.time(), 2)


@given(NUMBERS, SECONDS, SECONDS, FACTORS, SHARES, SHARES)
def test_a_pause_is_never_longer_than_the_longest_nor_shortened_by_more_than_its_share(
    number: int, first: float, longest: float, factor: float, jitter: float, drawn: float
) -> None:
    full = nth_pause(number, first, longest, factor=factor)
    pause = nth_pause(number, first, longest, factor=factor, jitter=jitter, random=lambda: drawn)
    assert 0 <= pause <= full <= longest
    assert pause == pytest.approx(full * (1 - jitter * drawn))


@given(st.integers(1, 60), st.floats(0.001, 10), FACTORS)
def test_each_pause_is_the_factor_times_the_one_before_until_the_longest(
    number: int, first: float, factor: float
) -> None:
    this, following = (nth_pause(n, first, 1e9, factor=factor) for n in (number, number + 1))
    assert following == pytest.approx(min(this * factor, 1e9))


@given(SECONDS, SECONDS, FACTORS)
def test_the_first_pause_is_the_first_and_after_a_reset_again(first: float, longest: float, factor: float) -> None:
    assume(first <= longest)
    backoff = Backoff(first, longest, factor=factor)
    pauses = [backoff.step() for _ in range(5)]
    assert pauses[0] == first
    assert all(before <= after for before, after in pairwise(pauses))
    backoff.reset()
    assert [backoff.step() for _ in range(5)] == pauses


@given(st.lists(SHARES, min_size=6, max_size=6))
def test_the_pause_that_is_told_is_the_pause_that_is_made(drawn: list[float]) -> None:
    draws: Iterator[float] = iter(drawn)
    backoff = Backoff(0.5, 4.0, jitter=0.5, random=lambda: next(draws))
    for share, full in zip(drawn[:5], (0.5, 1.0, 2.0, 4.0, 4.0), strict=True):
        told = backoff.pause
        assert backoff.step() == told == full * (1 - 0.5 * share)


def test_a_loop_that_fails_for_weeks_goes_on_with_the_longest_pause() -> None:
    backoff = Backoff(0.2, 5.0)
    for _ in range(5_000):
        backoff.step()
    assert backoff.pause == 5.0


def test_waits_pass_by_the_clock_of_the_loop() -> None:
    async def waits() -> None:
        backoff = Backoff(10.0, 60.0)
        for _ in range(4):
            await backoff.wait()

    assert virtually(waits()) == (None, 10.0 + 20.0 + 40.0 + 60.0)


def test_a_wait_ends_early_when_its_event_is_set_and_the_next_pause_is_longer_all_the_same() -> None:
    async def waits() -> list[float]:
        backoff, stop = Backoff(10.0, 60.0), asyncio.Event()
        await backoff.wait(until=stop)
        asyncio.get_running_loop().call_later(3.0, stop.set)
        await backoff.wait(until=stop)
        return [backoff.pause]

    assert virtually(waits()) == ([40.0], 13.0)


@pytest.mark.parametrize(("timeout", "expected"), [(5.5, True), (4.5, False)])
def test_a_question_is_asked_until_it_is_true_or_the_next_answer_would_be_too_late(
    timeout: float, expected: bool
) -> None:
    asked: list[float] = []

    async def ask() -> bool:
        asked.append(round(asyncio.get_running_loop().time(), 2))
        return asked[-1] >= 4.0

    result, took = virtually(becomes_true(ask, timeout, Backoff(1.0, 2.0)))
    assert result is expected
    assert asked == ([0.0, 1.0, 3.0, 5.0] if expected else [0.0, 1.0, 3.0])
    assert took <= timeout


def test_a_question_is_asked_once_however_short_the_time() -> None:
    async def ask() -> bool:
        return True

    assert virtually(becomes_true(ask, 0.0, Backoff(1.0, 1.0))) == (True, 0.0)
