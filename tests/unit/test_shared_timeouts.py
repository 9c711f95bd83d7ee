"""Waits that share a timer: each ends with its work or its time, and none of them ends the work."""

from __future__ import annotations

import asyncio

import pytest

from tidings._support.shared_timeouts import SharedTimeouts

LONG = 30.0


async def test_a_wait_ends_with_its_work() -> None:
    timeouts = SharedTimeouts()
    work = asyncio.get_running_loop().create_future()
    wait = asyncio.create_task(timeouts.wait(work, LONG))
    await asyncio.sleep(0)
    assert not wait.done()
    work.set_result(7)
    await wait


async def test_a_wait_for_what_is_done_is_none() -> None:
    work = asyncio.get_running_loop().create_future()
    work.set_exception(ValueError())
    await SharedTimeouts().wait(work, LONG)
    assert isinstance(work.exception(), ValueError)


async def test_each_wait_ends_after_its_own_time_in_whatever_order_they_began() -> None:
    timeouts, loop = SharedTimeouts(), asyncio.get_running_loop()
    works = [loop.create_future() for _ in range(4)]
    ended: list[int] = []

    async def wait(number: int, seconds: float) -> None:
        await timeouts.wait(works[number], seconds)
        ended.append(number)

    tasks = [asyncio.create_task(wait(number, s)) for number, s in enumerate((0.04, 0.01, LONG, 0.02))]
    await asyncio.wait(tasks[:2] + tasks[3:])
    assert ended == [1, 3, 0]
    assert not any(work.done() for work in works)
    works[2].set_result(None)
    await tasks[2]


async def test_a_wait_that_is_cancelled_leaves_its_work_and_the_other_waits() -> None:
    timeouts, loop = SharedTimeouts(), asyncio.get_running_loop()
    first, second = loop.create_future(), loop.create_future()
    cancelled = asyncio.create_task(timeouts.wait(first, 0.01))
    late = asyncio.create_task(timeouts.wait(second, 0.02))
    await asyncio.sleep(0)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert not first.done()
    await late
    assert not second.done()


async def test_two_waits_for_one_work_both_end() -> None:
    timeouts = SharedTimeouts()
    work = asyncio.get_running_loop().create_future()
    waits = [asyncio.create_task(timeouts.wait(work, seconds)) for seconds in (0.01, LONG)]
    await waits[0]
    work.set_result(None)
    await waits[1]
