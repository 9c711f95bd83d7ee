"""Which of a service's partitions a process asks another one for, so that each has its share. Decides; does nothing.

The bus gives a queue to whoever came first, so the first process has them all, and later ones stand by. A process that
has two fewer than another asks for one by a note in that partition's row; the other one finds it, drains, and goes to
the end of the line. Nobody counts processes: one that is gone has asked for nothing, and its partitions have been taken
over by another process. Each asks only while that evens things out, so it comes to rest.
"""

from __future__ import annotations

from collections.abc import Sequence

from tidings.database.layout import Range

__all__ = ["asked_of", "to_ask"]


def to_ask(rows: Sequence[Range], me: str) -> dict[int, str]:
    """What this process should ask for: half of what the busiest other one has more, of those not asked for yet.

    First bucket of the partition to the process that has it.
    """
    owned: dict[str, list[Range]] = {}
    mine = 0
    for row in rows:
        if me in (row.active, row.asked):
            mine += 1
        elif row.active is not None and row.asked is None:
            owned.setdefault(row.active, []).append(row)
    busiest = max(sorted(owned), key=lambda process: len(owned[process]), default=None)
    if busiest is None:
        return {}
    theirs = owned[busiest]
    surplus = (len(theirs) - mine) // 2
    return {row.first: busiest for row in theirs[len(theirs) - surplus :]} if surplus > 0 else {}


def asked_of(rows: Sequence[Range], me: str) -> list[int]:
    """The partitions that this process is asked for, by their first buckets."""
    return [row.first for row in rows if row.active == me and row.asked not in (None, me)]
