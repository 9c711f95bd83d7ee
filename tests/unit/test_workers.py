"""Workers begin what they are given in order, one after the other, and side by side only where something waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidings._support.workers import TURN, Workers


@asynccontextmanager
async def at_work(number: int, begin: Callable[[int], Awaitable[None] | None]) -> AsyncIterator[Workers[int]]:
    workers = Workers(number, begin)
    running = asyncio.create_task(workers.run())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    try:
        yield workers
    finally:
        running.cancel()
        await asyncio.wait((running,))
        if not running.cancelled() and (error := running.exception()) is not None:
            raise error


async def turns(number: int = 8) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def test_what_waits_for_nothing_is_begun_in_order_within_one_turn() -> None:
    begun: list[int] = []
    async with at_work(3, begun.append) as workers:
        for item in range(TURN):
            workers.give(item)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert begun == list(range(TURN))


async def test_others_have_their_turn_between_many() -> None:
    begun: list[int] = []
    async with at_work(3, begun.append) as workers:
        for item in range(3 * TURN):
            workers.give(item)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert TURN <= len(begun) < 3 * TURN
        await turns()
        assert begun == list(range(3 * TURN))


async def test_as_many_wait_side_by_side_as_there_are_tasks_and_no_more() -> None:
    gates = {item: asyncio.Event() for item in range(5)}
    begun: list[int] = []

    async def wait(item: int) -> None:
        await gates[item].wait()

    def begin(item: int) -> Awaitable[None]:
        begun.append(item)
        return wait(item)

    async with at_work(3, begin) as workers:
        for item in gates:
            workers.give(item)
        await turns()
        assert begun == [0, 1, 2]
        gates[1].set()
        await turns()
        assert begun == [0, 1, 2, 3]
        for gate in gates.values():
            gate.set()
        await turns()
        assert begun == [0, 1, 2, 3, 4]


async def test_what_nobody_has_begun_can_be_taken_back() -> None:
    gate = asyncio.Event()
    begun: list[int] = []

    async def wait() -> None:
        await gate.wait()

    def begin(item: int) -> Awaitable[None]:
        begun.append(item)
        return wait()

    async with at_work(1, begin) as workers:
        for item in range(4):
            workers.give(item)
        await turns()
        assert workers.take_back() == 3
        gate.set()
        await turns()
        assert begun == [0]
        workers.give(9)
        await turns()
        assert begun == [0, 9]


async def test_more_is_asked_for_when_nothing_is_left_to_begin_also_before_the_last_one_waits() -> None:
    """Else what is ready would lie there until something else happens."""
    gate = asyncio.Event()
    begun, more = list[int](), [1, 2, 3]

    async def wait() -> None:
        await gate.wait()

    def begin(item: int) -> Awaitable[None] | None:
        begun.append(item)
        return wait() if item == 2 else None

    async with at_work(2, begin) as workers:
        assert not workers.led

        def drained() -> None:
            if more:
                workers.give_all([more.pop(0)])

        workers.drained = drained
        workers.give(0)
        assert workers.led
        await turns()
        assert begun == [0, 1, 2, 3]
        assert not workers.led
        gate.set()
        await turns()
        assert not workers.led


async def test_who_leads_and_finds_that_all_was_taken_back_asks_for_more() -> None:
    begun = list[int]()
    async with at_work(2, begun.append) as workers:
        workers.give(0)
        assert workers.take_back() == 1
        workers.drained = lambda: workers.give(1) if not begun else None
        await turns()
        assert begun == [1]
        assert not workers.led


async def test_an_error_ends_them_all() -> None:
    def begin(item: int) -> None:
        raise LookupError("gone")

    async def work() -> None:
        async with at_work(2, begin) as workers:
            workers.give(1)
            await turns()

    with pytest.raises(ExceptionGroup) as raised:
        await work()
    assert [type(error) for error in raised.value.exceptions] == [LookupError]


@settings(max_examples=200, deadline=None)
@given(
    number=st.integers(1, 4),
    waits=st.lists(st.integers(0, 4), max_size=40),
    gaps=st.lists(st.integers(0, 3), max_size=40),
)
def test_nothing_is_forgotten_whoever_waits_how_long(number: int, waits: list[int], gaps: list[int]) -> None:
    """Strategy: turns that each item waits, and turns between one item and the next."""

    async def story() -> None:
        begun: list[int] = []
        at_once, most = 0, 0

        async def rest(item: int) -> None:
            nonlocal at_once
            await turns(waits[item])
            at_once -= 1

        def begin(item: int) -> Awaitable[None] | None:
            nonlocal at_once, most
            begun.append(item)
            if not waits[item]:
                return None
            at_once += 1
            most = max(most, at_once)
            return rest(item)

        async with at_work(number, begin) as workers:
            for item in range(len(waits)):
                workers.give(item)
                await turns(gaps[item] if item < len(gaps) else 0)
            await turns(8 + 6 * len(waits))
        assert begun == list(range(len(waits)))
        assert most <= number
        assert at_once == 0

    asyncio.run(story())
