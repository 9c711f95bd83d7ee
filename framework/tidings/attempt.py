"""One attempt of one handler at one event: inject, run within its time, and judge how it ended."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from tidings.codec import decode
from tidings.context import Context
from tidings.database import is_outage
from tidings.errors import (
    BusUnavailable,
    ConfigurationError,
    EventTooLarge,
    Fenced,
    HandlerTimeout,
    InvalidStreamName,
    SchemaError,
    StoreUnavailable,
    TransactionMisuse,
)
from tidings.events import Event
from tidings.handlers import Handler, Inject

__all__ = ["Failure", "Resources", "attempt", "is_infrastructure"]

PERMANENT: Final = (SchemaError, TransactionMisuse, ConfigurationError, EventTooLarge, InvalidStreamName)
"""Errors that the next attempt would meet again."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt failed."""

    reason: str
    """One line: the error's type and message."""
    detail: str
    """The traceback."""
    permanent: bool

    @classmethod
    def of(cls, error: BaseException, handler: Handler) -> Failure:
        lines = "".join(traceback.format_exception(error))
        return cls(
            f"{type(error).__name__}: {error}"[:2000],
            lines[-20_000:],
            isinstance(error, PERMANENT + handler.retry.permanent),
        )


class Resources:
    """What the service's lifespan yielded, found by type."""

    def __init__(self, service: str, yielded: Any) -> None:
        self._service = service
        self._objects: tuple[Any, ...] = (
            () if yielded is None else tuple(yielded) if isinstance(yielded, tuple) else (yielded,)
        )

    def find(self, wanted: type, handler: str) -> Any:
        """The one resource of this type. Raises `ConfigurationError` when there is none, or more than one."""
        if getattr(wanted, "_is_protocol", False) and not getattr(wanted, "_is_runtime_protocol", False):
            raise ConfigurationError(
                f"service {self._service!r}, handler {handler!r}: decorate protocol {wanted.__name__} with "
                "@runtime_checkable, so that its resource can be found"
            )
        found = [candidate for candidate in self._objects if isinstance(candidate, wanted)]
        if len(found) != 1:
            yields = ", ".join(type(candidate).__name__ for candidate in self._objects) or "nothing"
            raise ConfigurationError(
                f"service {self._service!r}, handler {handler!r} asks for a {wanted.__name__}: the service's lifespan "
                f"yields {yields}; exactly one must match"
            )
        return found[0]

    def check(self, handler: Handler) -> None:
        """Raises `ConfigurationError` now for what `find` could not give later."""
        for _, wanted in handler.parameters:
            if not isinstance(wanted, Inject):
                self.find(wanted, handler.name)


def is_infrastructure(error: BaseException) -> bool:
    """The service's database, the store or the bus is away: the service pauses, and no attempt is counted."""
    return isinstance(error, Fenced | StoreUnavailable | BusUnavailable) or is_outage(error)


async def attempt(
    handler: Handler, view: type[Event], context: Context, resources: Resources, provide: Callable[[Inject], Any]
) -> Failure | None:
    """Run the handler once; None when it succeeded. `provide` gives the session or connection.

    Raises only what is not the handler's own: infrastructure errors, and the cancellation of the running task.
    """
    task = asyncio.current_task()
    assert task is not None
    limit = asyncio.timeout(handler.timeout)
    try:
        event = decode(context.event, view, context.metadata)
        arguments: dict[str, Any] = {}
        for parameter, wanted in handler.parameters:
            if wanted is Inject.EVENT:
                arguments[parameter] = event
            elif wanted is Inject.CONTEXT:
                arguments[parameter] = context
            elif isinstance(wanted, Inject):
                arguments[parameter] = provide(wanted)
            else:
                arguments[parameter] = resources.find(wanted, handler.name)
        async with limit:
            if handler.threaded:
                await asyncio.to_thread(handler.function, **arguments)
            else:
                await handler.function(**arguments)  # type: ignore[misc]
    except BaseException as error:
        if isinstance(error, TimeoutError) and limit.expired():
            return Failure.of(HandlerTimeout(handler.name, handler.timeout), handler)
        if isinstance(error, asyncio.CancelledError) and task.cancelling():
            raise
        if is_infrastructure(error):
            raise
        # SystemExit, KeyboardInterrupt and CancelledError raised by a handler are its failures, not the process's end.
        return Failure.of(error, handler)
    return None
