"""What `asyncio.Task(eager_start=True)` does, for Python 3.11, which has no such thing. `eager` says why and when.

It goes with Python 3.11.
"""

from __future__ import annotations

import asyncio
import contextvars
from asyncio.tasks import _current_tasks  # type: ignore[attr-defined]
from collections.abc import Coroutine, Generator
from typing import Any, Final, TypeVar

__all__ = ["EagerStart"]

T = TypeVar("T")

SPARE: Final = "spare task for handlers"


class EagerStart:
    """For one event loop; `open` and `close` it there.

    A spare task is the current one during each first step, so that what the coroutine does with its task (a timeout, a
    task group, a cancellation) is done to the one that the rest runs in. Where there is no rest, it waits for the next.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._spare: _Spare | None = None

    def run(
        self, work: Coroutine[Any, Any, T], variables: contextvars.Context, name: str
    ) -> tuple[asyncio.Task[T] | None, T | None]:
        """Begin, with `variables` as its context; call it within a task. Return the task in which the rest runs, so
        named, or None and what the coroutine returned.

        The coroutine must raise nothing at its first step.
        """
        loop, spare = self._loop, self._spare
        if spare is None or not spare.started:  # a task that is cancelled before it has started runs nothing of it
            self.open()
            return loop.create_task(work, name=name, context=variables), None
        # To change the current task by `_leave_task` and `_enter_task` takes three times as long.
        task, caller = spare.task, _current_tasks[loop]
        task.set_name(name)
        _current_tasks[loop] = task
        try:
            waits_for = variables.run(work.send, None)
        except StopIteration as end:
            if not task.cancelling():
                task.set_name(SPARE)
                return None, end.value
            self._spare = None  # it cancelled its own task, which ends so now
            return task, None
        finally:
            _current_tasks[loop] = caller
        self._spare = None
        spare.hand(_Rest(work, variables, waits_for))
        return task, None

    def open(self) -> None:
        """Have a spare task for the first one too: it has started when the loop has turned once."""
        self._spare = self._spare or _Spare(self._loop)

    def close(self) -> None:
        if self._spare is not None:
            self._spare.task.cancel()


class _Spare:
    """A task that waits until it is given the rest of a coroutine."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.started = False
        self._rest: _Rest | None = None
        self._handed: asyncio.Future[None] = loop.create_future()
        self.task: asyncio.Task[Any] = loop.create_task(self._run(), name=SPARE)

    def hand(self, rest: _Rest) -> None:
        self._rest = rest
        if not self._handed.done():
            self._handed.set_result(None)

    async def _run(self) -> Any:
        self.started, cancelled = True, None
        try:
            await self._handed
        except asyncio.CancelledError as error:
            cancelled = error
        if self._rest is None:
            assert cancelled is not None
            raise cancelled
        self._rest.cancelled = cancelled
        return await self._rest


class _Rest:
    """What is left of a coroutine that waits for a future, in the context that it began in."""

    def __init__(self, work: Coroutine[Any, Any, Any], context: contextvars.Context, waits_for: Any) -> None:
        self._work = work
        self._context = context
        self._waits_for = waits_for
        self.cancelled: asyncio.CancelledError | None = None
        """It was cancelled before the task came to it."""

    def __await__(self) -> Generator[Any, Any, Any]:
        run, work, waits_for = self._context.run, self._work, self._waits_for
        try:
            if self.cancelled is not None:
                if waits_for is not None:
                    waits_for.cancel()
                waits_for = run(work.throw, self.cancelled)
            while True:
                try:
                    answer = yield waits_for
                except GeneratorExit:
                    work.close()
                    raise
                except BaseException as thrown:
                    waits_for = run(work.throw, thrown)
                else:
                    waits_for = run(work.send, answer)
        except StopIteration as end:
            return end.value
