"""Which partition keys wait, and for what: pure bookkeeping beside the lanes. No I/O.

A key is blocked while it has a held event, or a dead letter that holds it. Its held events fly, as many as were read,
through the bucket's lane; when one of them fails again, those behind it are not run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tidings.held import HeldEvent
from tidings.work import Item

__all__ = ["Keys"]


class Keys:
    """What the database says about keys, as of the last group, and what was done since."""

    def __init__(self) -> None:
        self.blocked: dict[int, dict[str, int]] = {}
        """By bucket, so that few events are asked for their key: key to the number of rows that block it. To look at
        only."""
        self._flying: Counter[str] = Counter()
        self._failed: set[str] = set()

    def read(self, blocked: dict[int, dict[str, int]], uncommitted: Iterable[Item]) -> None:
        """What the database holds now, which becomes ours to change, and the items that will change it with the next
        commit."""
        self.blocked = blocked
        for item in uncommitted:
            self.ended(item)

    def ended(self, item: Item) -> None:
        """It was run, or held, or is dead; the next commit will say so. Later items in its lane are judged by it."""
        if item.blocks:
            keys = self.blocked.setdefault(item.bucket, {})
            keys[item.key] = keys.get(item.key, 0) + item.blocks
            if keys[item.key] <= 0:
                del keys[item.key]
            if not keys:
                del self.blocked[item.bucket]
        if item.held is not None and not item.blocks:
            self._failed.add(item.held.key)

    def must_wait(self, item: Item) -> bool:
        """A new event of a blocked key is to be held; a held one behind another that failed is to be left alone."""
        if item.held is not None:
            return item.held.key in self._failed
        keys = self.blocked.get(item.bucket)
        return keys is not None and item.key in keys

    def left(self, row: HeldEvent) -> None:
        """A held event was not run, for whatever reason: those of its key behind it must wait, too."""
        self._failed.add(row.key)

    def blocks(self, row: HeldEvent) -> bool:
        """Something of its key is held, or dead and holds it."""
        return row.key in self.blocked.get(row.bucket, ())

    @property
    def flying(self) -> frozenset[str]:
        """Keys with held events in lanes, or in a commit under way: reading them again would run them twice."""
        return frozenset(self._flying)

    def fly(self, key: str) -> None:
        self._flying[key] += 1

    def land(self, key: str) -> bool:
        """A held event has left its lane, and what came of it is durable. True when it was the key's last."""
        self._flying[key] -= 1
        if self._flying[key]:
            return False
        del self._flying[key]
        self._failed.discard(key)
        return True
