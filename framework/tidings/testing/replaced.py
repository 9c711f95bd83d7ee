"""Objects that a test gives in the place of what lifespans yield: the checks of them. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from unittest.mock import NonCallableMock

from tidings.errors import ConfigurationError
from tidings.modelling.declaration import Declaration
from tidings.modelling.handlers import Inject

__all__ = ["asked_for", "check_replaced"]


def asked_for(services: Iterable[Declaration]) -> dict[type, str]:
    """Return the types of resources that handlers ask for, each with one of these handlers."""
    found = dict[type, str]()
    for service in services:
        for handler in service.named.values():
            for _, wanted in handler.parameters:
                if not isinstance(wanted, Inject):
                    found.setdefault(wanted, f"{service.name}.{handler.name}")
    return found


def check_replaced(resources: Mapping[Any, Any], services: Iterable[Declaration]) -> None:
    """Raise `ConfigurationError` for a resource that no handler of these services would be given, or that is not of its
    type."""
    asked = asked_for(services)
    for key, value in resources.items():
        name = getattr(key, "__name__", None) or repr(key)
        what = f"resources={{{name}: ...}}"
        if key not in asked:
            known = ", ".join(f"{kind.__name__} (by {handler})" for kind, handler in asked.items()) or "for none"
            raise ConfigurationError(
                f"{what}: no handler of {', '.join(service.name for service in services) or 'a service'} asks for it, "
                f"so it would replace nothing. The key is the class that a handler's parameter names; they ask: {known}"
            )
        if isinstance(value, type) and not isinstance(value, key):
            raise ConfigurationError(
                f"{what}: {value.__name__} is a class, and handler {asked[key]!r} is given an object: write "
                f"{{{name}: {value.__name__}(...)}}"
            )
        if not _fits(value, key):
            raise ConfigurationError(
                f"{what}: {value!r} is no {name}, for which handler {asked[key]!r} asks. Derive your fake from {name}, "
                f"or give unittest.mock.create_autospec({name}, instance=True)"
            )


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(value, NonCallableMock) or getattr(kind, "_is_protocol", False):
        return True
    return isinstance(value, kind)
