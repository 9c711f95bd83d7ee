"""The receipts of a bucket range, as a process carries them on: what has gone by, and what is committed. No I/O.

An event that some handler wants is added when it is committed, one that no handler wants when it is accepted. The row
of a bucket says both: the latter up to the watermark and, whenever the floor is stored, up to the floor. So the next
process finds everything up to the floor and the watermark in the receipt.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from tidings.protocol.receipts import Receipt, Sums, mark
from tidings.stores import RecordedEvent

__all__ = ["BucketRow", "Passed", "Receipts", "Written"]


class BucketRow(NamedTuple):
    """What the row of a bucket says when a process joins."""

    watermark: int
    at: int
    """The receipt has everything up to here, the watermark included."""
    receipt: Receipt


class Passed(NamedTuple):
    """All events of a bucket that no handler wanted, since this process joined, up to `position`."""

    position: int
    sums: Sums


Written = tuple[int, str]
"""What the row of a bucket is to say: up to where its receipt has everything, and the receipt."""


class Receipts:
    """The receipts of one bucket range."""

    def __init__(self) -> None:
        self.begin({})

    def begin(self, found: Mapping[int, BucketRow]) -> None:
        """Carry on from these, by bucket, and forget what was known before."""
        self._from = {bucket: row.at for bucket, row in found.items()}
        """What comes up to here is in the receipt already."""
        self._at = dict(self._from)
        """Up to where the rows have everything, as far as this process knows."""
        self._committed = {bucket: (row.watermark, row.receipt) for bucket, row in found.items()}
        """The position committed last, and the receipt without what has gone by since this process joined."""
        self._writing: dict[int, tuple[int, Receipt]] = {}
        """The same for buckets of which a transaction is under way."""
        self._passed: dict[int, list[Passed]] = {}
        """What had gone by before each event under way that some handler wants, and after the last of them."""
        self._followed: set[int] = set()
        """Buckets in which such an event has come since something went by."""
        self._settled: Mapping[int, Passed] = {}

    # ---- what is accepted

    def accept(self, bucket: int) -> None:
        """Know that an event was accepted that some handler wants."""
        if bucket in self._passed:
            self._followed.add(bucket)

    def pass_over(self, bucket: int, event: RecordedEvent) -> None:
        """Add an event that was accepted and that no handler wants."""
        position = event.position
        if position <= self._from[bucket]:
            return
        passed = self._passed.setdefault(bucket, [])
        before = passed[-1].sums if passed else Sums()
        now = Passed(position, before.with_event(position, mark(event)))
        if passed and bucket not in self._followed:
            passed[-1] = now
        else:
            passed.append(now)
            self._followed.discard(bucket)

    def tails(self) -> Mapping[int, Passed]:
        """Return what has gone by up to now, by bucket."""
        return {bucket: passed[-1] for bucket, passed in self._passed.items()}

    # ---- what is settled

    def settle(self, events: Iterable[tuple[int, RecordedEvent]]) -> dict[int, Written]:
        """Return what rows are to say once these events are committed: each with its bucket, in the order in which they
        have ended. It holds once `committed` is called; what is undone is settled again."""
        ended = defaultdict[int, list[RecordedEvent]](list)
        for bucket, event in events:
            ended[bucket].append(event)
        at, begun, known, passed, writing = self._at, self._from, self._committed, self._passed, self._writing
        written: dict[int, Written] = {}
        for bucket, of in ended.items():
            last, receipt = known[bucket]
            receipt = receipt.with_settled(of, last, begun[bucket])
            position = of[-1].position
            writing[bucket] = position, receipt
            if bucket in passed:
                receipt = self._with_passed(bucket, position, receipt)
            written[bucket] = max(at[bucket], position), receipt.write()
        return written

    def _with_passed(self, bucket: int, position: int, receipt: Receipt) -> Receipt:
        before = [each for each in self._passed[bucket] if each.position < position]
        return receipt._replace(sums=receipt.sums.plus(before[-1].sums)) if before else receipt

    def committed(self, buckets: Collection[int]) -> None:
        """Know that what `settle` said of these buckets is durable."""
        at, known, passed, writing = self._at, self._committed, self._passed, self._writing
        for bucket in buckets:
            written = writing.pop(bucket, None)
            if written is None:
                continue
            known[bucket] = written
            position = written[0]
            at[bucket] = max(at[bucket], position)
            if bucket in passed:
                before = passed[bucket]
                while len(before) > 1 and before[1].position < position:
                    del before[0]

    # ---- what has gone by, when the floor is stored

    def settled(self, tails: Mapping[int, Passed]) -> None:
        """Know that everything is settled that had been accepted when `tails` said this."""
        self._settled = tails

    def due(self) -> dict[int, Written]:
        """Return what rows do not say yet of what has gone by and is settled: it is to be written with the floor."""
        found = {}
        for bucket, passed in self._settled.items():
            if passed.position > self._at[bucket]:
                _, receipt = self._committed[bucket]
                receipt = receipt._replace(sums=receipt.sums.plus(passed.sums))
                found[bucket] = passed.position, receipt.write()
        return found

    def wrote(self, due: Mapping[int, Written]) -> None:
        """Know that what was `due` is written."""
        for bucket, (at, _) in due.items():
            self._at[bucket] = max(self._at[bucket], at)
