"""How far a service is, durably: watermarks and floor move in one transaction with what the handlers leave behind.

It never begins or commits a transaction; `written` is told when the one that `write` was part of has been committed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database.held_events import HeldEvent
from tidings.database.held_rows import Ended, HeldRows
from tidings.database.inbox import Inbox, Remembered
from tidings.database.receipts import Receipts, Written
from tidings.delivery.batch import Batch, Late
from tidings.delivery.failure_memory import SKIPPED
from tidings.delivery.inflight import PLAIN, InFlight, Role

__all__ = ["Progress"]

FLOOR_SECONDS: Final = 1.0
"""The floor is stored at most so often."""


class Progress:
    """Made from what the inbox remembers; the watermarks here are those that were read or written last."""

    def __init__(self, inbox: Inbox, held: HeldRows, remembered: Remembered, clock: Callable[[], float]) -> None:
        self._inbox = inbox
        self._held = held
        self._clock = clock
        self.resume(remembered)

    def resume(self, remembered: Remembered) -> None:
        """Go on from what the inbox remembers, and forget what was known before."""
        self._watermarks = dict(remembered.watermarks)
        self._parts = {
            bucket: (at, frozenset(remembered.partial.get(at, ()))) for bucket, at in remembered.partial_at.items()
        }
        """Bucket to the position of an event of which rows say that some handlers are done, and to these handlers."""
        self.floor = self._stored_floor = remembered.floor
        """Everything up to here is settled (durably at most a second later)."""
        self._stored_at = self._clock()
        self.spans: dict[Late, int] = {}
        """How far the spans of handlers that are behind have come, as read or written last."""
        self.caught = self._stored_caught = -1
        """Handlers that are behind have done everything up to here."""
        self._raised = -1
        """Up to where the commit under way moves all spans."""

    @property
    def receipts(self) -> Receipts:
        """What was settled, so that the log can contradict it."""
        return self._inbox.watermarks.receipts

    @property
    def floor_is_stored(self) -> bool:
        return self.floor <= self._stored_floor and self.caught <= self._stored_caught

    def floor_is_due(self, now: bool) -> bool:
        return not self.floor_is_stored and (now or self._clock() - self._stored_at >= FLOOR_SECONDS)

    async def write(self, connection: AsyncConnection, batch: Batch, *, floor_now: bool | None) -> None:
        """Write the batch, and the floor where it is due or `floor_now` (None: never). Raises `Fenced` when another
        process was here: roll back."""
        inbox, held = self._inbox, self._held
        fresh = [item for item in batch.notable if item.role < Role.AGAIN]
        again = [item for item in batch.notable if item.role >= Role.AGAIN]
        letters = [item.letter for item in batch.notable if item.letter is not None]
        # First what fences a process that is not alone: it would stumble over rows that the other has written.
        floor_is_due = floor_now is not None and self.floor_is_due(floor_now)
        if floor_is_due or again:
            await inbox.watermarks.fence(connection)
        doubted = batch.doubted
        await inbox.watermarks.assert_unmoved(
            connection, {item.bucket: self._watermarks[item.bucket] for item in doubted if not item.held}
        )
        await held.assert_held(connection, [item.turn for item in doubted if item.role >= Role.AGAIN])
        moves = {bucket: (self._watermarks[bucket], at) for bucket, at in batch.moves.items()}
        if batch.parts:
            # Also where it does not move, the watermark must stand where this process knows it.
            marks = {bucket: self._watermarks[bucket] for bucket in batch.parts}
            moves = {bucket: (at, at) for bucket, at in marks.items()} | moves
        await self._move(connection, batch, moves, floor_is_due)
        if batch.shared or self._parts:
            # The watermark does not tell that another process is done with some handlers of an event: its rows do.
            steps = {b: moves[b] for b in batch.moves if b in batch.shared or b in self._parts}
            await inbox.partials.check(connection, steps, self._parts)
        if self._parts:
            passed = {bucket: at for bucket, at in batch.moves.items() if bucket in self._parts}
            await inbox.partials.forget(connection, passed)
        if batch.late or batch.ended:
            reached = self.spans | batch.late
            await inbox.spans.advance(connection, [(late, self.spans[late], at) for late, at in batch.late.items()])
            await inbox.spans.end(connection, [(span[:3], reached[span[:3]]) for span in batch.ended])
        await inbox.partials.add(connection, [(at, *item.turn) for at, items in batch.parts.items() for item in items])
        if again:
            await held.end(connection, map(_ended, again))
        await held.hold(connection, _postponed(fresh))
        emissions = [row for item in batch.notable for row in item.emissions]
        replayed = {item.event.position for item in again if item.replayed}
        if before := await inbox.emitted_before(connection, emissions, replayed):
            for item in (item for item in batch.notable if item.emissions):
                item.leaves = [row for row in item.emissions if str(row.event.id) not in before]
            emissions = [row for item in batch.notable for row in item.emissions]
        # A held event moves no watermark. Who is at work beside this process would see its key free, and emit first.
        await inbox.watermarks.fence_rivals(connection, _emitting_again(batch))
        await inbox.staged.add(connection, emissions)
        never = [letter for event_id, letter in batch.never if await inbox.staged.give_up(connection, event_id)]
        await inbox.dead.add(connection, [*letters, *never, *(letter for letter, _ in batch.foreign)])
        skipped = [item for item in batch.notable if item.letter is not None and item.letter.reason == SKIPPED]
        await inbox.skips.remove(connection, [item.event.position for item in skipped if item.role is Role.PLAIN])
        await inbox.staged.remove(connection, batch.appended)
        await inbox.notes.forget(connection, [at for at, times in batch.noted.items() if not times])
        await inbox.notes.count(connection, {at: times for at, times in batch.noted.items() if times})
        if floor_is_due:
            await self._store_floor(connection)

    async def _move(
        self, connection: AsyncConnection, batch: Batch, moves: Mapping[int, tuple[int, int]], floor_is_due: bool
    ) -> None:
        """Move watermarks and their receipts, and with the floor the receipts of what has gone by up to there."""
        receipts, resting = self.receipts, dict[int, tuple[int, Written]]()
        written = receipts.settle([(item.bucket, item.event) for item in batch.finished if item.role is PLAIN])
        if floor_is_due and (due := receipts.due()):
            resting = {bucket: (self._watermarks[bucket], row) for bucket, row in due.items() if bucket not in moves}
            written = {bucket: row for bucket, row in due.items() if bucket in moves} | written
            receipts.wrote(due)
        await self._inbox.watermarks.move(connection, moves, written, resting)

    async def _store_floor(self, connection: AsyncConnection) -> None:
        """Write the floor, and how far handlers that are behind have caught up."""
        self._stored_floor, self._stored_at = self.floor, self._clock()
        await self._inbox.floor.raise_to(connection, self.floor)
        if self.caught > self._stored_caught:
            self._stored_caught = self.caught
            await self._inbox.spans.raise_all(connection, {name for _, name, _ in self.spans}, self.caught)
            self._raised = self.caught

    def written(self, batch: Batch) -> None:
        self.spans.update(batch.late)
        for span in batch.ended:
            del self.spans[span[:3]]
        if self._raised >= 0:
            self.spans = {late: max(at, self._raised) for late, at in self.spans.items()}
            self._raised = -1
        self._watermarks.update(batch.moves)
        self.receipts.committed(batch.moves)
        self._inbox.watermarks.fenced_rivals(_emitting_again(batch))
        if self._parts:
            for bucket in batch.moves:
                self._parts.pop(bucket, None)
        for bucket, items in batch.parts.items():
            at = items[-1].event.position
            before, handlers = self._parts.get(bucket, (-1, frozenset()))
            done = frozenset(item.handler.name for item in items if item.event.position == at)
            self._parts[bucket] = (at, handlers | done if before == at else done)


def _emitting_again(batch: Batch) -> set[int]:
    """Return the buckets in which a held event emits something."""
    return {item.bucket for item in batch.notable if item.role >= Role.AGAIN and item.emissions}


def _ended(item: InFlight) -> Ended:
    row = item.held
    assert row is not None
    return Ended(row, item.postponed, dead=item.letter is not None)


def _postponed(items: Iterable[InFlight]) -> list[HeldEvent]:
    return [item.postponed for item in items if item.postponed is not None]
