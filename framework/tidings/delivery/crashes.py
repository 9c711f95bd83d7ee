"""Which event ends the process: what was under way at an unclean end is run alone, and the guilty one condemned.

A process that is killed, or dies in native code, says nothing about the event that did it, and noting every event in
the database before it is run would cost a commit each. So the database keeps a mark only: who is at work on a range of
buckets. It is taken away at a clean end. Whoever finds another's mark learns from that one's notebook what was under
way, suspects it, and runs it alone, noted in the database. An event that was under way at two ends in a row is
condemned: the third process buries it without running it.

Without a notebook (the other process was on another machine, or the database is a server's) as many events as can have
been at work are noted before they are run, many in one transaction, which finds the guilty event one crash later. A
process that is cut off from the bus while another takes over looks as if it had crashed: that costs caution, seldom an
event.

`Caution` alone decides: the notes of this process and those that others left are kept apart, so that taking over while
notes are being written neither loses nor keeps one. Each of its waits has an end. Nothing here runs a handler.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from enum import Enum, auto
from typing import Final

from tidings.delivery.failure import Failure

__all__ = ["Caution", "condemned_and_suspected"]

CRASHES: Final = 2
"""Unclean ends with the event under way, after which it is not run again."""
ROOM: Final = 64
"""Events at most that are noted and not yet forgotten, so that few are suspected if the process ends."""
ALONE_SECONDS: Final = 30.0
"""Seconds at most that nothing begins beside a suspect, and that a noted event counts against `ROOM`."""
QUIET_SECONDS: Final = 5.0
"""Seconds at most that a suspect waits for what began before it."""
LOOK_SECONDS: Final = 0.05
"""Seconds until somebody who may not begin asks again; what ends meanwhile makes it sooner."""


def condemned_and_suspected(notes: Mapping[int, int]) -> tuple[dict[int, Failure], frozenset[int]]:
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


class _Stage(Enum):
    """How far an event of this process is on its way through its note."""

    TAKEN = auto()
    """Out of its lane; not noted, not begun."""
    NOTED = auto()
    """Its note is in the database, or in a transaction under way; it runs, or may."""
    ENDED = auto()
    """Its attempt ended; the next commit forgets the note."""
    AGAIN = auto()
    """Taken once more before that commit: the new note has to wait for it."""


class _Own:
    __slots__ = ("bucket", "since", "stage", "times")

    def __init__(self, bucket: int, since: float) -> None:
        self.bucket = bucket
        self.since = since
        self.stage = _Stage.TAKEN
        self.times = 0


class Notes:
    """Events that this process has taken to note them, until their notes are forgotten."""

    def __init__(self, clock: Callable[[], float], changed: Callable[[], None]) -> None:
        self._clock = clock
        self._changed = changed
        self.rows: dict[int, _Own] = {}
        """By position. For `Caution`."""

    @property
    def noted(self) -> dict[int, tuple[int, int]]:
        """Notes of this process, position to bucket and number: what the database holds, or will when the transaction
        under way commits, without what the next commit forgets."""
        return {at: (own.bucket, own.times) for at, own in self.rows.items() if own.stage is _Stage.NOTED}

    @property
    def own(self) -> frozenset[int]:
        """Positions that this process has noted itself, as far as the notes are not forgotten."""
        return frozenset(at for at, own in self.rows.items() if own.stage is not _Stage.TAKEN)

    def taken(self, position: int, bucket: int) -> None:
        """It is about to be noted and run."""
        own = self.rows.get(position)
        if own is None:
            self.rows[position] = _Own(bucket, self._clock())
            self._changed()
        else:
            own.stage, own.since = _Stage.AGAIN, self._clock()

    def ended(self, position: int, *, suspected: bool) -> bool:
        """Its attempt ended. True when the next commit changes its note."""
        own = self.rows.get(position)
        if own is None:
            if not suspected:
                return False
            own = self.rows[position] = _Own(-1, self._clock())
            self._changed()
        elif own.stage is not _Stage.NOTED and not suspected:
            return False
        own.stage = _Stage.ENDED
        return True

    def cleared(self, position: int) -> None:
        """Its note is gone for good, with all that came of it."""
        own = self.rows.get(position)
        if own is not None and own.stage is _Stage.AGAIN:
            own.stage = _Stage.TAKEN
        elif own is not None and own.stage is _Stage.ENDED:
            del self.rows[position]
            self._changed()


class Caution:
    """Which events are noted before they are run, and which run alone. It is the only owner of what the process knows
    of notes."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._left = 0
        """Events at most that are still to be noted although nobody suspects them."""
        self.notes = Notes(clock, self._look)
        """Those of this process."""
        self._found: dict[int, int] = {}
        """Notes that another process left, position to number of unclean ends, until this one has survived the
        event in each of its handlers."""
        self._survived: dict[int, set[str]] = {}
        """By position of a suspect: handlers that have been run and have not ended the process."""
        self._noted_once: set[int] = set()
        """Every event that this process has noted: another process that took over counted an unclean end with it under
        way, and this one knows better."""
        self.informed = False
        """It has been told how the process before this one ended."""
        self.alert = False
        """There may be something to be careful about: asked first, because nearly always there is nothing."""

    def _look(self) -> None:
        """What `alert` follows from has changed."""
        self.alert = bool(self._left or self._found or self.notes.rows)

    # ---- taking over

    def cut_off(self) -> None:
        """Forget what this process had begun, because it joins again. That proves nothing of an event: a suspect stays
        one, and for each other event that was cut off in its noted attempt one more is noted."""
        self._left += sum(own.stage is _Stage.NOTED and at not in self._found for at, own in self.notes.rows.items())
        self.notes.rows.clear()
        self._look()

    def rejoined(self, notes: Mapping[int, int]) -> dict[int, int]:
        """Compare with the notes in the database: this process was the last one at work. Returns notes to correct,
        position to number: they count an attempt that was cut off and is not under way any more."""
        own = self.notes.own
        self._found = {at: times for at, times in self._found.items() if at in notes or at in own}
        self._look()
        return {at: times for at, times in self._found.items() if at not in own and notes[at] != times}

    @property
    def known(self) -> frozenset[int]:
        """Positions whose notes are there for a reason, or about to go."""
        return self.notes.own.union(self._found)

    def begin(
        self, notes: Mapping[int, int], events: int, *, blind: bool, besides: Collection[int] = ()
    ) -> dict[int, Failure]:
        """Another process ended uncleanly and left these notes; without its notebook (`blind`), note the next
        `events`. `besides` are positions of this process's own, known before the notes were read: nobody suspects
        what runs here or has ended here. Returns the condemned, with the reason."""
        own = self.notes.own
        left = {
            at: min(times, CRASHES - 1) if at in self._noted_once else times
            for at, times in notes.items()
            if at not in own and at not in besides
        }
        self._found = left | {at: times for at, times in self._found.items() if at in own}
        self._survived.clear()
        self._left = events if blind else 0
        self.informed = True
        self._look()
        return condemned_and_suspected(self._found)[0]

    def forgotten(self) -> None:
        """The process before this one ended cleanly: there are no notes but this one's own."""
        own = self.notes.own
        self._found = {at: times for at, times in self._found.items() if at in own}
        self._left = 0
        self.informed = True
        self._look()

    @property
    def suspects(self) -> frozenset[int]:
        """Positions of events that are run alone."""
        return condemned_and_suspected(self._found)[1]

    # ---- an event's way

    def holds(self) -> float:
        """Seconds until the next event may be taken, 0 for now."""
        now = self._clock()
        young = [at for at, own in self.notes.rows.items() if now - own.since < ALONE_SECONDS]
        alone = any(at in self._found and self.notes.rows[at].stage is not _Stage.ENDED for at in young)
        return LOOK_SECONDS if alone or len(young) >= ROOM else 0.0

    def wants(self, position: int, handler: str = "") -> bool:
        """Whether the event is noted before it is run by this handler."""
        return self._left > 0 or (position in self._found and handler not in self._survived.get(position, ()))

    def times(self, position: int) -> int:
        """Return the unclean ends that the event's note is to count while it is not under way: 0 for no note."""
        return self._found.get(position, 0)

    def group(self, waiting: Iterable[int]) -> list[int]:
        """Which of these events, taken before, are noted together now, and run side by side: one suspect, or others."""
        ready = [at for at in waiting if self.notes.rows[at].stage is _Stage.TAKEN]
        plain = [at for at in ready if at not in self._found]
        return plain or ready[:1]

    def patience(self, position: int) -> float:
        """Seconds that this event, which is to be noted next, still waits for those that began before it to end."""
        if position not in self._found:
            return 0.0
        return max(0.0, self.notes.rows[position].since + QUIET_SECONDS - self._clock())

    def note(self, position: int) -> tuple[int, int]:
        """What to write down in the transaction that begins: bucket, and the unclean ends with the event under way,
        should this process end so too."""
        own = self.notes.rows[position]
        self._left = max(0, self._left - 1)
        self._look()
        self._noted_once.add(position)
        own.stage, own.times = _Stage.NOTED, self._found.get(position, 0) + 1
        return own.bucket, own.times

    def ended(self, position: int, handler: str = "", others: Collection[str] = (), *, ran: bool = True) -> bool:
        """It ended in this handler in whatever way but the process's end. `others` are handlers that may run it still:
        until they have, or when it was not even run, a suspect stays one. True when the next commit is to forget its
        note, or to have it count `times`; then tell `notes.cleared` after that commit."""
        found = self._found.get(position)
        if found is not None and ran:
            survived = self._survived.setdefault(position, set())
            survived.add(handler)
            if survived.issuperset(others):
                del self._found[position], self._survived[position]
                self._look()
        return self.notes.ended(position, suspected=found is not None)
