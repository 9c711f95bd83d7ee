"""How much a service has under way at most. Numbers only."""

from __future__ import annotations

from typing import Final

__all__ = ["FULL", "ROOM"]

FULL: Final = 2.0
"""Multiple of the prefetch that may be unsettled before a pass rests: more were never under way when a process
ended."""
ROOM: Final = 1.5
"""Multiple of the prefetch at which the pass goes on, so that handlers have enough to do during a commit."""
