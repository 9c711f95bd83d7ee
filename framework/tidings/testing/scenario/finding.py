"""Which aggregate a decision belongs to, and which service a handler. There is no registry: it looks at classes and
modules. No I/O."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, get_type_hints

from tidings.errors import ConfigurationError
from tidings.modelling.aggregate import Aggregate, declared
from tidings.modelling.events import Event, wire_name
from tidings.modelling.handlers import Handler
from tidings.service import Service
from tidings.stores import EventData, RecordedEvent

__all__ = ["aggregate_of", "aggregates", "check_handles", "handler_of", "named", "service_of"]


def aggregates(kind: type[Aggregate] = Aggregate) -> Iterator[type[Aggregate]]:
    """Yield every class of aggregates that is imported."""
    for one in kind.__subclasses__():
        yield one
        yield from aggregates(one)


def named(function: Any) -> str:
    """Return how errors call a function."""
    while isinstance(function, partial):
        function = function.func
    return str(getattr(function, "__qualname__", None) or type(function).__qualname__).split("<locals>.")[-1]


def aggregate_of(decide: Callable[..., Any], names: Collection[str]) -> type[Aggregate]:
    """Return the class of aggregates that a decision belongs to: the one that has it as a method, or that annotates its
    first parameter. Of several, it is the one that evolves events with these wire names."""
    having = list(dict.fromkeys(kind for kind in aggregates() if getattr(kind, _name(decide), None) is decide))
    having = having or _annotated(decide)
    fitting = [kind for kind in having if set(names) <= {wire_name(event) for event in declared(kind).evolutions}]
    found = fitting or having
    # A subclass inherits the method: the class that defines it is meant, unless only a subclass fits.
    found = [kind for kind in found if not any(kind is not other and issubclass(kind, other) for other in found)]
    if len(found) == 1:
        return found[0]
    which = "it belongs to no aggregate" if not found else f"it may belong to {', '.join(map(_path, found))}"
    raise ConfigurationError(
        f"when({named(decide)}): {which}. Name the class: given(..., aggregate=Order).when(...), and give a method "
        "such as Order.confirm, or a function of the aggregate"
    )


def _name(decide: Callable[..., Any]) -> str:
    return getattr(decide, "__name__", "")


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _annotated(decide: Callable[..., Any]) -> list[type[Aggregate]]:
    try:
        first = next(iter(inspect.signature(decide).parameters))
        hint = get_type_hints(decide).get(first)
    except (StopIteration, ValueError, TypeError, NameError):
        return []
    return [hint] if isinstance(hint, type) and issubclass(hint, Aggregate) else []


def service_of(function: Callable[..., Any]) -> Service:
    """Return the service that declares the function as a handler: one in the function's module, or in any other."""
    home = sys.modules.get(getattr(inspect.unwrap(function), "__module__", ""))
    for modules in ([home] if home else [], list(sys.modules.values())):
        services = {
            id(value): value
            for module in modules
            for value in list(getattr(module, "__dict__", {}).values())
            if isinstance(value, Service) and any(handler.function is function for handler in value.named.values())
        }
        if len(services) == 1:
            return next(iter(services.values()))
        if services:
            several = ", ".join(sorted(service.name for service in services.values()))
            raise ConfigurationError(
                f"handling({named(function)}): it is a handler of the services {several}. Name the one that you mean: "
                "given(..., service=...)"
            )
    raise ConfigurationError(
        f"handling({named(function)}): no service in an imported module declares it as a handler. Decorate it with "
        "@service.on(...), or name a service that is no global variable: given(..., service=...)"
    )


def handler_of(service: Service, function: Callable[..., Any]) -> Handler:
    """Return the function as the service declares it."""
    for handler in service.named.values():
        if handler.function is function:
            return handler
    raise ConfigurationError(
        f"handling({named(function)}): it is no handler of service {service.name!r}, which has "
        f"{', '.join(service.named) or 'none'}"
    )


def check_handles(handler: Handler, event: Event | EventData | RecordedEvent) -> None:
    """Raise `ConfigurationError` unless the handler would be given such an event."""
    kind = wire_name(event) if isinstance(event, Event) else event.type
    known = [wire_name(each) for each in handler.events]
    if known and kind not in known:
        raise ConfigurationError(
            f"handling({named(handler.function)}, {kind}): {handler.name} handles {' and '.join(known)}, not {kind}. "
            "Give it an event that its @service.on(...) names, or call another handler"
        )
