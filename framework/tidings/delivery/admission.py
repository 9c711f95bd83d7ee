"""Accepted events enter the lanes: one event in flight for each handler that is given the event, and its ticket.

It decides nothing of order or loss (`intake`, `healing`, `catchup` do), and runs nothing.
"""

from __future__ import annotations

from typing import Any, Final

import structlog

from tidings.database.dead_letters import Letter
from tidings.database.replays import Replay
from tidings.delivery.acknowledgement import Acknowledgement
from tidings.delivery.batch import Pending
from tidings.delivery.inflight import PLAIN, InFlight, Role, Step
from tidings.delivery.lanes import EventLanes
from tidings.modelling.declaration import Declaration
from tidings.modelling.handlers import Handler
from tidings.modelling.roster import Roster, Span
from tidings.stores import RecordedEvent

__all__ = ["Admission"]

log = structlog.get_logger("tidings.delivery")

_NOTHING: Final = RecordedEvent(-1, "", -1, "", b"", b"", False, bytes(16), 0)
"""Stands for an event where a span ends."""


class Admission:
    """The door to the lanes of one bucket range."""

    def __init__(
        self,
        service: Declaration,
        roster: Roster,
        replay: Replay,
        lanes: EventLanes,
        pending: Pending,
        acknowledgement: Acknowledgement,
    ) -> None:
        self._service = service
        self._roster = roster
        self.replay = replay
        """How far replays sent the range back."""
        self._lanes = lanes
        self._pending = pending
        self._acknowledgement = acknowledgement
        self._receipts = acknowledgement.receipts

    def submit(
        self,
        event: RecordedEvent,
        bucket: int,
        step: Step | None = None,
        *,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """An accepted event, and its metadata document where that was read. One that this service does not handle is
        settled without a trace but for its bucket's receipt."""
        position, roster, lanes, replay = event.position, self._roster, self._lanes, self.replay
        handlers = roster.handlers(event.type, bucket, position)
        if not handlers:
            self._receipts.pass_over(bucket, event)
            if step is not None:
                self._acknowledgement.settle(step)
            return
        self._receipts.accept(bucket)
        replayed = bool(replay.upto) and replay.covers(bucket, position)
        if len(handlers) > 1:
            for handler in handlers[:-1]:
                item = InFlight(event, bucket, handler, Role.SHARED, None, metadata)
                item.replayed = replayed or roster.again(handler.name, position)
                lanes.add(item)
        item = InFlight(event, bucket, handlers[-1], PLAIN, step, metadata)
        if replayed or roster.partial:
            item.replayed = replayed or roster.again(item.handler.name, position)
        self._acknowledgement.take(item)
        lanes.add(item)
        lanes.flow()

    def submit_late(self, event: RecordedEvent, handler: Handler, span: Span, metadata: dict[str, Any] | None) -> None:
        """An event of the past, for a handler that is given it on its own."""
        item = InFlight(event, span.bucket, handler, Role.LATE, span, metadata)
        self._acknowledgement.take(item)
        self._lanes.add(item)
        self._lanes.pump()

    def end_span(self, span: Span) -> None:
        """Nothing is left of it once everything before it in its lane is done."""
        item = InFlight(_NOTHING, span.bucket, self._service.named[span.handler], Role.END, span)
        item.replayed = True
        self._lanes.add(item)
        self._lanes.pump()

    def settle(self, step: Step) -> None:
        """Nothing to handle, but to be settled in its turn: a marker, a duplicate, the progress of a pass."""
        self._acknowledgement.settle(step)

    def bury(self, letter: Letter, step: Step) -> None:
        """A message that is not ours: recorded, then settled."""
        log.error("message.dead", service=self._service.name, reason=letter.reason)
        self._pending.bury(letter, self._acknowledgement.begin(step))

    @property
    def full(self) -> bool:
        """More waits than should: a pass reads faster than handlers work, and one may hold up the rest."""
        return self._acknowledgement.full

    async def room(self) -> None:
        """Wait until less is unsettled."""
        await self._acknowledgement.room()
