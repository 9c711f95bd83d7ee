"""Domain events as a user declares them: frozen pydantic models with a wire name, a schema version and upcasters.

There is no global registry: a `Registry` belongs to one service, which declares its own view of the events it uses.
Tidings adds only the attribute `__tidings__` to an event class, so fields may have any other name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from enum import Enum
from typing import Any, ClassVar, Final, TypeVar

from pydantic import BaseModel, ConfigDict

from tidings.errors import ConfigurationError
from tidings.modelling.readback import fields_of, prove

__all__ = ["Declaration", "Event", "Registry", "Upcaster", "partition_key", "schema_version", "upcaster", "wire_name"]

Upcaster = Callable[[dict[str, Any]], dict[str, Any]]
"""A function that turns the JSON object of one schema version into that of the next. It may change its argument."""

U = TypeVar("U", bound=Callable[..., Any])

OWN: Final = "__tidings__"
RESERVED: Final = ("$", "tidings_", "tidings.")
NO_KEYS: Final = frozenset({"float", "list", "tuple", "set", "frozenset", "dict", "model", "dataclass", "typed-dict"})
"""Kinds of pydantic schemas whose values cannot be partition keys: services might write them as different texts."""


def upcaster(from_version: int) -> Callable[[U], U]:
    """Mark a static method as the step from schema version `from_version` (1 or more) to the next.

    class OrderCreated(Event, version=2):
        order_id: str
        currency: str

        @staticmethod
        @upcaster(1)
        def currency_was_always_pounds(data):
            return data | {"currency": "GBP"}

    The method may be in the event, in one of its base classes, or in a mixin. Services that do not import each other
    can share a mixin.
    """

    def mark(function: U) -> U:
        target: Any = getattr(function, "__func__", function)
        target.__upcasts_from__ = from_version
        return function

    return mark


class Declaration:
    """What Tidings knows about an event class."""

    __slots__ = ("exact", "key", "name", "oldest", "upcasters", "version")

    def __init__(
        self, name: str, version: int, oldest: int, key: str | None, upcasters: Mapping[int, Upcaster]
    ) -> None:
        self.name: Final = name
        """Wire name."""
        self.version: Final = version
        """Schema version that is written, and that is read without upcasters."""
        self.oldest: Final = oldest
        """Oldest schema version that can be read."""
        self.key: Final = key
        """Field whose value is the partition key."""
        self.upcasters: Final = upcasters
        """Version to the step from it to the next, complete from `oldest` on."""
        self.exact: bool | None = None
        """Whether equal events have equal types throughout; None while a type that the class names is not yet
        defined."""


class Event(BaseModel):
    """Base class of all events. Fields that a view does not declare are ignored, so producers may add some.

        class OrderCreated(Event, name="OrderCreated", version=1, key="order_id"):
            order_id: str

    `name` is the wire name, by default the class name. `version` is the schema version, from 1. `key` names the field
    whose value is the partition key: events with the same key reach a service in log order, whatever their streams.
    Without it, the stream's name is the key. `upcasters` maps a version to the step from it to the next, in addition to
    methods marked with `@upcaster`. The steps must lead from version 1, or from `oldest`, to `version` without a gap.

    An event reads back equal. A field that cannot (a secret, `exclude=True`, aliases that differ, `Json`) is refused
    when the class is declared, and a value that does not (NaN, an instance of a subclass) when the event is appended.

    Raises `ConfigurationError` for a field that cannot be read back, a reserved or empty name, an unknown key field, or
    upcasters with a gap or out of reach.
    """

    # JSON has no NaN and no infinity: an event with one could be written, but never read.
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, defer_build=True)

    __tidings__: ClassVar[Declaration] = Declaration("", 1, 1, None, {})

    def __init_subclass__(
        cls,
        *,
        name: str | None = None,
        version: int = 1,
        key: str | None = None,
        upcasters: Mapping[int, Upcaster] | None = None,
        oldest: int = 1,
        **config: Any,
    ) -> None:
        super().__init_subclass__(**config)

    @classmethod
    def __pydantic_init_subclass__(
        cls,
        *,
        name: str | None = None,
        version: int = 1,
        key: str | None = None,
        upcasters: Mapping[int, Upcaster] | None = None,
        oldest: int = 1,
        **config: Any,
    ) -> None:
        super().__pydantic_init_subclass__(**config)
        where = _where(cls)
        if OWN in vars(cls) or OWN in inspect.get_annotations(cls):
            raise ConfigurationError(f"{where}: the name {OWN} belongs to Tidings; use any other name")
        origin: Any = cls.__pydantic_generic_metadata__["origin"]
        if origin is not None:  # OrderEvent[int] is the event OrderEvent
            whole: Declaration = origin.__tidings__
            own = Declaration(whole.name, whole.version, whole.oldest, whole.key, whole.upcasters)
        else:
            wire = _checked_name(where, cls.__name__ if name is None else name)
            for what, number in (("version", version), ("oldest", oldest)):
                if type(number) is not int or number < 1:
                    raise ConfigurationError(f"{where}: {what}={number!r}: schema versions count from 1")
            steps = _upcasters(cls, where, version, upcasters or {})
            _complete(where, steps, oldest, version)
            own = Declaration(wire, version, oldest, key if key is not None else cls.__tidings__.key, steps)
        cls.__tidings__ = own
        if own.key is not None:
            _check_key(cls, where, own.key)
        if cls.__pydantic_complete__:
            own.exact = prove(cls, where)


# This class has no fields and no instances, and building its validator would make importing Tidings slower. Subclasses
# are built when they are declared, so that their mistakes are reported there.
Event.model_config["defer_build"] = False


def wire_name(event: Event | type[Event]) -> str:
    """Return the name under which the event is stored and sent."""
    return event.__tidings__.name


def schema_version(event: Event | type[Event]) -> int:
    """Return the schema version with which the event is stored."""
    return event.__tidings__.version


def partition_key(event: Event) -> str | None:
    """Return the partition key that the event's class declares. None stands for the stream's name.

    The result is None without `key=`, or if the field is None. An enum counts as its value, as it does on the wire.
    """
    field = event.__tidings__.key
    value = None if field is None else event.__dict__.get(field)
    if isinstance(value, Enum):
        value = value.value
    return None if value is None else str(value)


def comparable_key(event: Event) -> str | None:
    """Return `partition_key` if the field gives the same text in every view of the event, else None."""
    field = event.__tidings__.key
    value = None if field is None else event.__dict__.get(field)
    # A view may declare a moment as text, and its JSON differs from `str` of a datetime.
    return None if isinstance(value, datetime | bytes) else partition_key(event)


def is_exact(event: type[Event]) -> bool:
    """Return whether equal events of the class have equal types throughout.

    Raises `ConfigurationError` if the class names a type that is still not defined, or has a field that cannot be read
    back.
    """
    own = event.__tidings__
    if own.exact is None:
        if not event.__pydantic_complete__ and not event.model_rebuild(raise_errors=False):
            raise ConfigurationError(
                f"{_where(event)} names a type that is not defined, so it cannot be read or written: define the type "
                "in its module, or import it there outside 'if TYPE_CHECKING'"
            )
        own.exact = prove(event, _where(event))
    return own.exact


def _where(cls: type[Event]) -> str:
    return f"event {cls.__module__}.{cls.__qualname__}"


def _checked_name(where: str, wire: object) -> str:
    if not isinstance(wire, str) or not wire or wire.startswith(RESERVED):
        raise ConfigurationError(
            f"{where}: {wire!r} cannot be a wire name: '$', 'tidings_' and 'tidings.' are reserved"
        )
    try:
        wire.encode()
    except UnicodeEncodeError:
        raise ConfigurationError(f"{where}: {wire!r} cannot be a wire name: it cannot be written as UTF-8") from None
    return wire


def _check_key(cls: type[Event], where: str, key: str) -> None:
    fields = fields_of(cls)
    if key not in fields:
        raise ConfigurationError(f"{where}: key={key!r} is not one of its fields ({', '.join(fields)})")
    if not cls.__pydantic_complete__:
        return
    node: Any = cls.__pydantic_core_schema__
    while isinstance(node, dict) and node["type"] not in NO_KEYS - {"model"}:
        if node["type"] == "model" and node["cls"] is not cls:
            break
        node = node["fields"].get(key) if node["type"] == "model-fields" else node.get("schema")
    if isinstance(node, dict):
        raise ConfigurationError(
            f"{where}: key={key!r} is a {node['type']}: a partition key is a text, a whole number, a UUID, a date, a "
            "Decimal or an enum of such values"
        )


def _upcasters(cls: type[Event], where: str, version: int, given: Mapping[int, Upcaster]) -> dict[int, Upcaster]:
    """Collect upcasters by the version that they start from: the class's own, those given, then those of its bases."""
    found: dict[int, Upcaster] = {}
    for base in cls.__mro__:
        here: dict[int, Upcaster] = {}
        if base in (Event, BaseModel, object):
            continue
        for value in list(vars(base).values()):
            start = getattr(getattr(value, "__func__", value), "__upcasts_from__", None)
            if start is None:
                continue
            if start in here:
                raise ConfigurationError(f"{where}: two upcasters of {base.__name__} start from version {start}")
            if base is cls and not (type(start) is int and 1 <= start < version):
                raise ConfigurationError(
                    f"{where}: an upcaster from version {start} is never used by version {version}"
                )
            here[start] = value.__get__(None, cls)
        if base is cls:
            twice = here.keys() & given.keys()
            if twice:
                raise ConfigurationError(f"{where}: two upcasters start from version {min(twice)}")
            here |= _given(where, given)
        elif OWN in vars(base):
            here = {**vars(base)[OWN].upcasters, **here}  # also those that were given as a mapping
        for start, step in here.items():
            if start < version:  # shared upcasters may lead further than this class does
                found.setdefault(start, step)
    return found


def _given(where: str, upcasters: Mapping[int, Upcaster]) -> Mapping[int, Upcaster]:
    for start, step in upcasters.items():
        if type(start) is not int or start < 1 or not callable(step):
            raise ConfigurationError(
                f"{where}: upcasters={{{start!r}: {step!r}}}: map a schema version, from 1, to a function that turns "
                "its JSON object into that of the next version"
            )
    return upcasters


def _complete(where: str, steps: Mapping[int, Upcaster], oldest: int, version: int) -> None:
    if oldest > version:
        raise ConfigurationError(f"{where}: oldest={oldest} is above its version, {version}")
    missing = [start for start in range(oldest, version) if start not in steps]
    if missing:
        raise ConfigurationError(
            f"{where}: version {version} has no @upcaster({missing[0]}), so events of schema version {missing[0]} "
            f"could not be read. Write it, or share the producer's (a mixin, or upcasters=). If the log holds no "
            f"event that old, say so with oldest={missing[-1] + 1}"
        )


class Registry:
    """The event classes that one service declares, by wire name."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._types: dict[str, type[Event]] = {}

    def add(self, event: type[Event]) -> None:
        """Add a class. Raises `ConfigurationError` if another class has its wire name, or it cannot be read."""
        is_exact(event)
        known = self._types.setdefault(wire_name(event), event)
        if known is not event:
            raise ConfigurationError(
                f"{self._owner}: wire name {wire_name(event)!r} is declared twice, by {_named(known)} and "
                f"{_named(event)}. A service has one view of an event: use one class, or give one of them another name="
            )

    def get(self, wire_name: str) -> type[Event] | None:
        return self._types.get(wire_name)

    def __iter__(self) -> Iterator[type[Event]]:
        return iter(self._types.values())


def _named(event: type[Event]) -> str:
    return f"{event.__module__}.{event.__qualname__}"
