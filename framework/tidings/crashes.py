"""Which event ends the process: what was under way at an unclean end is run alone, and the guilty one condemned.

A process that is killed, or dies in native code, says nothing about the event that did it, and noting every event in
the database before it is run would cost a commit each. So the database keeps a mark only: who is at work on a range of
buckets. It is taken away at a clean end. Whoever finds another's mark learns from that one's notebook what was under
way, suspects it, and runs it alone, noted in the database. An event that was under way at two ends in a row is
condemned: the third process buries it without running it.

Without a notebook (the other process was on another machine, or the database is a server's) everything is suspected
for a while, and noted before it is run, which finds the guilty event one crash later. A process that is cut off from
the bus while another takes over looks as if it had crashed: that costs caution, seldom an event. Nothing here runs a
handler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from tidings.attempt import Failure

if TYPE_CHECKING:
    from tidings.work import Item

__all__ = ["Caution", "verdicts"]

BESIDE_SECONDS: Final = 0.05
"""While everything is noted, the next event begins when the one before has ended, or has run for so long without
harm."""
CRASHES: Final = 2
"""Unclean ends with the event under way, after which it is not run again."""


def verdicts(notes: Mapping[int, int]) -> tuple[dict[int, Failure], frozenset[int]]:
    """What notes (position to the number of unclean ends with the event under way) say: who is condemned, and who is
    suspected."""
    condemned = {
        position: Failure(
            f"ProcessCrashed: {times} times the process ended without a word while it handled this event, or stood "
            "still until another took over, so it is not run again. Find out why (a crash in native code, memory, an "
            "exit in the handler, a computation that blocks the event loop, somebody who kills), mend it, then retry "
            "this dead letter",
            "",
            permanent=True,
        )
        for position, times in notes.items()
        if times >= CRASHES
    }
    return condemned, frozenset(notes) - condemned.keys()


class Caution:
    """Of one dispatcher: how carefully it gives out events."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._left = 0
        """Events at most that are still to be noted."""
        self._blind = False
        """It is not known what was under way, so everything is noted."""
        self._notes: dict[int, int] = {}
        """As they stand in the database."""
        self._suspected: set[int] = set()
        self._running: dict[int, float] = {}
        """Noted, and not known to have ended: position to when."""
        self.alert = False
        """There may be something to be careful about: asked first, because nearly always there is nothing."""

    def begin(self, notes: Mapping[int, int], events: int, *, blind: bool) -> dict[int, Failure]:
        """Another process ended uncleanly and left these notes; be careful with so many events at most. Returns those
        that are condemned."""
        condemned, suspected = verdicts(notes)
        self._notes, self._suspected = dict(notes), set(suspected)
        self._left, self._blind = events, blind
        self.alert = self.on or bool(self._notes or self._running)
        return condemned

    @property
    def on(self) -> bool:
        """Events are noted before they are run."""
        return self._left > 0 and (self._blind or bool(self._suspected))

    def wait(self) -> float:
        """Seconds until the next event may begin, 0 for now; what ends meanwhile may make it sooner."""
        if not self._running or not self.on:
            return 0.0
        if self._suspected:
            return BESIDE_SECONDS  # nothing beside a suspect, however long it takes
        return max(0.0, BESIDE_SECONDS - (self._clock() - max(self._running.values())))

    def taken(self, item: Item) -> None:
        """It is about to be noted and run."""
        self._running[item.event.position] = self._clock()

    def note(self, item: Item) -> int:
        """What to write down before it is run: the unclean ends with it under way, should this process end so too."""
        position = item.event.position
        self._left -= 1
        self._running[position] = self._clock()
        self._notes[position] = self._notes.get(position, 0) + 1
        return self._notes[position]

    def ended(self, position: int) -> bool:
        """It ended in whatever way but the process's end. True when there is a note to be taken back."""
        self._suspected.discard(position)
        return self._notes.pop(position, None) is not None

    def cleared(self, position: int) -> None:
        """Its note is gone for good, with all that came of it."""
        self._running.pop(position, None)
        self.alert = self.on or bool(self._notes or self._running)
