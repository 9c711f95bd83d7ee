"""Handlers that keep a transaction for long, and so hold up those that share it: they are named, and get one alone."""

from __future__ import annotations

from typing import Final

import structlog

__all__ = ["SLOW_SECONDS", "SlowHandlers"]

log = structlog.get_logger("tidings.delivery")

SLOW_SECONDS: Final = 0.25
"""A handler that holds its transaction longer than this is named in the log, and has its next one for itself."""


class SlowHandlers:
    """The slow handlers of one service."""

    def __init__(self, service: str) -> None:
        self._service = service
        self._names: set[str] = set()
        self._told: set[str] = set()

    def __contains__(self, handler: str) -> bool:
        """Its last attempt was slow."""
        return handler in self._names

    def took(self, handler: str, seconds: float) -> None:
        """A handler has held its transaction for so long. One that is quick again shares transactions again: a machine
        or a database that stood still for a moment makes every handler slow once."""
        if seconds <= SLOW_SECONDS:
            self._names.discard(handler)
            return
        self._names.add(handler)
        if handler not in self._told:
            self._told.add(handler)
            log.warning(
                "handler.holds_writer",
                service=self._service,
                handler=handler,
                seconds=round(seconds, 3),
                advice="do slow work before context.session(), or in a handler without a session",
            )
