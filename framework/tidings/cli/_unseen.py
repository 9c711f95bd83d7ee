"""Collects services that a command could not look at, because their databases do not answer.

The command shows the other services, names these, and ends with the exit code of their error. It opens nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tidings.cli._exits import OK, code_of
from tidings.cli._output import plain
from tidings.errors import ConfigurationError, DatabaseUnavailable, TidingsError

__all__ = ["Unseen"]


class Unseen:
    """The services that a command could not look at, with the error of each."""

    def __init__(self, services: int) -> None:
        """`services` is the number that it is to look at. If that is 1, the error is raised as usual."""
        self.errors: dict[str, TidingsError] = {}
        self._services = services

    @contextmanager
    def without(self, service: str) -> Iterator[None]:
        """Go on after the block if the service's database does not answer, or its settings are wrong."""
        try:
            yield
        except (DatabaseUnavailable, ConfigurationError) as error:
            self.note(service, error)

    def note(self, service: str, error: TidingsError) -> None:
        """Remember the error of a service. Raise it if there is no other service to look at."""
        if self._services == 1:
            raise error
        self.errors[service] = error

    def raise_if_all(self) -> None:
        """Raise the last error, and print the others, if no service could be looked at."""
        if self.errors and len(self.errors) == self._services:
            _, last = self.errors.popitem()
            self.tell()
            raise last

    @property
    def code(self) -> int:
        """The exit code of a command that could not look at all services; 0 if it could."""
        return next(map(code_of, self.errors.values()), OK)

    def facts(self) -> list[dict[str, Any]]:
        """Return services and errors for JSON."""
        return [
            {"service": name, "error": type(error).__name__, "message": " ".join(str(error).split())}
            for name, error in self.errors.items()
        ]

    def tell(self) -> None:
        """Name the services and errors on standard error."""
        for name, error in self.errors.items():
            print(f"tidings: NOT SEEN: {plain(name)}: {plain(' '.join(str(error).split()))}", file=sys.stderr)
