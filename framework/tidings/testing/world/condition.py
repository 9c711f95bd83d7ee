"""What a test has done to one service, and until when. No I/O, and no timers: a value that harm changes."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["FOR_GOOD", "Condition"]

FOR_GOOD = math.inf
"""The end of what only the test ends."""


@dataclass(slots=True)
class Condition:
    """Whether its process is dead or paused, and whether its lines are cut. Death ends a pause; lines are apart from
    the process, so a cut outlives it."""

    dead: str = ""
    """Why it has no process, in words; empty while it has one."""
    paused_until: float | None = None
    """The moment at which its process goes on; None if it is not paused."""
    cut_until: float | None = None
    """The moment at which its lines are mended; None if they are not cut."""

    @property
    def well(self) -> bool:
        """Nothing was done to it that is still so."""
        return not (self.dead or self.paused_until is not None or self.cut_until is not None)

    def die(self, why: str) -> None:
        """Its process ends."""
        self.dead, self.paused_until = why, None

    def pause(self, until: float) -> float:
        """Its process stops until a moment, or later if it was to stop for longer. Return that moment."""
        self.paused_until = max(until, self.paused_until or until)
        return self.paused_until

    def cut(self, until: float) -> float:
        """Its lines are cut until a moment, or later if they were to be cut for longer. Return that moment."""
        self.cut_until = max(until, self.cut_until or until)
        return self.cut_until

    def __str__(self) -> str:
        said = (
            self.dead,
            "" if self.paused_until is None else "is paused by the test",
            "" if self.cut_until is None else "is cut off from the log and the bus by the test",
        )
        return ", and ".join(each for each in said if each)
