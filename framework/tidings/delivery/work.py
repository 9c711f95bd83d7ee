"""An accepted event on its way from its lane to the commit, and what a service remembers of attempts that failed."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple
from uuid import uuid4

import structlog
from sqlalchemy.exc import DBAPIError

from tidings._support.tracebacks import Kind, Tracebacks
from tidings.buses import Consumer
from tidings.database.dead_letters import Letter
from tidings.database.event_rows import key_of
from tidings.database.held_events import HeldEvent, Line
from tidings.database.staged_events import StagedEvent
from tidings.delivery.attempt import Failure
from tidings.delivery.crashes import Caution
from tidings.errors import DatabaseUnavailable, Fenced
from tidings.modelling.context import Context
from tidings.modelling.fingerprints import fingerprint
from tidings.modelling.handlers import Handler
from tidings.modelling.roster import Span
from tidings.protocol.metadata import own_metadata
from tidings.protocol.position import Ticket
from tidings.stores import RecordedEvent

__all__ = ["SKIPPED", "Item", "Step", "Troubles", "Turn"]

log = structlog.get_logger("tidings.dispatch")

SKIPPED: Final = "skipped by operator"
"""The reason of a dead letter that an operator wanted."""
LOSSES: Final = 5
"""So often in a row the connection may be lost while the same event is at work before that counts as its failure."""


class Step(NamedTuple):
    """What to do when everything up to here is settled: settle a delivery, raise the floor, or both."""

    consumer: Consumer | None = None
    tag: int = 0
    floor: int = -1
    caught: int = -1
    """Handlers that are behind have been given everything up to here."""


Turn = tuple[int, str]
"""An event for one handler: position, and the handler's name."""


class Troubles:
    """Attempts that failed, by turn: they outlive a rejoin, so that an event cannot be retried for ever."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.tracebacks: Final = Tracebacks(clock)
        self.process: Final = str(uuid4())
        """Who marks a range as its own: every process has another one (`tidings.delivery.crashes`)."""
        self.attempts: dict[Turn, int] = {}
        self.cautions: Final[dict[range, Caution]] = {}
        """Events under suspicion of ending the process, by bucket range."""
        self.condemned: dict[Turn, Failure] = {}
        """Dead without being run again: the handler ended the transaction that it was part of, or made its commit
        fail."""
        self.crashed: dict[int, tuple[Failure, int]] = {}
        """By position: dead without being run again by any handler, because the process crashed so many times while
        one of them ran (which one, nobody can say), or because an operator wants it."""
        self.buried: set[Turn] = set()
        """Of `crashed`: those that are settled, while others may still come. From the dead letters, they run again."""
        self.losses: dict[Turn, int] = {}
        """How often in a row the connection to the database was lost while the event's handler was at work."""
        self.suspected: set[Turn] = set()
        """Each gets a transaction of its own: the commit of a group that it was part of failed."""

    def skip(self, positions: Iterable[int]) -> None:
        """An operator wants the events at these positions dead without being run."""
        failure = Failure(SKIPPED, "", permanent=True, skipped=True)
        self.bury(dict.fromkeys(positions, (failure, 1)))

    def bury(self, crashed: Mapping[int, tuple[Failure, int]]) -> None:
        """The events at these positions are dead for each handler that comes to them next."""
        self.crashed |= crashed
        self.buried = {turn for turn in self.buried if turn[0] not in crashed}

    def crash(self, item: Item) -> tuple[Failure, int] | None:
        """Why the item is dead without being run, and after how many crashes; None where it is not."""
        return None if item.turn in self.buried else self.crashed.get(item.event.position)

    def condemn(self, item: Item, failure: Failure, what: str) -> Fenced:
        """What to raise for a handler that did what only joining again can undo."""
        self.condemned[item.turn] = Failure(failure.reason, failure.detail, permanent=True)
        return Fenced(
            f"handler {item.handler.name!r} {what} ({failure.reason}); the group is undone, and the event at position "
            f"{item.event.position} dead"
        )

    def lose(
        self, item: Item, database: str, failure: Failure | None, cause: BaseException | None
    ) -> DatabaseUnavailable:
        """What to raise when the connection was lost while the handler was at work. Mostly it is not the handler's
        doing; where it is so again and again, the event counts as failed, and others go on."""
        turn = position, name = item.turn
        losses = self.losses[turn] = self.losses.get(turn, 0) + 1
        why = failure.reason if failure is not None else f"{type(cause).__name__}: {cause}" if cause else "no error"
        said = (
            f"the connection was lost while handler {name!r} was at the event at position {position} ({why}). If it is "
            f"always this handler: its statements take longer than its timeout ({item.handler.timeout:g} s), or it "
            "keeps its session waiting for longer than the server bears (idle_in_transaction_session_timeout)"
        )
        if losses >= LOSSES:
            del self.losses[turn]
            self.attempts[turn] = item.handler.retry.attempts
            detail = failure.detail if failure is not None else ""
            self.condemned[turn] = Failure(f"ConnectionLost: {losses} times {said}", detail, permanent=False)
        return DatabaseUnavailable(f"database {database}: {said}. Nothing is lost: its group is undone, and done again")

    def suspect(self, ran: Sequence[Item], error: DBAPIError) -> Fenced:
        """The database refused a commit for what these wrote (a deferred constraint): find out whose doing it was."""
        reason = f"{type(error).__name__}: at the commit: {error.orig}"
        if len(ran) == 1:
            detail = "".join(traceback.format_exception(error))
            return self.condemn(ran[0], Failure(reason, detail, permanent=True), "wrote what cannot be committed")
        self.suspected.update(item.turn for item in ran)
        return Fenced(
            f"the database refused to commit what {len(ran)} events wrote ({reason}); they are undone, and each of "
            "them gets a transaction of its own"
        )

    def forget(self, items: Iterable[Item]) -> None:
        """They are settled."""
        if self.condemned or self.suspected or self.losses or self.crashed:
            for item in items:
                self.condemned.pop(item.turn, None)
                self.losses.pop(item.turn, None)
                self.suspected.discard(item.turn)
                if item.plain:
                    self.crashed.pop(item.event.position, None)
                elif item.event.position in self.crashed:
                    self.buried.add(item.turn)


class Item(Ticket[Step | None]):
    """One event for one handler, and in the end what came of it: nothing more, or a letter, or a held event. It is its
    own ticket, which says what to do when it and everything before it are settled."""

    __slots__ = (
        "bucket",
        "emissions",
        "ends",
        "event",
        "handler",
        "held",
        "late",
        "letter",
        "metadata",
        "more",
        "plain",
        "postponed",
        "replayed",
        "since",
        "trial",
    )

    def __init__(
        self,
        event: RecordedEvent,
        bucket: int,
        handler: Handler,
        step: Step | None,
        held: HeldEvent | None = None,
        *,
        replayed: bool = False,
        metadata: dict[str, Any] | None = None,
        more: bool = False,
        late: Span | None = None,
        ends: bool = False,
    ) -> None:
        self.value = step
        self.done = False
        self.event = event
        self.bucket = bucket
        self.handler = handler
        self.held = held
        """The row that this event was read from; None for one that comes from the bus or a pass. What brought a held
        event was settled long ago."""
        self.replayed = replayed
        """It had been settled before a replay."""
        self.metadata = metadata
        """The event's metadata document, where it was read already."""
        self.trial = False
        """It runs to find out whether its handler, whose breaker is open, still fails."""
        self.more = more
        """Other handlers have this event after this one: the watermark waits for them."""
        self.late = late
        """It is given to its handler on its own: this span of the bucket moves with it, and the watermark does not."""
        self.ends = ends
        """No event, but the end of the span, in the order of the lane."""
        self.plain = held is None and not more and late is None
        """The watermark moves with it."""
        self.since = 0.0
        """When its handler was called last, in seconds of the dispatcher's clock."""
        self.emissions: Sequence[StagedEvent] = ()
        self.letter: Letter | None = None
        self.postponed: HeldEvent | None = None

    def facts(self, now: float) -> dict[str, Any]:
        """Of a handler at work: for a line of the log, or an answer about health."""
        event = self.event
        return {
            "handler": self.handler.name,
            "event_id": str(event.id),
            "stream": event.stream,
            "position": event.position,
            "seconds": round(now - self.since, 1),
        }

    @property
    def key(self) -> str:
        """The partition key; it is read from the metadata, so ask only where it matters."""
        if self.held is not None:
            return self.held.key
        own = self.metadata
        if own is None:
            own = self.metadata = own_metadata(self.event.metadata)  # the attempt that comes next needs it too
        return key_of(self.event, own)

    @property
    def turn(self) -> Turn:
        return self.event.position, self.handler.name

    @property
    def line(self) -> Line:
        """What waits for what: events of one partition key in one line of handlers."""
        return self.key, self.handler.line_of(self.event.type)

    def succeed(self, context: Context) -> None:
        aliases = context.aliases
        self.emissions = [
            StagedEvent(self.bucket, self.event.position, stream, event, aliases.get(event.id, ()))
            for stream, event in context.emissions
        ]

    def fail(self, failure: Failure, tried: int, service: str, tracebacks: Tracebacks | None = None) -> float | None:
        """The verdict on a failed attempt, the `tried`-th since it was read: seconds until the next one in its lane,
        or None when it is now held, or dead."""
        event, held, retry = self.event, self.held, self.handler.retry
        # What only waited behind another event has its quick retries still before it.
        untried = held is None or not held.attempts
        attempts, tries = (tried, 0) if held is None or untried else (held.attempts + tried, held.tries + 1)
        facts = {
            "service": service,
            "handler": self.handler.name,
            "event_id": str(event.id),
            "stream": event.stream,
            "position": event.position,
            "attempt": attempts,
            "reason": failure.reason,
        }
        if failure.place:
            facts |= {"error": failure.error, "place": failure.place}
        kind = Kind(self.handler.name, failure.error, failure.place)
        if tracebacks is not None and failure.detail and (more := tracebacks.due(kind)) is not None:
            # The text, not the exception: what renders that as JSON follows its causes, which may go in circles.
            facts |= {"exception": failure.detail, "failed_like_this_since": more}
        again = not failure.permanent and not failure.deploy_needed
        if again and self.trial and held is not None and attempts < retry.attempts:
            self._hold(attempts, held.tries, 0.0, failure.reason, failure.detail)  # the breaker makes the pauses
            return None
        if again and untried and attempts < retry.attempts:
            pause = retry.wait(attempts)
            log.warning("event.retrying", pause=round(pause, 3), **facts)
            return pause
        if retry.hold is not None and (failure.deploy_needed or (again and tries < retry.hold.attempts)):
            delay = retry.hold.wait(tries + 1)
            log.warning("event.held", delay=round(delay, 3), **facts)
            self._hold(attempts, tries, delay, failure.reason, failure.detail)
            return None
        holds_key = retry.hold_key and not failure.skipped
        if failure.skipped:
            log.warning("event.skipped", **facts)
        else:
            log.error("event.dead", holds_key=holds_key, **facts)
        self.letter = Letter.of_event(
            event,
            self.bucket,
            key=self.key,
            holds_key=holds_key,
            handler=self.handler.name,
            line=self.handler.line_of(event.type),
            attempts=attempts,
            reason=failure.reason,
            detail=failure.detail,
            replayed=self.replayed,
        )
        return None

    def wait(self, reason: str = "waits behind an earlier event of its partition key", tried: int = 0) -> None:
        """Hold it without running it, after `tried` attempts; it is due as soon as nothing is in its way."""
        self._hold(tried, 0, 0.0, reason, None)

    def _hold(self, attempts: int, tries: int, delay: float, reason: str, detail: str | None) -> None:
        now = time.time()
        self.postponed = HeldEvent(
            self.event,
            self.bucket,
            self.key,
            self.handler.name,
            attempts,
            tries,
            now + delay,
            reason,
            detail,
            self.replayed,
            since=now if self.held is None or self.held.since is None else self.held.since,
            code=fingerprint(self.handler.function, self.handler.events),
            handlers_line=self.handler.line_of(self.event.type),
        )

    @property
    def blocks(self) -> int:
        """How many rows more than before will hold its key once this is committed."""
        before = 0 if self.held is None else 1
        after = 1 if self.postponed is not None or (self.letter is not None and self.letter.holds_key) else 0
        return after - before
