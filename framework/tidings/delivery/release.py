"""What a commit sets free: held events that may be looked for again, notes, staged events, and those that waited to see
what others wrote. It writes nothing.
"""

from __future__ import annotations

from tidings.delivery.batch import Batch, Pending
from tidings.delivery.crashes import Caution
from tidings.delivery.due import Due
from tidings.delivery.inflight import Role
from tidings.delivery.lanes import EventLanes
from tidings.delivery.side_by_side import SideBySide
from tidings.delivery.staged import Stager

__all__ = ["Release"]


class Release:
    """The part of one bucket range that acts after each commit."""

    def __init__(
        self, lanes: EventLanes, due: Due, stager: Stager, caution: Caution, pending: Pending, side_by_side: SideBySide
    ) -> None:
        self._lanes = lanes
        self._due = due
        self._stager = stager
        self._caution = caution
        self._pending = pending
        self._side_by_side = side_by_side

    def begins(self) -> float:
        """A transaction begins: the time that `committed` is to be told."""
        return self._stager.now()

    def committed(self, batch: Batch, began: float) -> None:
        """It is durable; its transaction began at `began`, as `begins` said."""
        for item in batch.notable:
            held = item.held
            if held is not None:
                self._due.landed(held)
            if item.emissions:
                # A database that was set back while this process runs may have brought the row of a held event back.
                self._stager.add(item.emissions, since=None if item.role >= Role.AGAIN else began)
        for position in batch.noted:
            self._caution.notes.cleared(position)
        self._lanes.committed(len(batch.finished))
        if not self._pending.unseen:
            self._side_by_side.committed()
        if self._pending.parked:
            self._lanes.unpark(self._pending.freed())
        if batch.noted:
            self._lanes.pump()
