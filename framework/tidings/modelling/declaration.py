"""The declaration of a service: a name, tables, limits, decorated handlers. It runs nothing."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from tidings.buses import check_partitions, check_service_name
from tidings.errors import ConfigurationError
from tidings.modelling.events import Event, Registry, wire_name
from tidings.modelling.handlers import Handler, Retry, Since, declare

if TYPE_CHECKING:
    from sqlalchemy import MetaData

__all__ = ["Declaration", "Lifespan"]

F = TypeVar("F", bound=Callable[..., Awaitable[None] | None])

Lifespan = Callable[[Any], AbstractAsyncContextManager[Any]]
"""A function that takes the service and returns a context manager around its run, which yields handlers' resources."""


class Declaration:
    """The part of `tidings.Service` that the rooms below read. It has no state of a run.

    The parameters are those of `tidings.Service`.
    """

    def __init__(
        self,
        name: str,
        *,
        tables: MetaData | None = None,
        lifespan: Lifespan | None = None,
        concurrency: int = 64,
        prefetch: int = 1000,
        partitions: int | None = None,
    ) -> None:
        if any(type(number) is not int or number < 1 for number in (concurrency, prefetch)):
            raise ConfigurationError(
                f"service {name!r}: concurrency={concurrency!r} and prefetch={prefetch!r} must be whole numbers from 1"
            )
        if lifespan is not None:
            _check_lifespan(name, lifespan)
        if tables is not None and not hasattr(tables, "sorted_tables"):
            raise ConfigurationError(
                f"service {name!r}: tables={tables!r}: give sqlalchemy.MetaData (of declarative models, Base.metadata)"
            )
        self.name = check_service_name(name)
        self.tables = tables
        self.resources = lifespan
        self.concurrency = concurrency
        self.prefetch = prefetch
        self.partitions = partitions if partitions is None else check_partitions(partitions)
        self.handlers: dict[str, tuple[Handler, ...]] = {}
        """Wire name to handlers, including those of `on_any`, in the order of their declaration."""
        self.handlers_of_any: tuple[Handler, ...] = ()
        """Handlers of `on_any`. Only they are given events of undeclared types."""
        self.named: dict[str, Handler] = {}
        """Name to handler."""
        self._types = Registry(f"service {name!r}")

    def on(
        self,
        *events: type[Event],
        name: str | None = None,
        retry: Retry | None = None,
        timeout: float = 30.0,
        replay: bool = True,
        was: tuple[str, ...] = (),
        since: Since = None,
    ) -> Callable[[F], F]:
        """Decorate a handler of these events. Returns the function unchanged.

        Parameters are injected by annotation: the event, `Context`, SQLAlchemy's `AsyncSession` or `AsyncConnection`,
        or a resource of the service's lifespan. `timeout` is the number of seconds that an attempt may take. Effects
        through the session happen exactly once, in order per partition key. Other effects happen at least once: pass
        `context.idempotency_key()` to them, and declare the handler with `replay=False`, so that `tidings replay` does
        not run it again.

        Several handlers of one event run one after the other, in the order of their declaration. Each is retried, held
        and given up on its own. While the first handler of an event holds it, later events of the same partition key
        wait in their own first handlers. A further handler of an event neither holds up others nor waits for them. A
        handler of several events may be the first one for some of them and a further one for others.

        `name`, by default the function's, is part of the ids of emitted events. When you rename a handler, keep its
        `name`, or list the former ones in `was`, oldest first, so that earlier emitted events are recognised.

        `since` says where a handler begins that is added to a service which has settled events before: "now" (the
        default) after those events, "start" with the first event of the log, or at a position. The handler is given
        its past while the other handlers go on, in order per partition key, before it is given new events. Without
        `since`, the service's log says what the handler was not given. Once the handler has begun, only a lower
        `since` has an effect: it adds the missing past.

        Raises `ConfigurationError` for a name that is used twice, or a signature that cannot be injected.
        """

        def register(function: F) -> F:
            policy = Retry() if retry is None else retry
            handler = declare(
                function, events, name=name, retry=policy, timeout=timeout, replay=replay, was=was, since=since
            )
            first_of = frozenset(wire_name(event) for event in events if self._is_first(event))
            handler = replace(handler, line=handler.name, first_of=first_of)
            self._add(handler)
            for event in dict.fromkeys(events):
                self._types.add(event)
                known = self.handlers.get(wire_name(event), self.handlers_of_any)
                self.handlers[wire_name(event)] = (*known, handler)
            return function

        return register

    def on_any(
        self,
        *,
        name: str | None = None,
        retry: Retry | None = None,
        timeout: float = 30.0,
        replay: bool = True,
        was: tuple[str, ...] = (),
        since: Since = None,
    ) -> Callable[[F], F]:
        """Decorate a handler of every event that reaches services, declared or not. The event is a `RecordedEvent`.

        Everything else is as for `on`. An event that has handlers of `on` is given to all of them. The handler is given
        its own emitted events, too.
        """

        def register(function: F) -> F:
            handler = declare(
                function,
                (),
                name=name,
                retry=Retry() if retry is None else retry,
                timeout=timeout,
                replay=replay,
                was=was,
                since=since,
                every=True,
            )
            handler = replace(handler, line=handler.name)
            self._add(handler)
            self.handlers_of_any += (handler,)
            self.handlers = {kind: (*known, handler) for kind, known in self.handlers.items()}
            return function

        return register

    def _is_first(self, event: type[Event]) -> bool:
        """Return whether only handlers of `on_any` take the event so far."""
        return all(not handler.events for handler in self.handlers.get(wire_name(event), ()))

    def _add(self, handler: Handler) -> None:
        if handler.name in self.named:
            raise ConfigurationError(
                f"service {self.name!r} has two handlers named {handler.name!r}: give one of them name=..., "
                "because the ids of emitted events are made from it"
            )
        for other in self.named.values():
            if both := handler.names & other.names:
                raise ConfigurationError(
                    f"service {self.name!r}: {min(both)!r} is, or was, the name of two handlers, {other.name!r} and "
                    f"{handler.name!r}: what was emitted and held under it belongs to one of them; take it out of the "
                    "other's was="
                )
        self.named[handler.name] = handler

    @property
    def names(self) -> frozenset[str]:
        """All present and former names of its handlers."""
        return frozenset().union(*(handler.names for handler in self.named.values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    def handlers_of(self, wire_name: str) -> tuple[Handler, ...]:
        """Return the handlers of an event type, in the order in which they run."""
        return self.handlers.get(wire_name, self.handlers_of_any)

    def view(self, wire_name: str) -> type[Event] | None:
        """Return the service's class for an event type, or None if it declares none."""
        return self._types.get(wire_name)


def _check_lifespan(name: str, lifespan: Lifespan) -> None:
    """Raise `ConfigurationError` for what could only fail when the service starts."""
    wanted = "give a function of the service that returns an async context manager"
    if not callable(lifespan):
        raise ConfigurationError(f"service {name!r}: lifespan={lifespan!r}: {wanted}")
    if inspect.isasyncgenfunction(lifespan) or inspect.iscoroutinefunction(lifespan):
        raise ConfigurationError(
            f"service {name!r}: lifespan={lifespan!r}: {wanted}. Decorate it: @contextlib.asynccontextmanager"
        )
    try:
        inspect.signature(lifespan).bind(object())
    except ValueError:  # a builtin that does not say what it takes
        return
    except TypeError as error:
        raise ConfigurationError(
            f"service {name!r}: lifespan={lifespan!r}: {wanted}; it is called with the service alone: {error}"
        ) from None
