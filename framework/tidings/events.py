"""Domain events as a user declares them: frozen pydantic models with a wire name, a schema version and upcasters.

No registry is global: a `Registry` belongs to one service, which declares its own view of the events it uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar, cast

from pydantic import BaseModel, ConfigDict

from tidings.errors import ConfigurationError

__all__ = ["Event", "Registry", "Upcaster", "upcaster"]

Upcaster = Callable[[dict[str, Any]], dict[str, Any]]
"""Turns the JSON object of one schema version into that of the next; it may change the dict it is given."""

U = TypeVar("U", bound=Callable[..., Any])


def upcaster(from_version: int) -> Callable[[U], U]:
    """Mark a static method of an `Event` as the step from schema version `from_version` (1 or more) to the next.

    class OrderCreated(Event, version=2):
        order_id: str
        currency: str

        @staticmethod
        @upcaster(1)
        def currency_was_always_pounds(data):
            return data | {"currency": "GBP"}
    """

    def mark(function: U) -> U:
        target: Any = getattr(function, "__func__", function)
        target.__upcasts_from__ = from_version
        return function

    return mark


class Event(BaseModel):
    """Base of all domain events. Fields that a view does not declare are ignored, so producers may add some.

        class OrderCreated(Event, name="OrderCreated", version=1, key="order_id"):
            order_id: str

    `name` is the wire name, by default the class name. `version` is the schema version, from 1. `key` names the field
    whose value is the partition key: events with the same key reach a service in log order, whatever their streams
    (without it, the stream's name is the key). Raises `ConfigurationError` for a reserved or empty name, an unknown
    key field, or an upcaster that cannot be reached.
    """

    # JSON has no NaN and no infinity: an event with one could be written, but never read.
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, defer_build=True)

    wire_name: ClassVar[str] = ""
    schema_version: ClassVar[int] = 1
    key_field: ClassVar[str | None] = None
    upcasters: ClassVar[dict[int, Upcaster]] = {}

    def __init_subclass__(
        cls, *, name: str | None = None, version: int = 1, key: str | None = None, **config: Any
    ) -> None:
        super().__init_subclass__(**config)

    @classmethod
    def __pydantic_init_subclass__(
        cls, *, name: str | None = None, version: int = 1, key: str | None = None, **config: Any
    ) -> None:
        super().__pydantic_init_subclass__(**config)
        wire = cls.__name__ if name is None else name
        where = f"event {cls.__module__}.{cls.__qualname__}"
        if not wire or wire.startswith(("$", "tidings_", "tidings.")):
            raise ConfigurationError(f"{where}: {wire!r} is no wire name; '$', 'tidings_' and 'tidings.' are reserved")
        if version < 1:
            raise ConfigurationError(f"{where}: schema versions count from 1, not {version}")
        if key is not None and key not in cls.model_fields:
            raise ConfigurationError(f"{where}: key={key!r} is none of its fields ({', '.join(cls.model_fields)})")
        cls.wire_name, cls.schema_version = wire, version
        cls.key_field = key if key is not None else cls.key_field
        cls.upcasters = _upcasters(cls, where)

    @property
    def partition_key(self) -> str | None:
        """The partition key that this event's class asks for, None (also where the field is) for the stream's name."""
        value = None if self.key_field is None else getattr(self, self.key_field)
        return None if value is None else str(value)


# This class has no fields and no instances: building its validator would be much of what importing Tidings costs.
# Its subclasses are built when they are declared, so that what is wrong with them is said there.
Event.model_config["defer_build"] = False


def _upcasters(cls: type[Event], where: str) -> dict[int, Upcaster]:
    found: dict[int, Upcaster] = {}
    for name, value in vars(cls).items():
        start = getattr(getattr(value, "__func__", value), "__upcasts_from__", None)
        if start is None:
            continue
        if not 1 <= start < cls.schema_version:
            raise ConfigurationError(
                f"{where}: an upcaster from version {start} is never used by version {cls.schema_version}"
            )
        if start in found:
            raise ConfigurationError(f"{where}: two upcasters start from version {start}")
        found[start] = cast("Upcaster", getattr(cls, name))
    return found


class Registry:
    """The event types that one service declares, by wire name."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._types: dict[str, type[Event]] = {}

    def add(self, event: type[Event]) -> None:
        """Raises `ConfigurationError` when another class already has the wire name."""
        known = self._types.setdefault(event.wire_name, event)
        if known is not event:
            raise ConfigurationError(
                f"{self._owner}: wire name {event.wire_name!r} is declared twice, by {_named(known)} and "
                f"{_named(event)}. One service has one view of an event: use one class, or give name= to the other"
            )

    def get(self, wire_name: str) -> type[Event] | None:
        return self._types.get(wire_name)

    def __iter__(self) -> Iterator[type[Event]]:
        return iter(self._types.values())


def _named(event: type[Event]) -> str:
    return f"{event.__module__}.{event.__qualname__}"
