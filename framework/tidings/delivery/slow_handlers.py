"""Handlers that keep a transaction for long, and so hold up those that share it: they are named, and get one alone."""

from __future__ import annotations

from typing import Final

import structlog

__all__ = ["SLOW_SECONDS", "SlowHandlers"]

log = structlog.get_logger("tidings.delivery")

SLOW_SECONDS: Final = 0.25
"""A handler that holds its transaction longer than this is named in the log and gets transactions of its own."""


class SlowHandlers:
    """The slow handlers of one service."""

    def __init__(self, service: str) -> None:
        self._service = service
        self._names: set[str] = set()

    def __contains__(self, handler: str) -> bool:
        return handler in self._names

    def took(self, handler: str, seconds: float) -> None:
        """A handler has held its transaction for so long."""
        if seconds > SLOW_SECONDS and handler not in self._names:
            self._names.add(handler)
            log.warning(
                "handler.holds_writer",
                service=self._service,
                handler=handler,
                seconds=round(seconds, 3),
                advice="do slow work before context.session(), or in a handler without a session",
            )
