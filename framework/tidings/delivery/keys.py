"""Which partition keys wait, and for what: pure bookkeeping beside the lanes. No I/O.

A line is a partition key in a line of handlers (`Handler.line_of`). It is blocked while it has a held event, or a dead
letter that holds it. Its held events fly, as many as were read, through the bucket's lane; when one of them fails
again, those behind it are not run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tidings.database.held_events import HeldEvent, Line
from tidings.delivery.inflight import AGAIN, InFlight

__all__ = ["Keys"]


class Keys:
    """What the database says about keys, as of the last group, and what was done since."""

    def __init__(self) -> None:
        self.blocked: dict[int, dict[Line, int]] = {}
        """By bucket, so that few events are asked for their key: line to the number of rows that block it. To look
        at only."""
        self.rows = 0
        """How many rows block keys, as they were read last."""
        self._apart: Counter[tuple[int, Line]] = Counter()
        """Buckets and lines that items block in transactions of their own, which may or may not be committed."""
        self._meanwhile: set[tuple[int, Line]] = set()
        """Those of them since a reading began: it may or may not have seen them."""
        self._flying: Counter[Line] = Counter()
        self._failed: set[Line] = set()

    def reading(self) -> None:
        """The database is about to be read."""
        self._meanwhile = set(self._apart)

    def read(self, blocked: dict[int, dict[Line, int]], uncommitted: Iterable[InFlight]) -> None:
        """What the database holds now, which becomes ours to change, and the items that will change it with the next
        commit. Of lines that were blocked apart since `reading`, the larger number is true."""
        known, self.blocked = self.blocked, blocked
        self.rows = sum(sum(lines.values()) for lines in blocked.values())
        for item in uncommitted:
            self.ended(item)
        for bucket, line in self._meanwhile:
            before, lines = known.get(bucket, {}).get(line, 0), self.blocked.get(bucket, {})
            if before > lines.get(line, 0):
                self.blocked.setdefault(bucket, lines)[line] = before
        self._meanwhile.clear()

    def ended(self, item: InFlight, *, apart: bool = False) -> None:
        """It was run, or held, or is dead; the next commit will say so, or another transaction, `apart` from it. Later
        items in its lane are judged by it."""
        if blocks := item.blocks:
            lines, line = self.blocked.setdefault(item.bucket, {}), item.line
            if apart:
                self._apart[item.bucket, line] += 1
                self._meanwhile.add((item.bucket, line))
            lines[line] = lines.get(line, 0) + blocks
            if lines[line] <= 0:
                del lines[line]
            if not lines:
                del self.blocked[item.bucket]
        if item.role >= AGAIN and not blocks:
            self._failed.add(item.line)

    def committed(self, items: Iterable[InFlight]) -> None:
        """The transaction of these, apart from the next commit, is committed."""
        for item in items:
            if item.blocks:
                self._apart[item.bucket, item.line] -= 1
                if not self._apart[item.bucket, item.line]:
                    del self._apart[item.bucket, item.line]

    def must_wait(self, item: InFlight) -> bool:
        """A new event of a blocked key is to be held; a held one behind another that failed is to be left alone."""
        if item.role >= AGAIN:
            return item.line in self._failed
        lines = self.blocked.get(item.bucket)
        return lines is not None and item.line in lines

    def left(self, row: HeldEvent) -> None:
        """A held event was not run, for whatever reason: those of its key behind it must wait, too."""
        self._failed.add(row.line)

    def blocks(self, row: HeldEvent) -> bool:
        """Something of its line is held, or dead and holds it."""
        return row.line in self.blocked.get(row.bucket, ())

    @property
    def flying(self) -> frozenset[Line]:
        """Lines with held events in lanes, or in a commit under way: reading them again would run them twice."""
        return frozenset(self._flying)

    def fly(self, line: Line) -> None:
        self._flying[line] += 1

    def land(self, line: Line) -> bool:
        """A held event has left its lane, and what came of it is durable. True when it was the line's last."""
        self._flying[line] -= 1
        if self._flying[line]:
            return False
        del self._flying[line]
        self._failed.discard(line)
        return True
