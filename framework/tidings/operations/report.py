"""What `verify` found, as data and as text: log, relay, and each service with everything that is not settled.

It reads nothing itself. Lists have the first few of each kind; counts include all.
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
"""Entries of each kind to name; all are counted."""


@dataclass(frozen=True, slots=True)
class PendingEvent:
    """An event in the log that the service has handlers for and has not settled."""

    position: int
    event_id: str
    type: str
    stream: str
    version: int
    ticks: int
    """When it was recorded, in ticks as in `RecordedEvent`."""


@dataclass(frozen=True, slots=True)
class HeldSummary:
    """An event that failed, or waits behind a failed one of its key; it runs at `due`, seconds since 1970."""

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
    """A handler with held events because it failed. Times are seconds since 1970."""

    handler: str
    events: int
    """Events in which it failed, without those that only wait behind one."""
    since: float | None
    """When the oldest of them was first held."""
    due: float
    """When the next of them runs again."""
    reason: str


@dataclass(frozen=True, slots=True)
class DeadEvent:
    """A dead letter, with the reason: settled, but somebody should look at it."""

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
    """An event that was emitted in a committed transaction, and may not be in the log yet."""

    event_id: str
    type: str
    stream: str
    cause: int
    requested: bool = False
    """Whether a request emitted it, and not the handler of the event at position `cause`."""

    def __str__(self) -> str:
        by = "by a request" if self.requested else f"caused by position {self.cause}"
        return f"staged {self.type} {self.event_id} for {self.stream}, {by}"


@dataclass(slots=True)
class RelayReport:
    """A relay's checkpoint against the log."""

    name: str
    checkpoint: int | None
    """Position up to which everything was published; -1 if none was ever stored, None if it cannot be read."""
    wrong: str | None = None
    """Why it cannot be right, with the remedy."""
    behind: int = 0
    """Carried events above the checkpoint. They may be published, but that was not recorded."""

    @property
    def ok(self) -> bool:
        """Whether the checkpoint can be right. Being behind is no fault: services can read events from the log."""
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
    """A handler that is behind, not begun, gone, or was not given all events."""

    handler: str
    state: Literal["at work", "catching up", "to begin", "gone"]
    """`to begin`: the service was not started with it yet. `gone`: the code no longer has it."""
    skipped_upto: int = -1
    """Position up to which it was not given what was settled before it began; -1 if it was given everything."""
    done_upto: int = -1
    """Position up to which a handler that is catching up or gone has done everything."""
    needs_past: bool = False
    """Whether a handler that is to begin will be given what the service has already settled."""
    pending_count: int | None = None
    """Events that a handler which is catching up still has to do; None if they were not counted."""

    @property
    def ok(self) -> bool:
        """Whether it has been given every event that it is to have."""
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
    """What one service has settled, and everything that it has not."""

    service: str
    floor: int
    """Position up to which everything is settled in all buckets."""
    ran: bool = True
    """Whether its database knows the service on this log. If not, everything is pending."""
    other_log: str | None = None
    """The log that its database follows instead of this one, whose events it has therefore not done."""
    behind: int = 0
    """Carried events above the floor."""
    beyond: int = -1
    """A floor or watermark above the end of the log, so that events not yet appended count as settled; else -1."""
    unmarked: int = -1
    """The relay's checkpoint if the floor is below it: its marker was not taken in yet; else -1."""
    partitions: int = 1
    """Number of partitions, each with a floor of its own."""
    pending_count: int = 0
    pending: list[PendingEvent] = field(default_factory=list)
    held_count: int = 0
    held: list[HeldSummary] = field(default_factory=list)
    failing: list[FailingHandler] = field(default_factory=list)
    """Handlers that the held events failed in, the one with the most events first."""
    held_due: float | None = None
    """When the first held event that waits only for its time is due, seconds since 1970."""
    dead_count: int = 0
    dead: list[DeadEvent] = field(default_factory=list)
    staged_count: int = 0
    staged: list[StagedSummary] = field(default_factory=list)
    on_the_way: int = 0
    """Events that were appended or staged after verifying began, and are not settled or appended yet."""
    missing: bool = False
    """Whether the service has no database where the settings say."""
    handlers: list[HandlerReport] = field(default_factory=list)
    """Handlers that are behind, or were not given everything that the service has settled."""

    @property
    def astray(self) -> bool:
        """Whether its database follows another log, or is ahead of this one.

        Until that is mended, the service can be neither verified nor repaired.
        """
        return self.beyond >= 0 or self.other_log is not None

    @property
    def ok(self) -> bool:
        """Whether everything is settled: nothing is pending, held or staged, and no handler is behind."""
        waits = self.pending_count or self.held_count or self.staged_count
        return not waits and not self.astray and all(handler.ok for handler in self.handlers)

    @property
    def healable(self) -> bool:
        """Whether `--repair` can do something: held events run when they are due, and what is astray it cannot mend."""
        return not self.astray and bool(self.pending_count or self.staged_count)

    def lines(self, upto: int) -> Iterator[str]:
        done = "settled" if self.ran else "nothing to do"
        state = f"{done} up to position {upto}" if self.ok else f"NOT settled up to position {upto}"
        waiting = f", {self.held_count} held" if self.held_count else ""
        counts = f"{self.pending_count} pending{waiting}, {self.staged_count} staged, {self.dead_count} dead"
        floor = f"floor {self.floor}" if self.floor >= 0 else "no floor yet"
        later = f"; {self.on_the_way} came since and are on the way" if self.on_the_way else ""
        yield f"{self.service}: {state} ({counts}; {floor}){later}"
        if self.other_log is not None:
            yield f"  follows log {self.other_log}, not this one: is TIDINGS_STORE right? After a restore of the log:"
            yield f"  tidings log adopt {self.service}"
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
    """Format seconds since 1970 for people, in UTC. Works for any number: a clock may have been wrong."""
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):
        return f"{seconds:g} s after 1970"


@dataclass(slots=True)
class Report:
    """The result for all services; `str` of it is for people."""

    log: UUID
    position: int
    """Position of the last carried event. Everything up to it must be settled."""
    services: list[ServiceReport]
    complete: bool = True
    """False if a limit ended the counting: more may be pending than the report says."""
    relay: RelayReport | None = None
    """The relay whose checkpoint was compared; None if none was asked for."""
    unseen: tuple[str, ...] = ()
    """Services of which nothing is known, because their databases do not answer."""

    @property
    def dead(self) -> int:
        """Dead letters of all services: settled, but given up."""
        return sum(service.dead_count for service in self.services)

    @property
    def ok(self) -> bool:
        """Whether every event is settled in every service, and nothing is held or staged.

        The relay's checkpoint, if asked for, must be a possible one, and every service must have been seen.
        """
        seen = all(service.ok for service in self.services) and (self.relay is None or self.relay.ok)
        return seen and not self.unseen

    def __str__(self) -> str:
        head = f"log {self.log}: {'all settled' if self.ok else 'NOT all settled'} up to position {self.position}"
        if self.unseen:
            head += f"; NOT SEEN: {', '.join(self.unseen)}"
        if self.dead:
            head += f"; {self.dead} DEAD, which were given up (tidings dead list)"
        relay = self.relay.lines() if self.relay is not None else ()
        lines = (*relay, *(line for service in self.services for line in service.lines(self.position)))
        return "\n".join([head, *map(plain, lines)])
