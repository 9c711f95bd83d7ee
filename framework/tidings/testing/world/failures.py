"""What handlers raise in a world: kept with their own tracebacks until the test hears of it, or tolerated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tidings.delivery.failure import Failure
from tidings.delivery.inflight import InFlight
from tidings.errors import ConfigurationError
from tidings.modelling.context import Context
from tidings.modelling.declaration import Declaration
from tidings.testing.world.threads import Ended

__all__ = ["Failures", "Injected"]


class Injected(Exception):
    """The error that `World.fail` lets a handler raise."""


@dataclass(slots=True)
class _Plan:
    """Attempts of one handler that are to fail."""

    times: int | None
    error: BaseException | type[BaseException]


class Failures:
    """The witness of every service in a world."""

    def __init__(self) -> None:
        self._services: dict[str, Declaration] = {}
        self._tolerated: list[type[BaseException] | tuple[str, str]] = []
        self._plans: dict[tuple[str, str], _Plan] = {}
        self._planned: set[int] = set()
        """Ids of errors that were raised on purpose; those errors are kept alive by `_kept`."""
        self._kept: list[BaseException] = []
        self._untold: dict[tuple[str, int, str], BaseException] = {}
        """The first error of each attempt that is not told yet, by service, position and handler."""
        self.heard: set[tuple[str, int]] = set()
        """Service and position of attempts whose errors the test was told of."""
        self._excused: set[tuple[str, int, str]] = set()
        """Service, position and handler of attempts whose errors are tolerated."""

    def know(self, service: Declaration) -> None:
        """Let handlers of this service be named."""
        self._services[service.name] = service

    def tolerate(self, *what: type[BaseException] | Callable[..., Any] | str) -> None:
        """From now on, do not tell the test of these errors, or of any error of these handlers."""
        for each in what or (BaseException,):
            if isinstance(each, type) and issubclass(each, BaseException):
                self._tolerated.append(each)
            else:
                self._tolerated.extend(self.named(each))

    def fail(
        self, handler: Callable[..., Any] | str, times: int | None, error: BaseException | type[BaseException]
    ) -> None:
        """Let the next attempts of a handler raise this, in the place of running it."""
        for name in self.named(handler):
            self._plans[name] = _Plan(times, error)

    def named(self, handler: object) -> list[tuple[str, str]]:
        """Return service and name of a handler, which is given as its function, its name, or `service.name`. Raises
        `ConfigurationError` when there is none."""
        found = [
            (service.name, each.name)
            for service in self._services.values()
            for each in service.named.values()
            if handler is each.function or handler in (each.name, f"{service.name}.{each.name}")
        ]
        if not found:
            known = ", ".join(f"{service.name}.{name}" for service in self._services.values() for name in service.named)
            raise ConfigurationError(f"{handler!r} is no handler of a service in this world; there are {known}")
        return found

    def excuses(self, service: str, position: int | None, handler: str | None) -> bool:
        """Return whether what is held or dead there is so because of tolerated errors."""
        if BaseException in self._tolerated or (service, handler) in self._tolerated:
            return True
        return position is not None and handler is not None and (service, position, handler) in self._excused

    def surface(self) -> None:
        """Raise what handlers raised and the test has not heard of: the error itself, or a group of several."""
        errors = list(self._untold.values())
        names = sorted({f"{service}.{handler}" for service, _, handler in self._untold})
        title = f"handlers failed: {', '.join(names)}"
        self.heard.update((service, position) for service, position, _ in self._untold)
        self._untold.clear()
        if len(errors) == 1:
            raise errors[0]
        if all(isinstance(error, Exception) for error in errors) and errors:
            raise ExceptionGroup(title, [error for error in errors if isinstance(error, Exception)])
        if errors:
            raise BaseExceptionGroup(title, errors)

    # ---- as a witness ------------------------------------------------------------------------

    def begins(self, context: Context) -> None:
        plan = self._plans.get((context.service, context.handler))
        if plan is None:
            return
        if plan.times is not None:
            plan.times -= 1
            if plan.times <= 0:
                del self._plans[context.service, context.handler]
        error = plan.error() if isinstance(plan.error, type) else plan.error
        self._planned.add(id(error))
        self._kept.append(error)
        raise error

    def failed(self, item: InFlight, failure: Failure) -> None:
        service, error = self._service_of(item), failure.raised
        if error is None or isinstance(error, Ended):  # the second: of a process that the test has killed
            return
        position, handler = item.turn
        if id(error) in self._planned or self._tolerates(service, handler, error):
            self._excused.add((service, position, handler))
            return
        event = item.event
        note = (
            f"raised by handler {handler!r} of service {service!r} for {event.type} {event.id} "
            f"({event.stream}@{event.version}, position {position}). "
            f"If the test expects it: world.tolerate({type(error).__name__})"
        )
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
        self._untold.setdefault((service, position, handler), error)

    def _tolerates(self, service: str, handler: str, error: BaseException) -> bool:
        return (service, handler) in self._tolerated or any(
            isinstance(error, each) for each in self._tolerated if isinstance(each, type)
        )

    def _service_of(self, item: InFlight) -> str:
        return next(
            (name for name, service in self._services.items() if service.named.get(item.handler.name) is item.handler),
            "",
        )
