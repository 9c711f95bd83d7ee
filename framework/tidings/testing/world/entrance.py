"""What a test gives a world is checked here at once, and a slip is answered with what to write. No I/O."""

from __future__ import annotations

import inspect
import math
from typing import Any, Final

from tidings.errors import ConfigurationError
from tidings.modelling.events import Event
from tidings.modelling.repository import Repository
from tidings.service import Service

__all__ = [
    "CLOSED",
    "UNOPENED",
    "check_change",
    "check_class",
    "check_service",
    "check_world",
    "number_of",
    "seconds_for",
    "seconds_of",
]

UNOPENED: Final = "this World is not open: write 'async with World(...) as world:', and use it within that block"
"""Why a world that was not entered does nothing."""
CLOSED: Final = (
    "this World is closed: use it within its block, 'async with World(...) as world:', and keep what you need of it "
    "in variables"
)
"""Why a world that was left does nothing."""


def check_world(services: tuple[Any, ...]) -> None:
    """Raise `ConfigurationError` unless a world can be made of these."""
    for each in services:
        if isinstance(each, list | tuple | set | frozenset):
            raise ConfigurationError(
                f"World({_shown(each)}): give the services one by one, World(order, shipping), or World(*services)"
            )
        check_service("World", each)


def check_service(what: str, service: Any) -> None:
    """Raise `ConfigurationError` unless this is a service."""
    if not isinstance(service, Service):
        raise ConfigurationError(
            f"{what}({_shown(service)}): that is no service. Give the Service object itself, which its module defines: "
            f"{what}(order)"
        )


def check_class(of: Any) -> None:
    """Raise `ConfigurationError` unless this is a class of events."""
    if not (isinstance(of, type) and issubclass(of, Event)):
        raise ConfigurationError(
            f"events(of={_shown(of)}): give the class of the events, events(of=OrderPlaced). To find them by the names "
            "in the log, look at the type of each of world.events()"
        )


def check_change(repository: Any, method: Any) -> None:
    """Raise `ConfigurationError` unless an aggregate of this repository can be changed by this method."""
    if not isinstance(repository, Repository):
        raise ConfigurationError(
            f"change({_shown(repository)}, ...): give the repository of the aggregate, not its class: "
            "orders = order.repository(Order), then change(orders, '1001', Order.place)"
        )
    if inspect.ismethod(method) or not callable(method):
        name = getattr(method, "__name__", method)
        raise ConfigurationError(
            f"change(..., {_shown(method)}): name the method on the class, not on an object: "
            f"change(orders, '1001', {type(getattr(method, '__self__', None)).__name__}.{name})"
            if inspect.ismethod(method)
            else f"change(..., {_shown(method)}): name a method of the aggregate: change(orders, '1001', Order.place)"
        )


def seconds_of(days: float, hours: float, minutes: float, seconds: float) -> float:
    """Return how long `advance` lets time pass. Raises `ConfigurationError` if that is nothing or cannot be."""
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total > 0 and math.isfinite(total):
        return total
    if total == 0:
        raise ConfigurationError("advance() lets no time pass: say how much, advance(days=3) or advance(minutes=15)")
    raise ConfigurationError(f"advance() by {total:g} seconds: time only goes forward, by a number of seconds")


def seconds_for(what: str, name: str, seconds: Any) -> float:
    """Return how long harm is to last. Raises `ConfigurationError` unless that is a number, of 0 or more."""
    if isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 <= seconds < math.inf:
        return float(seconds)
    raise ConfigurationError(f"{what}({name}={seconds!r}): give virtual seconds, such as {what}(..., {name}=30)")


def number_of(what: str, name: str, number: Any) -> int:
    """Return how often something is to happen. Raises `ConfigurationError` unless it is a number of 1 or more."""
    if type(number) is int and number >= 1:
        return number
    raise ConfigurationError(f"{what}({name}={number!r}): give a whole number, 1 or more")


def _shown(value: Any) -> str:
    return value.__qualname__ if isinstance(value, type) else repr(value)
