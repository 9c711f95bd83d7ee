"""Aggregates: state that is the sum of a stream's events, and decisions that record new ones. Pure, no I/O."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from tidings.errors import ConfigurationError, UnknownEventType
from tidings.events import Event
from tidings.position import RESERVED
from tidings.stores import check_stream_name

__all__ = ["Aggregate", "evolves"]

F = TypeVar("F", bound=Callable[..., None])


def evolves(*events: type[Event]) -> Callable[[F], F]:
    """Mark the method that applies these events to the state. It must not decide, fail or do I/O.

    A subclass that overrides the method replaces it. Raises `ConfigurationError` for what is no event class.
    """
    strangers = [event for event in events if not (isinstance(event, type) and issubclass(event, Event))]
    if strangers or not events:
        raise ConfigurationError(
            f"@evolves needs subclasses of tidings.Event, as in @evolves(OrderCreated): {strangers}"
        )

    def mark(method: F) -> F:
        method.__evolves__ = events  # type: ignore[attr-defined]
        return method

    return mark


class Aggregate:
    """Subclass with a category; the stream of one aggregate is `<category>-<id>`.

        class Order(Aggregate, category="order"):
            def __init__(self):
                self.status = "new"

            def place(self, lines):
                self.record(OrderCreated(order_id=self.id, lines=lines))

            @evolves(OrderCreated)
            def _placed(self, event):
                self.status = "placed"

    `__init__` takes no arguments: it is the state before the first event.
    """

    category: ClassVar[str] = ""
    evolutions: ClassVar[dict[type[Event], Callable[[Any, Any], None]]] = {}

    id: str
    version: int
    """Version of the last event applied from the stream; -1 before the first. Recorded events do not count yet."""
    recorded: list[Event]
    """Events recorded since the last load, oldest first."""

    def __init_subclass__(cls, *, category: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.category = cls.__name__.lower() if category is None else category
        where = f"aggregate {cls.__module__}.{cls.__qualname__}"
        check_stream_name(cls.category)
        if cls.category.startswith(RESERVED) or "-" in cls.category:
            raise ConfigurationError(
                f"{where}: category {cls.category!r} must not begin with '$', 'tidings_' or 'tidings.', nor contain '-'"
            )
        cls.evolutions = {}
        for base in reversed(cls.__mro__[1:]):
            for event, method in getattr(base, "evolutions", {}).items():
                cls.evolutions[event] = getattr(cls, method.__name__, method)
        own: set[type[Event]] = set()
        for method in vars(cls).values():
            for event in getattr(method, "__evolves__", ()):
                if event in own:
                    raise ConfigurationError(f"{where}: two methods evolve {event.__name__}")
                own.add(event)
                cls.evolutions[event] = method

    @classmethod
    def empty(cls, id: str) -> Any:
        """A new aggregate without events."""
        if not id:
            raise ConfigurationError(f"aggregate {cls.__qualname__}: an empty id names no stream")
        aggregate = cls()
        aggregate.id, aggregate.version, aggregate.recorded = id, -1, []
        return aggregate

    @classmethod
    def stream_of(cls, id: str) -> str:
        return f"{cls.category}-{id}"

    def record(self, event: Event) -> None:
        """Decide: apply the event to the state now; it is appended when the decision has returned."""
        self.apply(event)
        self.recorded.append(event)

    def apply(self, event: Event) -> None:
        """Raises `UnknownEventType` when no method `@evolves` the event's class."""
        method = self.evolutions.get(type(event))
        if method is None:
            known = ", ".join(kind.__name__ for kind in self.evolutions)
            raise UnknownEventType(
                f"aggregate {type(self).__qualname__} has no @evolves({type(event).__name__}); it knows {known}"
            )
        method(self, event)
