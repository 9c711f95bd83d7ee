"""Aggregates: state that is the sum of a stream's events, and decisions that record new ones. Pure, no I/O.

Tidings adds only the attribute `__tidings__`: to a class a `Declaration`, to an instance a `State`. `id`, `version`,
`record` and the others are a convenience for users, who may have their own attributes with these names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

from tidings.errors import ConfigurationError, UnknownEventType
from tidings.modelling.events import Event
from tidings.protocol.position import RESERVED
from tidings.stores import check_stream_name

__all__ = ["Aggregate", "State", "apply", "begin", "declared", "evolves", "state_of", "stream_of", "stream_version"]

A = TypeVar("A", bound="Aggregate")
F = TypeVar("F", bound=Callable[..., None])


def evolves(*events: type[Event]) -> Callable[[F], F]:
    """Mark the method that applies these events to the state. It must not decide, fail or do I/O.

    A method that overrides it in a subclass replaces it. Raises `ConfigurationError` if `events` are not event classes.
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


class Declaration:
    """What Tidings knows about an aggregate class."""

    __slots__ = ("category", "evolutions")

    def __init__(self, category: str, evolutions: dict[type[Event], Callable[[Any, Any], None]]) -> None:
        self.category: Final = category
        self.evolutions: Final = evolutions
        """Event class to the method that applies it."""


class State:
    """What Tidings knows about one aggregate."""

    __slots__ = ("id", "recorded", "version")

    def __init__(self, id: str) -> None:
        self.id: Final = id
        self.version = -1
        """Version of the last event applied from the stream; -1 before the first."""
        self.recorded: list[Event] = []
        """Events recorded since the last load, oldest first."""


class _OfState:
    """An attribute of `State`, shown on the aggregate. An attribute with the same name in a subclass or instance hides
    it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, aggregate: Aggregate | None, owner: type) -> Any:
        return self if aggregate is None else getattr(state_of(aggregate), self._name)


class _OfClass:
    """An attribute of `Declaration`, shown on the aggregate, as `_OfState` does."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, aggregate: Aggregate | None, owner: type[Aggregate]) -> Any:
        return getattr(declared(owner), self._name)


class Aggregate:
    """Base class of aggregates. The stream of an aggregate is `<category>-<id>`.

        class Order(Aggregate, category="order"):
            def __init__(self):
                self.status = "new"

            def place(self, lines):
                self.record(OrderCreated(order_id=self.id, lines=lines))

            @evolves(OrderCreated)
            def _placed(self, event):
                self.status = "placed"

    `__init__` takes no arguments and sets the state before the first event. A subclass may have its own attributes
    `id`, `version`, `category` and so on; `stream_version(order)` always returns the version of the stream.
    """

    __tidings__: ClassVar[Declaration] = Declaration("", {})

    if TYPE_CHECKING:
        category: ClassVar[str]
        evolutions: ClassVar[dict[type[Event], Callable[[Any, Any], None]]]
        id: str
        version: int
        """Version of the last event applied from the stream; -1 before the first. Recorded events do not count yet."""
        recorded: list[Event]
        """Events recorded since the last load, oldest first."""
    else:
        category, evolutions = _OfClass(), _OfClass()
        id, version, recorded = _OfState(), _OfState(), _OfState()

    def __init_subclass__(cls, *, category: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        where = f"aggregate {cls.__module__}.{cls.__qualname__}"
        copied = vars(cls).get("__tidings__")
        if isinstance(copied, Declaration):  # `@dataclass(slots=True)` creates the class a second time
            category = copied.category if category is None else category
        elif copied is not None or "__tidings__" in inspect.get_annotations(cls):
            raise ConfigurationError(f"{where}: the name __tidings__ belongs to Tidings; use any other name")
        category = cls.__name__.lower() if category is None else category
        check_stream_name(category)
        if category.startswith(RESERVED) or "-" in category:
            raise ConfigurationError(
                f"{where}: category {category!r} must not begin with '$', 'tidings_' or 'tidings.', nor contain '-'"
            )
        evolutions: dict[type[Event], Callable[[Any, Any], None]] = {}
        for base in reversed(cls.__mro__[1:]):
            own = vars(base).get("__tidings__")
            for event, method in own.evolutions.items() if isinstance(own, Declaration) else ():
                evolutions[event] = getattr(cls, method.__name__, method)
        mine: set[type[Event]] = set()
        for method in list(vars(cls).values()):
            for event in getattr(method, "__evolves__", ()):
                if event in mine:
                    raise ConfigurationError(f"{where}: two methods evolve {event.__name__}")
                mine.add(event)
                evolutions[event] = method
        cls.__tidings__ = Declaration(category, evolutions)

    @classmethod
    def empty(cls, id: str) -> Any:
        """Return a new aggregate without events."""
        return begin(cls, id)

    @classmethod
    def stream_of(cls, id: str) -> str:
        return stream_of(cls, id)

    def record(self, event: Event) -> None:
        """Record an event: apply it to the state now, and append it when the decision has returned."""
        state = state_of(self)
        apply(self, event)
        state.recorded.append(event)

    def apply(self, event: Event) -> None:
        """Apply an event to the state. Raises `UnknownEventType` if no method `@evolves` its class."""
        apply(self, event)


def begin(kind: type[A], id: str) -> A:
    """Return a new aggregate without events."""
    if not id:
        raise ConfigurationError(f"aggregate {kind.__qualname__}: an empty id names no stream")
    aggregate = kind.__new__(kind)
    vars(aggregate)["__tidings__"] = State(id)
    aggregate.__init__()  # type: ignore[misc]
    return aggregate


def state_of(aggregate: Aggregate) -> State:
    """Return an aggregate's id, version and recorded events, whatever attributes of these names it has."""
    state = vars(aggregate).get("__tidings__")
    if not isinstance(state, State):
        name = type(aggregate).__qualname__
        raise ConfigurationError(f"this {name} has no id: make it with {name}.empty(id), not with {name}()")
    return state


def stream_version(aggregate: Aggregate) -> int:
    """Return the version of the last event applied from the aggregate's stream; -1 before the first."""
    return state_of(aggregate).version


def declared(kind: type[Aggregate]) -> Declaration:
    """Return what an aggregate class declares, whatever attributes it has."""
    found: Declaration = kind.__tidings__
    return found


def stream_of(kind: type[Aggregate], id: str) -> str:
    """Return the name of the stream of the aggregate `id`."""
    return f"{declared(kind).category}-{id}"


def apply(aggregate: Aggregate, event: Event) -> None:
    """Apply an event to the state. Raises `UnknownEventType` if no method `@evolves` its class."""
    evolutions = declared(type(aggregate)).evolutions
    method = evolutions.get(type(event))
    if method is None:
        known = ", ".join(kind.__name__ for kind in evolutions)
        raise UnknownEventType(
            f"aggregate {type(aggregate).__qualname__} has no @evolves({type(event).__name__}); it knows {known}"
        )
    method(aggregate, event)
