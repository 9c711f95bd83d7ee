"""What the next commit makes durable, and the mailbox in which the stages before the commit collect it. No I/O."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import UUID

from tidings.database.dead_letters import Letter
from tidings.delivery.inflight import AGAIN, PLAIN, InFlight, Role, Step
from tidings.modelling.roster import Span
from tidings.protocol.position import Ticket

__all__ = ["Batch", "Late", "Pending"]

Late = tuple[int, str, str]
"""A span's bucket, handler and kind."""


@dataclass(slots=True)
class Batch:
    """What is to become durable together."""

    finished: list[InFlight] = field(default_factory=list)
    notable: list[InFlight] = field(default_factory=list)
    """Those of them that leave more behind than the watermark."""
    moves: dict[int, int] = field(default_factory=dict)
    """Bucket to its new watermark: that of its last item, because items of one bucket finish in order."""
    parts: dict[int, list[InFlight]] = field(default_factory=dict)
    """Bucket to items whose event still waits for other handlers."""
    shared: set[int] = field(default_factory=set)
    """Buckets in which several handlers of one event have finished together."""
    late: dict[Late, int] = field(default_factory=dict)
    """What handlers that are behind have done: to which position each span moves."""
    ended: list[Span] = field(default_factory=list)
    """Spans of which nothing is left."""
    foreign: list[tuple[Letter, Ticket[Step | None]]] = field(default_factory=list)
    """Messages that are no events of ours."""
    appended: list[UUID] = field(default_factory=list)
    """Staged events that are in the store."""
    never: list[tuple[UUID, Letter]] = field(default_factory=list)
    """Staged events that can never be appended."""
    noted: dict[int, int] = field(default_factory=dict)
    """Events that were noted before they were run, and have ended (`crashes`): position to the unclean ends
    that the note is to count, 0 for no note."""
    doubted: list[InFlight] = field(default_factory=list)
    """An attempt at them failed, perhaps because another process has done them. They are not finished by that."""

    def finish(self, item: InFlight) -> bool:
        """True when it leaves more behind than the watermark."""
        self.finished.append(item)
        role = item.role
        if role is PLAIN:
            self.moves[item.bucket] = item.event.position
            if self.parts and self.parts.pop(item.bucket, None) is not None:
                self.shared.add(item.bucket)
        elif role is Role.SHARED:
            self.parts.setdefault(item.bucket, []).append(item)
        elif (span := item.span) is not None:
            if role is Role.END:
                self.ended.append(span)
            else:
                self.late[span[:3]] = item.event.position
        if role < AGAIN and not item.leaves:
            return False
        self.notable.append(item)
        return True

    def doubt(self, item: InFlight) -> None:
        """An attempt failed: the commit finds out whether another process has done the event meanwhile. Without that, a
        service whose every attempt fails for that reason would wait for ever for what nobody can mend."""
        self.doubted.append(item)

    def __len__(self) -> int:
        ended = len(self.finished) + len(self.foreign) + len(self.appended) + len(self.never) + len(self.noted)
        return ended + len(self.doubted)


class Pending:
    """The batch that is collected for the next commit. Whoever adds to it wakes who commits."""

    def __init__(self) -> None:
        self.batch = Batch()
        self.wake = asyncio.Event()
        """Set when there is something to commit, or to settle."""
        self.unseen: set[int] = set()
        """Buckets with effects in the group under way: a handler without a session would not see them, so it waits."""
        self.buckets: set[int] = set()
        """Buckets with something in the batch ..."""
        self.committing: set[int] = set()
        """... and in the one whose commit is under way."""
        self.parked: set[int] = set()
        """Buckets of which the next event waits in its lane until that is committed."""
        self.then: Callable[[], None] | None = None
        """Called when what was taken last is durable."""

    def take(self) -> Batch:
        """Take what was collected; from now on another batch is collected."""
        batch, self.batch = self.batch, Batch()
        self.committing, self.buckets = self.buckets, set()
        return batch

    def claims(self, bucket: int) -> bool:
        """Something of the bucket is in this batch, or in the one whose commit is under way."""
        return bucket in self.buckets or bucket in self.committing

    def freed(self) -> set[int]:
        """Return the parked buckets of which everything is committed now; they are parked no more."""
        freed = {bucket for bucket in self.parked if not self.claims(bucket)}
        self.parked -= freed
        return freed

    def committed(self) -> None:
        """What was taken last is durable."""
        self.unseen.clear()
        self.committing.clear()
        if self.then is not None:
            self.then()

    def finish(self, item: InFlight) -> bool:
        """True when it leaves more behind than the watermark."""
        batch = self.batch
        self.buckets.add(item.bucket)
        if not batch.finished:  # the first one wakes who commits, and that one rests when nothing is left
            self.wake.set()
        return batch.finish(item)

    def bury(self, letter: Letter, ticket: Ticket[Step | None]) -> None:
        """A message that is not ours: recorded, then settled."""
        self.batch.foreign.append((letter, ticket))
        self.wake.set()

    def appended(self, id: UUID) -> None:
        """A staged event that needs its row no more."""
        self.batch.appended.append(id)
        self.wake.set()

    def given_up(self, id: UUID, letter: Letter) -> None:
        """A staged event that can never be appended."""
        self.batch.never.append((id, letter))
        self.wake.set()

    def doubt(self, item: InFlight) -> None:
        """As `Batch.doubt`. Its bucket's next attempt waits in its lane for the commit, which would take what that
        one has committed for another process's doing."""
        self.buckets.add(item.bucket)
        self.batch.doubt(item)
        self.wake.set()

    def noted(self, position: int, times: int) -> None:
        """An event that was noted before it was run has ended. Its note is to count so many unclean ends from now on;
        0 for no note."""
        self.batch.noted[position] = times
        self.wake.set()
