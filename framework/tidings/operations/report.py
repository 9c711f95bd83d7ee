"""What `verify` found, as facts and in words: log, relay, and each service with everything that is not settled.

It looks at nothing itself. Lists hold the first few of a kind, counts hold all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, Literal
from uuid import UUID

from tidings._support.escaping import plain

__all__ = [
    "DeadEvent",
    "HandlerReport",
    "FailingHandler",
    "HeldSummary",
    "PendingEvent",
    "RelayReport",
    "Report",
    "ServiceReport",
    "StagedSummary",
    "moment_of",
]

NAMED: Final = 20
"""Entries of each kind that are named; all are counted."""


@dataclass(frozen=True, slots=True)
class PendingEvent:
    """In the log, handled by the service's code, and neither handled nor dead."""

    position: int
    event_id: str
    type: str
    stream: str
    version: int
    ticks: int
    """When it was recorded, as in `RecordedEvent`."""


@dataclass(frozen=True, slots=True)
class HeldSummary:
    """Failed for now, or waiting behind one of its key that did: it runs again at `due`, seconds since 1970."""

    position: int
    event_id: str
    type: str
    stream: str
    handler: str
    attempts: int
    due: float
    reason: str


@dataclass(frozen=True, slots=True)
class FailingHandler:
    """A handler whose events are held because it failed. Times are seconds since 1970."""

    handler: str
    events: int
    """Without those that only wait behind one of them."""
    since: float | None
    """When the oldest of them was held first."""
    due: float
    """When the next of them runs again."""
    reason: str


@dataclass(frozen=True, slots=True)
class DeadEvent:
    """Given up, with the reason: settled, but somebody should look at it."""

    kind: str
    position: int | None
    event_id: str | None
    type: str | None
    stream: str | None
    handler: str | None
    attempts: int
    reason: str


@dataclass(frozen=True, slots=True)
class StagedSummary:
    """Emitted in a transaction that was committed, and not known to be appended yet."""

    event_id: str
    type: str
    stream: str
    cause: int
    requested: bool = False
    """By a request, not by the handler of the event at position `cause`."""

    def __str__(self) -> str:
        by = "by a request" if self.requested else f"caused by position {self.cause}"
        return f"staged {self.type} {self.event_id} for {self.stream}, {by}"


@dataclass(slots=True)
class RelayReport:
    """A relay's checkpoint against the log."""

    name: str
    checkpoint: int | None
    """Everything up to here was published; -1 where none was ever stored, None for one that cannot be read."""
    wrong: str | None = None
    """Why it cannot be right, with the remedy."""
    behind: int = 0
    """Carried events above the checkpoint: they may be published, but nobody noted it."""

    @property
    def ok(self) -> bool:
        """Being behind is no fault of the log's or a service's: what is published later, or never, is read from it."""
        return self.wrong is None

    def lines(self) -> Iterator[str]:
        if self.wrong is not None:
            yield f"relay {self.name}: {self.wrong}"
        elif self.checkpoint is not None and self.checkpoint < 0:
            yield f"relay {self.name}: has never stored a checkpoint, {_behind(self.behind)}"
        else:
            yield f"relay {self.name}: checkpoint {self.checkpoint}, {_behind(self.behind)}"


def _behind(count: int) -> str:
    return f"{count} events above it are not known to be published" if count else "nothing above it"


@dataclass(slots=True)
class HandlerReport:
    """One handler of which there is something to say."""

    handler: str
    state: Literal["at work", "catching up", "to begin", "gone"]
    """`to begin`: the service was not started with it yet. `gone`: the code does not have it any more."""
    skipped_upto: int = -1
    """What was settled before it began was not given to it, up to this position; -1 for nothing."""
    done_upto: int = -1
    """Position up to which a handler that catches up, or is gone, has done everything."""
    needs_past: bool = False
    """A handler that is to begin will be given what the service has settled."""
    pending_count: int | None = None
    """Events that a handler which catches up still has to do; None where nobody counted them."""

    @property
    def ok(self) -> bool:
        """Nothing that it is to have is missing."""
        return self.state in ("at work", "gone") or (self.state == "to begin" and not self.needs_past)

    def lines(self, service: str) -> Iterator[str]:
        name = f"handler {self.handler}"
        if self.state == "catching up":
            count = "" if self.pending_count is None else f", {self.pending_count} events are pending"
            yield f"{name} catches up: done up to position {self.done_upto}{count}"
        elif self.state == "gone":
            yield f"{name} is not in this code: it was given everything up to position {self.done_upto}"
        elif self.state == "to begin" and self.needs_past:
            yield f"{name} has NOT begun, and is to be given the past: start service {service} with this code"
        elif self.state == "to begin":
            yield (
                f"{name} has not begun: when service {service} is started with this code, it is given what comes then, "
                "and nothing that was settled before (since='start' or since=POSITION would give it that)"
            )
        if self.skipped_upto >= 0:
            yield (
                f"{name} runs from position {self.skipped_upto + 1} on: what was settled before was never given to it "
                "(--deep counts it; since='start' or since=POSITION, and a start of the service, would give it that)"
            )


@dataclass(slots=True)
class ServiceReport:
    """One service's part."""

    service: str
    floor: int
    """Everything up to here is settled in all buckets."""
    ran: bool = True
    """Whether its database knows it; where it never ran, everything is pending."""
    other_log: str | None = None
    """The log that its database knows instead of this one."""
    behind: int = 0
    """Events above the floor that are carried to services."""
    beyond: int = -1
    """A floor or watermark above the end of the log: something that never was counts as settled."""
    unmarked: int = -1
    """The relay's checkpoint where the floor is below it: the marker that follows it was not taken in yet."""
    partitions: int = 1
    """Ranges of buckets with a floor of their own."""
    pending_count: int = 0
    pending: list[PendingEvent] = field(default_factory=list)
    held_count: int = 0
    held: list[HeldSummary] = field(default_factory=list)
    failing: list[FailingHandler] = field(default_factory=list)
    """What the held events failed in, the handler with the most first."""
    held_due: float | None = None
    """When the first held event that waits for nothing but its time has its turn, seconds since 1970."""
    dead_count: int = 0
    dead: list[DeadEvent] = field(default_factory=list)
    staged_count: int = 0
    staged: list[StagedSummary] = field(default_factory=list)
    on_the_way: int = 0
    """Events and staged events that came after the question was asked, and are not settled or appended yet."""
    missing: bool = False
    """There is no database of the service where the settings say."""
    handlers: list[HandlerReport] = field(default_factory=list)
    """Handlers that are behind the service, or were not given all that it has settled."""

    @property
    def ok(self) -> bool:
        waits = self.pending_count or self.held_count or self.staged_count
        return not waits and self.beyond < 0 and all(handler.ok for handler in self.handlers)

    @property
    def healable(self) -> bool:
        """`--repair` can do something: what is held has its time, and what is beyond the log has no remedy here."""
        return self.beyond < 0 and bool(self.pending_count or self.staged_count)

    def lines(self, upto: int) -> Iterator[str]:
        done = "settled" if self.ran else "nothing to do"
        state = f"{done} up to position {upto}" if self.ok else f"NOT settled up to position {upto}"
        waiting = f", {self.held_count} held" if self.held_count else ""
        counts = f"{self.pending_count} pending{waiting}, {self.staged_count} staged, {self.dead_count} dead"
        floor = f"floor {self.floor}" if self.floor >= 0 else "no floor yet"
        later = f"; {self.on_the_way} came since and are on the way" if self.on_the_way else ""
        yield f"{self.service}: {state} ({counts}; {floor}){later}"
        if self.other_log is not None:
            yield f"  follows log {self.other_log}, not this one: is TIDINGS_STORE right? Or: tidings log adopt"
        elif self.missing:
            yield "  has no database: it has never run, or TIDINGS_DATABASE names another place than where it runs"
        elif not self.ran:
            yield "  has never run on this log: its database does not know it"
        for failing in self.failing:
            since = "" if failing.since is None else f", the oldest held since {moment_of(failing.since)}"
            yield f"  handler {failing.handler} failed at {failing.events} events{since}: {failing.reason}"
        for handler in self.handlers:
            for line in handler.lines(self.service):
                yield f"  {line}"
        if self.beyond >= 0:
            yield f"  claims position {self.beyond}, which the log does not reach: was it restored from a backup?"
            yield "  Restore the newer log; or follow docs/restoring.md: tidings log renew-identity, log adopt"
        if self.unmarked >= 0 and not self.ok:
            yield f"  no marker for the relay's checkpoint {self.unmarked} was taken in"
        for event in self.pending:
            where = f"{event.stream}@{event.version}, position {event.position}"
            yield f"  pending {event.type} {event.event_id} at {where}"
        yield from _more(self.pending_count - len(self.pending), "pending")
        for late in self.held:
            where = f"of {late.stream}, position {late.position}, {late.attempts} attempts, due {moment_of(late.due)}"
            yield f"  held {late.type} {late.event_id} {where}: {_first_line(late.reason)}"
        yield from _more(self.held_count - len(self.held), f"held (tidings held list {self.service})")
        for row in self.staged:
            yield f"  {row}"
        yield from _more(self.staged_count - len(self.staged), "staged")
        for letter in self.dead:
            what = f"{letter.type} {letter.event_id} of {letter.stream}" if letter.event_id else f"a {letter.kind}"
            where = f", position {letter.position}" if letter.position is not None else ""
            yield f"  dead {what}{where}, {letter.attempts} attempts: {_first_line(letter.reason)}"
        yield from _more(self.dead_count - len(self.dead), "dead")


def _more(count: int, what: str) -> Iterable[str]:
    return (f"  and {count} more {what}",) if count > 0 else ()


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def moment_of(seconds: float) -> str:
    """Seconds since 1970 as people read them, UTC; a clock that jumped may have written any number."""
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):
        return f"{seconds:g} s after 1970"


@dataclass(slots=True)
class Report:
    """The answer for all services; `str` of it is for people."""

    log: UUID
    position: int
    """The last event that is carried to services; what is asked is whether everything up to it is settled."""
    services: list[ServiceReport]
    complete: bool = True
    """False when a limit ended the counting: then there may be more pending than the report says."""
    relay: RelayReport | None = None
    """None when nobody asked for a relay."""

    @property
    def dead(self) -> int:
        """Dead letters of all services: settled, but given up."""
        return sum(service.dead_count for service in self.services)

    @property
    def ok(self) -> bool:
        """Every event is settled in every service: handled, or dead with its reason; nothing is held or staged; and
        the relay's checkpoint, if it was asked for, is one."""
        return all(service.ok for service in self.services) and (self.relay is None or self.relay.ok)

    def __str__(self) -> str:
        head = f"log {self.log}: {'all settled' if self.ok else 'NOT all settled'} up to position {self.position}"
        if self.dead:
            head += f"; {self.dead} DEAD, which were given up (tidings dead list)"
        relay = self.relay.lines() if self.relay is not None else ()
        lines = (*relay, *(line for service in self.services for line in service.lines(self.position)))
        return "\n".join([head, *map(plain, lines)])
