"""Ids of a service's own events under which somebody else has appended an event, noted where they are met. No I/O."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final
from uuid import UUID

__all__ = ["TAKEN_SECONDS", "TakenIds"]

TAKEN_SECONDS: Final = 600.0
"""Seconds for which a taken id is spoken of."""


class TakenIds:
    """The ids that one service found taken, in one process: how many, and the last of them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._count = 0
        self._last = ""
        self._at: float | None = None

    def note(self, identity: UUID, stream: str, type: str | None = None, position: int | None = None) -> None:
        """Note a taken id, and the event under it as far as it is known."""
        what = "an event" if type is None else f"an event of type {type!r}"
        where = "" if position is None else f", position {position}"
        self._last = f"{what} of stream {stream!r}{where}, under id {identity}"
        self._count += 1
        self._at = self._clock()

    @property
    def told(self) -> str | None:
        """How many ids were found taken, and the last of them; None where none was lately."""
        if self._at is None or self._clock() - self._at > TAKEN_SECONDS:
            return None
        return f"{self._count} times so far; the last: {self._last}"
