"""What a service's lifespan yielded, found by type for the handlers that ask for it. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tidings.errors import ConfigurationError
from tidings.modelling.handlers import Handler, Inject

__all__ = ["Resources"]


class Resources:
    """What the service's lifespan yielded, found by type."""

    def __init__(self, service: str, yielded: Any, replaced: Mapping[type, Any] | None = None) -> None:
        """`replaced` are objects to use in the place of what was yielded, by the type that handlers ask for."""
        self._service = service
        self._objects: tuple[Any, ...] = (
            () if yielded is None else tuple(yielded) if isinstance(yielded, tuple) else (yielded,)
        )
        self._found: dict[type, Any] = dict(replaced or {})

    def find(self, wanted: type, handler: str) -> Any:
        """The one resource of this type. Raises `ConfigurationError` when there is none, or more than one."""
        if wanted in self._found:
            return self._found[wanted]
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
        self._found[wanted] = found[0]
        return found[0]

    def check(self, handler: Handler) -> None:
        """Raises `ConfigurationError` now for what `find` could not give later."""
        for _, wanted in handler.parameters:
            if not isinstance(wanted, Inject):
                self.find(wanted, handler.name)
