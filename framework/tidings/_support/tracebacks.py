"""Which failures are logged with their traceback: the first of each kind, and now and then one more. No I/O."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

__all__ = ["Kind", "Tracebacks"]

AGAIN_SECONDS: Final = 300.0
"""Seconds after which a kind of failure that goes on is logged with its traceback once more."""
KINDS: Final = 1000
"""Kinds of failure that are remembered; beyond that the one that was logged longest ago is forgotten."""


class Kind(NamedTuple):
    """What failures have in common when they have one cause."""

    handler: str
    error: str
    """The error's type."""
    place: str
    """Where it was raised."""


class Tracebacks:
    """The tracebacks that one service has logged in one process."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._shown: dict[Kind, tuple[float, int]] = {}
        """When its traceback was logged last, and how many failures came since; the longest ago first."""

    def due(self, kind: Kind) -> int | None:
        """How many failures of the kind were logged in one line since its last traceback, when it is time for another
        one; None when it is not."""
        now = self._clock()
        shown = self._shown.get(kind)
        if shown is not None and now - shown[0] < AGAIN_SECONDS:
            self._shown[kind] = (shown[0], shown[1] + 1)
            return None
        self._shown.pop(kind, None)
        if len(self._shown) >= KINDS:
            del self._shown[next(iter(self._shown))]
        self._shown[kind] = (now, 0)
        return 0 if shown is None else shown[1]
