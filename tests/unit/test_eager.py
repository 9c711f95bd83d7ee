"""A coroutine whose first step runs at once is in no way different from one that runs in a task of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextvars import ContextVar, copy_context
from typing import Any

import pytest

from tidings._support.eager import EagerStart

WORD: ContextVar[str] = ContextVar("word", default="nobody's")


@pytest.fixture
async def eager() -> AsyncIterator[EagerStart]:
    """Prepare a spare task that has started."""
    found = EagerStart()
    await ended(found, nothing())
    await asyncio.sleep(0)
    yield found
    found.close()
    await asyncio.sleep(0)
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not [task for task in left if "spare" in task.get_name()], "a spare task is left"


async def nothing() -> None:
    pass


async def ended(eager: EagerStart, work: Coroutine[Any, Any, Any]) -> Any:
    task, result = eager.run(work, copy_context(), "test")
    return result if task is None else await task


async def test_what_waits_for_nothing_has_ended_when_run_returns(eager: EagerStart) -> None:
    async def work() -> int:
        return 7

    for _ in range(3):
        assert eager.run(work(), copy_context(), "test") == (None, 7)


async def test_the_first_one_of_all_may_run_in_a_task_as_any_other() -> None:
    async def work() -> int:
        return 7

    eager = EagerStart()
    assert await ended(eager, work()) == 7
    eager.close()


async def test_it_is_the_same_task_before_and_after_the_first_wait(eager: EagerStart) -> None:
    seen = []

    async def work() -> None:
        for _ in range(3):
            seen.append(asyncio.current_task())
            await asyncio.sleep(0)

    task, _ = eager.run(work(), copy_context(), "test")
    assert task is not None
    caller = asyncio.current_task()
    await task
    assert seen == [task] * 3
    assert task is not caller
    assert asyncio.current_task() is caller
    assert task.get_name() == "test"


async def test_several_wait_side_by_side(eager: EagerStart) -> None:
    gate = asyncio.Event()

    async def work(number: int) -> int:
        await gate.wait()
        return number

    running = [eager.run(work(number), copy_context(), "test")[0] for number in range(5)]
    gate.set()
    assert await asyncio.gather(*(task for task in running if task is not None)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("seconds", [0.0, 0.01])
async def test_a_timeout_of_its_own_ends_its_wait(eager: EagerStart, seconds: float) -> None:
    async def work() -> str:
        try:
            async with asyncio.timeout(seconds):
                await asyncio.Event().wait()
        except TimeoutError:
            return "in time"
        return "never"

    assert await ended(eager, work()) == "in time"


async def test_a_task_group_of_its_own_hears_of_a_child_that_fails(eager: EagerStart) -> None:
    async def child() -> None:
        raise ValueError("child")

    async def work() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(child())
            await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as heard:
        await ended(eager, work())
    assert heard.group_contains(ValueError, match="child")


@pytest.mark.parametrize("turns", [0, 1, 3])
async def test_cancelled_from_outside_it_hears_of_it_where_it_waits(eager: EagerStart, turns: int) -> None:
    heard = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            heard.append(True)
            raise

    task, _ = eager.run(work(), copy_context(), "test")
    assert task is not None
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert heard == [True]


async def test_cancelled_before_the_loop_has_turned_what_has_begun_hears_of_it(eager: EagerStart) -> None:
    """The spare task is taken, and the next one has not started yet."""
    begun, heard = [], []

    async def work(number: int) -> None:
        begun.append(number)
        try:
            await asyncio.Event().wait()
        finally:
            heard.append(number)

    running = [eager.run(work(number), copy_context(), "test")[0] for number in range(3)]
    for task in running:
        assert task is not None
        task.cancel()
    await asyncio.gather(*(task for task in running if task is not None), return_exceptions=True)
    assert heard == begun
    assert 0 in begun


@pytest.mark.parametrize("waits", [True, False], ids=["then waits", "then returns"])
async def test_one_that_cancels_its_own_task_is_cancelled_alone(eager: EagerStart, waits: bool) -> None:
    heard = []

    async def work() -> None:
        own = asyncio.current_task()
        assert own is not None
        own.cancel()
        if waits:
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                heard.append(True)
                raise

    task, _ = eager.run(work(), copy_context(), "test")
    assert task is not None
    with pytest.raises(asyncio.CancelledError):
        await task
    assert heard == [True] * waits
    assert await ended(eager, nothing()) is None


async def test_its_context_is_its_own_from_the_first_step_to_the_last(eager: EagerStart) -> None:
    seen = []

    async def work(word: str) -> None:
        seen.append(WORD.get())
        WORD.set(word)
        if word == "waits":
            await asyncio.sleep(0)
        seen.append(WORD.get())

    await ended(eager, work("waits"))
    await asyncio.sleep(0)
    await ended(eager, nothing())
    await asyncio.sleep(0)
    await ended(eager, work("ends"))
    assert seen == ["nobody's", "waits", "nobody's", "ends"]
    assert WORD.get() == "nobody's"
