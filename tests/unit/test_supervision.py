"""A background task lives as long as its block; its failure is the block's, out of any exception group."""

from __future__ import annotations

import asyncio

import pytest

from tidings._support.tasks import supervised, task_group, together


async def test_the_failure_of_the_work_ends_the_block_with_its_own_error() -> None:
    async def fail() -> None:
        raise LookupError("work")

    with pytest.raises(LookupError, match="work"):
        async with supervised(fail()):
            await asyncio.sleep(60)


async def test_the_failure_of_the_block_ends_the_work() -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    with pytest.raises(LookupError, match="block"):  # noqa: PT012 - the block is what is tested
        async with supervised(work()):
            await asyncio.sleep(0)
            raise LookupError("block")
    assert ended.is_set()


async def test_with_a_stop_event_the_work_ends_by_itself() -> None:
    stop, ended = asyncio.Event(), list[str]()

    async def work() -> None:
        await stop.wait()
        await asyncio.sleep(0)
        ended.append("in its own time")

    async with supervised(work(), stop=stop):
        pass
    assert ended == ["in its own time"]


async def test_a_cancellation_that_meets_an_error_is_not_forgotten() -> None:
    ending = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ending.set()
            await asyncio.sleep(0.01)

    async def stubborn() -> None:
        while True:
            try:
                async with supervised(work()):
                    await asyncio.sleep(0)
                    raise LookupError("block")
            except LookupError:
                await asyncio.sleep(0)

    task = asyncio.create_task(stubborn())
    await ending.wait()
    task.cancel()
    await asyncio.wait((task,), timeout=5)
    assert task.cancelled()


async def test_what_fails_after_the_block_was_left_is_no_cancellation() -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise LookupError("work")

    task = asyncio.current_task()
    assert task is not None
    with pytest.raises(ExceptionGroup) as raised:
        async with task_group() as tasks:
            tasks.create_task(fail())
    assert [str(error) for error in raised.value.exceptions] == ["work"]
    assert not task.cancelling()


async def test_what_fails_while_it_ends_is_raised() -> None:
    stop = asyncio.Event()

    async def fail() -> None:
        await stop.wait()
        await asyncio.sleep(0)
        raise LookupError("at the end")

    with pytest.raises(LookupError, match="at the end"):
        async with together(stop) as tasks:
            tasks.create_task(fail())
