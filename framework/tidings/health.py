"""Is this process well? Judged on progress, from facts alone: nothing here asks, waits or opens anything.

*Live* asks whether a restart would help; *ready* whether events get through. A socket that is open proves neither: what
counts is that markers come, that the floor follows them, and that no handler is over its time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

__all__ = ["Check", "Health", "Progress", "RelayFacts", "ServiceFacts", "Work", "judge_live", "judge_ready"]

MARKER_SECONDS: Final = 30.0
"""Markers come every 5 s when nothing else moves; this long without one, the path is broken somewhere."""
STALLED_SECONDS: Final = 30.0
"""So long something may be behind without moving, beyond what the handlers at work may honestly take."""
GRACE_SECONDS: Final = 30.0
"""Beyond its timeout; a handler that does not end by then never will."""
SLOW_SECONDS: Final = 5.0
"""A handler at work for longer is named, well or not."""
STANDBY_SECONDS: Final = 3.0
"""Waiting for the lock for longer means that another relay has it, and an older trouble is over."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at; `remedy` says what to do when it is not `ok`."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""

    def document(self) -> dict[str, Any]:
        told = {"name": self.name, "ok": self.ok, "detail": self.detail}
        return told if self.ok else told | {"remedy": self.remedy}


@dataclass(frozen=True, slots=True)
class Health:
    """The answer, with everything that it rests on."""

    checks: tuple[Check, ...]
    otherwise: str
    """The word for a process that is not well."""

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def document(self) -> dict[str, Any]:
        """For JSON. `status` is "ok", "unready" or "stuck"."""
        return {
            "status": "ok" if self.ok else self.otherwise,
            "checks": [check.document() for check in self.checks],
        }


class Progress:
    """Remembers between two looks since when something has been behind without moving."""

    def __init__(self) -> None:
        self._done: int | None = None
        self._since = 0.0
        self._moved_at: float | None = None

    def look(self, done: int, *, behind: bool, now: float) -> float:
        """Seconds for which `done` has stood still while there was more to do; 0 for one that moves or has finished."""
        if done != self._done:
            self._moved_at = None if self._done is None else now
            self._done, self._since = done, now
        elif not behind:
            self._since = now
        return now - self._since

    def idle(self, now: float) -> float | None:
        """Seconds since it was seen to move; None if it never was."""
        return None if self._moved_at is None else now - self._moved_at


@dataclass(frozen=True, slots=True)
class Work:
    """A handler at work on an event; times in seconds."""

    handler: str
    event_id: str
    stream: str
    position: int
    seconds: float
    timeout: float

    def __str__(self) -> str:
        return (
            f"handler {self.handler!r} at event {self.event_id} of stream {self.stream!r} (position {self.position}) "
            f"for {self.seconds:.0f} s"
        )


@dataclass(frozen=True, slots=True)
class ServiceFacts:
    """What is known of one service in this process. Positions are -1 where there is none; times are seconds."""

    name: str
    starting: bool = False
    stopping: bool = False
    died: str | None = None
    """Why it is not running any more."""
    standing_by: str | None = None
    """The process at work, on a bus that reaches only its own process; this one waits for its place."""
    joined: bool = True
    consuming: bool = True
    healing: bool = False
    marker_age: float | None = None
    """Since the last marker on this connection to the bus."""
    marker: int = -1
    floor: int = -1
    stalled: float = 0.0
    """For so long the floor has stood still below the marker."""
    paused: str | None = None
    """Why only one event is tried from time to time: everything fails."""
    work: tuple[Work, ...] = ()
    settled: int = -1
    """The floor as committed by whichever process of the service."""
    others_idle: float | None = None
    """Since `settled` was seen to move; None if it never was."""
    waiting_event: str | None = None
    """The first event above `settled`, where it was looked for."""
    database: str | None = None
    """What the database answered instead of an answer."""
    store: str | None = None
    """What the store answered instead of an answer."""
    partitions: tuple[ServiceFacts, ...] = ()
    """Where the service is divided: of each partition what can differ among them."""


@dataclass(frozen=True, slots=True)
class RelayFacts:
    """What is known of the relay in this process."""

    name: str
    started: bool = True
    needed: bool = True
    """A service of its process is at work; false while all stand by."""
    leading: bool = False
    waiting: float | None = None
    """Seconds spent waiting for the lock."""
    marker_age: float | None = None
    """Since the bus confirmed a marker, in seconds."""
    confirmed: int = -1
    stalled: float = 0.0
    """For so long nothing was confirmed though an event waits, in seconds."""
    waiting_event: str | None = None
    trouble: str | None = None
    store: str | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that is known of a process."""

    services: tuple[ServiceFacts, ...] = ()
    relays: tuple[RelayFacts, ...] = field(default=())


def judge_live(facts: Facts) -> Health:
    """Would a restart help? Only what hangs, or has ended, in this process."""
    checks = [Check("loop", True, "the event loop turns")]
    for service in facts.services:
        name = service.name
        if service.died is not None:
            checks.append(Check(f"{name}.running", False, service.died, "restart the process; its log says why"))
        checks += [
            Check(
                f"{name}.handlers",
                False,
                f"{work}; its timeout is {work.timeout:g} s, and it does not end when it is cancelled",
                "restart the process: the event comes again. Give what the handler waits for a limit of its own",
            )
            for work in service.work
            if work.seconds > work.timeout + GRACE_SECONDS
        ]
    return Health(tuple(checks), "stuck")


def judge_ready(facts: Facts) -> Health:
    """Do events get through this process?"""
    checks = [check for relay in facts.relays for check in _relay(relay)]
    checks += [check for service in facts.services for check in _service(service)]
    return Health(tuple(checks), "unready")


def _service(facts: ServiceFacts) -> Iterator[Check]:
    name = f"{facts.name}.running"
    if facts.died is not None:
        yield Check(name, False, facts.died, "restart the process; its log says why")
        return
    if facts.stopping:
        yield Check(name, False, "it drains and stops", "wait, or ask another process of the service")
        return
    if facts.starting:
        yield Check(
            name, False, "it is starting: it has not joined the log yet", "wait; the log says what it waits for"
        )
        return
    if facts.standing_by is not None:
        yield Check(name, True, f"a standby: {facts.standing_by} is at work, and this process takes over when it ends")
        yield _answers(f"{facts.name}.database", facts.database, "the service's database", "TIDINGS_DATABASE")
        yield _answers(f"{facts.name}.store", facts.store, "the event store", "TIDINGS_STORE")
        if not facts.database and not facts.store:
            yield _other_at_work(facts)
        return
    yield Check(name, True, "it has joined the log")
    yield _answers(f"{facts.name}.database", facts.database, "the service's database", "TIDINGS_DATABASE")
    yield _answers(f"{facts.name}.store", facts.store, "the event store", "TIDINGS_STORE")
    yield Check(
        f"{facts.name}.bus",
        facts.consuming,
        "connected" if facts.consuming else "not connected",
        "is the broker up, and TIDINGS_BUS right? The log says what it answered (bus.unreachable, bus.lost)",
    )
    if facts.paused is not None:
        yield Check(
            f"{facts.name}.attempts",
            False,
            facts.paused,
            "mend what the handlers need; one event is tried from time to time, and the first success resumes the rest",
        )
    if not facts.consuming or facts.database or facts.store:
        return  # what follows from these would only hide them
    if not facts.partitions:
        yield from _path(facts)
        return
    wrong = [check for part in facts.partitions for check in _path(part) if not check.ok]
    yield from wrong
    if not wrong:
        all_, here = len(facts.partitions), sum(part.marker_age is not None for part in facts.partitions)
        detail = f"{here} of {all_} partitions are at work here, {all_ - here} stand by"
        yield Check(f"{facts.name}.partitions", True, f"{detail}; everything up to position {facts.settled} is settled")


def _other_at_work(facts: ServiceFacts) -> Check:
    name, settled = f"{facts.name}.progress", f"everything up to position {facts.settled} is settled"
    if facts.waiting_event is None or facts.stalled <= STALLED_SECONDS:
        if facts.settled < 0:
            settled = "nothing is settled yet"
        return Check(name, True, f"{settled}{', nothing waits' if facts.waiting_event is None else ''}")
    return Check(
        name,
        False,
        f"{settled}, and no further for {facts.stalled:.0f} s: {facts.waiting_event} waits for {facts.standing_by}",
        "look at that process: its /ready and its log say what holds it up. If it is paused or hangs, end it "
        "(kill -9): this one takes over within seconds",
    )


def _path(facts: ServiceFacts) -> Iterator[Check]:
    yield _markers(facts)
    if facts.marker_age is not None:
        yield _progress(facts)


def _answers(name: str, error: str | None, what: str, setting: str) -> Check:
    if error is None:
        return Check(name, True, f"{what} answers")
    return Check(name, False, error, f"is {what} up, and {setting} right?")


def _markers(facts: ServiceFacts) -> Check:
    name = f"{facts.name}.markers"
    if facts.marker_age is not None:
        return Check(
            name,
            facts.marker_age <= MARKER_SECONDS,
            f"the last marker came {facts.marker_age:.0f} s ago: everything up to position {facts.marker} is published",
            "does the relay run? It sends one every 5 s; its own /ready says what holds it up",
        )
    # Of several processes of a service only one hears markers. Another is well while somebody moves the floor, or as
    # long as there is nothing to move it for.
    moving = facts.others_idle is not None and facts.others_idle <= STALLED_SECONDS
    if facts.settled >= 0 and (facts.waiting_event is None or moving):
        rest = "nothing waits" if facts.waiting_event is None else "and on it goes"
        return Check(
            name, True, f"none heard here; everything up to position {facts.settled} is settled, {rest}: a standby"
        )
    waiting = f"; {facts.waiting_event} waits" if facts.waiting_event else ""
    return Check(
        name,
        False,
        f"no marker was heard on this connection{waiting}",
        "start a relay on this store and bus; it sends one every 5 s. If one runs, its /ready says what holds it up",
    )


def _progress(facts: ServiceFacts) -> Check:
    name = f"{facts.name}.progress"
    slowest = max(facts.work, key=lambda work: work.seconds, default=None)
    named = f"; at work: {slowest}" if slowest is not None and slowest.seconds > SLOW_SECONDS else ""
    honest = max((work.timeout for work in facts.work), default=0.0)
    if facts.floor >= facts.marker:
        return Check(name, True, f"everything up to position {facts.floor} is settled{named}")
    healing = ", a pass over the log is under way" if facts.healing else ""
    detail = f"settled up to position {facts.floor} of {facts.marker}{healing}"
    if facts.stalled > STALLED_SECONDS + honest:
        upon = named or (f"; it stands before {facts.waiting_event}" if facts.waiting_event else "")
        return Check(
            name,
            False,
            f"{detail}, and no further for {facts.stalled:.0f} s{upon}",
            "the log says what fails there (event.retrying, handler.ignores_timeout, service.rejoining)",
        )
    return Check(name, True, detail + named)


def _relay(facts: RelayFacts) -> Iterator[Check]:
    name = f"relay.{facts.name}"
    if not facts.started:
        yield Check(name, False, "it is starting", "wait; the log says what it waits for")
        return
    if not facts.needed:
        yield Check(f"{name}.bus", True, "a standby, as all services of this process are: nobody here could hear it")
        return
    yield _answers(f"{name}.store", facts.store, "the event store", "TIDINGS_STORE")
    if facts.leading and facts.marker_age is not None and facts.trouble is None:
        yield Check(
            f"{name}.bus",
            facts.marker_age <= MARKER_SECONDS,
            f"it leads; the bus confirmed a marker {facts.marker_age:.0f} s ago",
            "the broker confirms nothing: is it out of memory or disk (it then blocks publishers), or a queue without "
            "a leader?",
        )
        stalled = facts.waiting_event is not None and facts.stalled > STALLED_SECONDS
        upon = f", and no further for {facts.stalled:.0f} s: {facts.waiting_event} waits" if stalled else ""
        yield Check(
            f"{name}.progress",
            not stalled,
            f"published up to position {facts.confirmed}{upon}",
            "the log says what the bus or the store answers (relay.interrupted); restart the relay if it says nothing",
        )
    elif facts.waiting is not None and (facts.trouble is None or facts.waiting > STANDBY_SECONDS):
        yield Check(f"{name}.bus", True, f"another relay leads; standing by for {facts.waiting:.0f} s")
    else:
        yield Check(
            f"{name}.bus",
            False,
            facts.trouble or "it has not reached the bus yet",
            "is the broker up, and TIDINGS_BUS right? It goes on by itself as soon as it can",
        )
