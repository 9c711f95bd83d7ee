"""One attempt of one handler at one event: inject, run within its time, and judge how it ended."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import structlog

from tidings._support.eager import EagerStart
from tidings._support.shared_timeouts import SharedTimeouts
from tidings.database.outages import is_outage
from tidings.delivery.failure import Failure
from tidings.delivery.log_facts import bind_handling, handling
from tidings.delivery.owned import Ours
from tidings.delivery.resources import Resources
from tidings.delivery.site import Witness
from tidings.errors import (
    BusUnavailable,
    ConfigurationError,
    Fenced,
    HandlerTimeout,
    StoreUnavailable,
    TidingsError,
    WriterHeld,
)
from tidings.modelling.codec import check_key, decode
from tidings.modelling.context import ATTEMPT, Context
from tidings.modelling.events import Event
from tidings.modelling.handlers import Handler, Inject

if TYPE_CHECKING:
    from tidings.modelling.declaration import Declaration

__all__ = ["Attempt", "Attempts", "HandlerThreads", "is_infrastructure"]

log = structlog.get_logger("tidings.attempt")

INSIST_SECONDS: Final = 1.0
"""Seconds after which a handler that goes on in spite of its timeout is cancelled again."""
PARTING_SECONDS: Final = 1.0
"""Seconds that a stopping service waits for a handler that it cancelled."""

WAITING_SECONDS: Final = 0.05
"""Seconds between looks whether a handler that waited for its transaction is over its time."""

# To look a member up in its class takes ten times as long on Python 3.11, and is done for each event.
_EVENT: Final = Inject.EVENT
_CONTEXT: Final = Inject.CONTEXT
_RECORDED: Final = Inject.RECORDED

HANDLER_TASK: Final = "handler "
"""The beginning of the name of each task that runs a handler."""


def is_infrastructure(error: BaseException) -> bool:
    """A database, store or bus is away. For errors that no handler raised; `Ours` judges those (`owned`)."""
    return isinstance(error, Fenced | StoreUnavailable | BusUnavailable) or is_outage(error)


class Attempt:
    """One that has begun and waits for something. Attempts never overlap: one that is over its time is waited for."""

    __slots__ = ("_context", "_handler", "_ours", "_timeouts", "_work")

    def __init__(
        self,
        work: asyncio.Future[BaseException | None],
        handler: Handler,
        context: Context,
        ours: Ours,
        timeouts: SharedTimeouts,
    ) -> None:
        self._ours = ours
        self._timeouts = timeouts
        self._work = work
        self._handler = handler
        self._context = context

    def cut_off(self, why: str) -> None:
        """Cancel the handler; `why` continues "the handler ...". Its outcome will say how it took that."""
        self._context.end(why)
        self._work.cancel()

    async def outcome(self) -> Failure | None:
        """None when it succeeded. Raises what `begin` does, and the cancellation of the running task."""
        try:
            late = await _ended(self._work, self._handler, self._context, self._timeouts)
        finally:
            self._context.end("was stopped with its process, or to be run again")
        if self._work.cancelled():  # it cancelled its own task, and returned without another await
            cancelled = asyncio.CancelledError("the handler cancelled its own task")
            return _judged(self._ours, self._handler, self._context, cancelled, late)
        return _judged(self._ours, self._handler, self._context, self._work.result(), late)


class HandlerThreads(ThreadPoolExecutor):
    """Threads of the plain handlers of one service."""


class Attempts:
    """How the handlers of one service are called; for one event loop."""

    def __init__(
        self,
        service: Declaration,
        resources: Resources,
        ours: Ours,
        witness: Witness | None = None,
        threads: Executor | None = None,
    ) -> None:
        self._witness = witness
        self._view = service.view
        self._ours = ours
        self._resources = resources
        self._first_step = EagerStart()
        self._timeouts = SharedTimeouts()
        self._threads = threads or HandlerThreads(service.concurrency, thread_name_prefix=f"tidings-{service.name}")
        self._service = service.name
        self._reader = f"service {service.name!r}"
        self._views: dict[str, type[Event]] = {}
        """By wire name: what `_view` said."""
        self._beginnings: dict[str, tuple[contextvars.Context, str]] = {}
        """By handler: the variables that its calls begin with, and the name of their tasks."""

    def begin(self, handler: Handler, context: Context, provide: Callable[[Inject], Any]) -> Attempt | Failure | None:
        """Run the handler until it waits for something; what came of it, None for success, when it waited for nothing.

        `provide` gives the session or connection. The handler runs in a task of its own, so that nothing it does to
        its task (or that its time does) reaches the caller's; a plain function runs in a thread. Call it in a task.
        Raises only what is not the handler's: the outage of an object of the service's own.
        """
        arguments: dict[str, Any] = {}
        try:
            if handler.events:
                kind = context.event.type
                view = self._views.get(kind)
                if view is None:
                    view = self._view(kind)
                    assert view is not None
                    self._views[kind] = view
                event = decode(context.event, view, context.metadata, reader=self._reader)
                check_key(context.event, event, context.metadata, reader=self._reader)
            for parameter, wanted in handler.parameters:
                if wanted is _EVENT:
                    arguments[parameter] = event
                elif wanted is _CONTEXT:
                    arguments[parameter] = context
                elif wanted is _RECORDED:
                    arguments[parameter] = context.event
                elif isinstance(wanted, Inject):
                    arguments[parameter] = provide(wanted)
                else:
                    arguments[parameter] = self._resources.find(wanted, handler.name)
        except TidingsError as error:
            context.end("was not called")
            return Failure.of(error, handler)
        beginning = self._beginnings.get(handler.name)
        if beginning is None:
            beginning = handling(self._service, handler.name), HANDLER_TASK + handler.name
            self._beginnings[handler.name] = beginning
        variables = beginning[0].copy()
        if handler.threaded:
            call = partial(variables.run, _call, handler, arguments, context, self._witness)
            thread = asyncio.get_running_loop().run_in_executor(self._threads, call)
            return Attempt(thread, handler, context, self._ours, self._timeouts)
        attempt = _run(handler, arguments, context, self._witness)
        work, raised = self._first_step.run(attempt, variables, beginning[1])
        if work is not None:
            return Attempt(work, handler, context, self._ours, self._timeouts)
        return None if raised is None else _judged(self._ours, handler, context, raised, late=False)

    def open(self) -> None:
        """Get ready for the first one."""
        self._first_step.open()

    def close(self) -> None:
        """Begin nothing more. Threads at work go on: nothing can end them."""
        self._threads.shutdown(wait=False)
        self._first_step.close()


def _judged(ours: Ours, handler: Handler, context: Context, raised: BaseException | None, late: bool) -> Failure | None:
    if raised is not None and context.works and ours.waits_for_itself(raised):
        writer_held = WriterHeld(handler.name)
        writer_held.__cause__ = raised
        return Failure.of(writer_held, handler)
    if raised is not None and (outage := ours.outage(raised)) is not None:
        raise outage
    if late:
        timeout = HandlerTimeout(handler.name, handler.timeout)
        timeout.__cause__ = raised
        return Failure.of(timeout, handler)
    return None if raised is None else Failure.of(raised, handler)


# What a handler raises is returned: SystemExit and KeyboardInterrupt would end the event loop on their way out of a
# task, and StopIteration cannot pass through a future.


async def _run(
    handler: Handler, arguments: dict[str, Any], context: Context, witness: Witness | None
) -> BaseException | None:
    bind_handling(context)
    ATTEMPT.set(context)
    try:
        if witness is not None:
            witness.begins(context)
        await handler.function(**arguments)  # type: ignore[misc]
    except BaseException as error:
        context.end("had failed")
        return error
    context.end("had returned")
    return None


def _call(
    handler: Handler, arguments: dict[str, Any], context: Context, witness: Witness | None
) -> BaseException | None:
    bind_handling(context)
    ATTEMPT.set(context)
    try:
        if witness is not None:
            witness.begins(context)
        result = handler.function(**arguments)
        if inspect.iscoroutine(result):
            result.close()
        if inspect.isawaitable(result) or inspect.isasyncgen(result) or inspect.isgenerator(result):
            raise ConfigurationError(
                f"handler {handler.name!r} is a plain function, but returned a {type(result).__name__} that nobody "
                "runs: make it 'async def', without yield"
            )
    except BaseException as error:
        context.end("had failed")
        return error
    context.end("had returned")
    return None


async def _ended(
    work: asyncio.Future[BaseException | None], handler: Handler, context: Context, timeouts: SharedTimeouts
) -> bool:
    """Wait until the handler has ended; True when it took longer than its time."""
    loop = asyncio.get_running_loop()
    left, ends = handler.timeout, loop.time() + handler.timeout
    try:
        while left > 0:
            await timeouts.wait(work, left)
            if work.done():
                return False
            # What it waited for its transaction does not count: others were at work in that time.
            left = ends + context.waited(loop.time()) - loop.time()
            if left > 0:
                left = max(left, WAITING_SECONDS)
        context.end(f"was over its time of {handler.timeout:g} s")
        await _insist(work, handler, context)
    except asyncio.CancelledError:
        context.end("was stopped with its process, or to be run again")
        # The service stops, or joins again: then the event is handled anew, and should not meet this attempt.
        with suppress(TimeoutError):
            async with asyncio.timeout(PARTING_SECONDS):
                await _insist(work, handler, context)
        raise
    return True


async def _insist(work: asyncio.Future[BaseException | None], handler: Handler, context: Context) -> None:
    """Cancel until it has effect; a thread, or a handler that catches every cancellation, can only be named."""
    asked, told = 0, 1
    while not work.done():
        if not handler.threaded:
            work.cancel()
        await asyncio.wait((work,), timeout=INSIST_SECONDS)
        asked += 1
        if not work.done() and asked == told:
            told = min(told * 2, told + 60)
            log.error(
                "handler.ignores_timeout",
                service=context.service,
                handler=handler.name,
                position=context.position,
                seconds_over=asked * INSIST_SECONDS,
                advice="nothing can end a thread, or a handler that catches CancelledError: its key waits for it",
            )
