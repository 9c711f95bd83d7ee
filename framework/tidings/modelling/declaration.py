"""What a service is, as its user declares it: a name, tables, limits, decorated handlers. It runs nothing."""

from __future__ import annotations

from collections.abc import Callable
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

F = TypeVar("F", bound=Callable[..., Any])

Lifespan = Callable[[Any], AbstractAsyncContextManager[Any]]
"""Given the service, returns a context manager around its run, which yields the resources of its handlers."""


class Declaration:
    """The part of `tidings.Service` that everything below it reads: it has no state of a run.

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
        if lifespan is not None and not callable(lifespan):
            raise ConfigurationError(
                f"service {name!r}: lifespan={lifespan!r}: give a function of the service that returns an async "
                "context manager"
            )
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
        """By wire name, in the order of their declaration; those of `on_any` are among them."""
        self.handlers_of_any: tuple[Handler, ...] = ()
        """Those of `on_any`: of types that are not declared, they alone are given the events."""
        self.named: dict[str, Handler] = {}
        """All handlers by name."""
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
        """Handle these events; returns the function unchanged.

        Several handlers of one event run one after the other, in the order of their declaration; each is retried, held
        and given up on its own. While the first handler of an event holds one, later events of the same partition key
        wait for it in their own first handlers. A further handler of an event neither holds up others nor waits for
        them. A handler of several events may be the first for some of them, and a further one for others.

        Parameters are injected by annotation: the event, `Context`, SQLAlchemy's `AsyncSession` or `AsyncConnection`,
        or a resource of the service's lifespan. `timeout` is seconds per attempt. Effects through the session happen
        exactly once, in order per partition key; others at least once: give them `context.idempotency_key()`.
        `replay=False` is for handlers with such other effects: `tidings replay` does not run them again.
        `name`, by default the function's, is part of the ids of what the handler emits. When a handler is renamed, keep
        its `name`, or list the former ones in `was`, the oldest first: what it emitted under them is then recognised.
        `since` says where a handler begins that is new in a service which has settled events before: "now" (the
        default) after them, "start" with the first event of the log, or at a position. Its past is then done beside
        the other handlers' present, in order per partition key, before it is given new events. Without `since`, the
        service says in its log what the handler was not given. It counts until the handler has begun; a lower one
        later adds the past that is missing.
        Raises `ConfigurationError` for a name used twice, or a signature that cannot be served.
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
        """Handle every event that the log carries to services, of whatever type, declared or not, as a
        `RecordedEvent`; everything else is as with `on`.

        Events that a handler of `on` takes are given to both. What the handler itself emits comes back to it.
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
        """No other handler but those of `on_any` takes the event."""
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
        """All that its handlers have, or had."""
        return frozenset().union(*(handler.names for handler in self.named.values()))

    def handlers_of(self, wire_name: str) -> tuple[Handler, ...]:
        """The handlers that are given an event of this type, in the order in which they run."""
        return self.handlers.get(wire_name, self.handlers_of_any)

    def view(self, wire_name: str) -> type[Event] | None:
        """This service's declaration of an event type, None for one it does not declare."""
        return self._types.get(wire_name)
