"""Check each part of a process, from facts alone: nothing here asks, waits or opens anything.

A socket that is open proves nothing: what counts is that markers come, that the floor follows them, and that no handler
is over its time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from tidings.hosting.answers import Check
from tidings.hosting.facts import RelayFacts, ServiceFacts, Work
from tidings.operations.causes import Part
from tidings.operations.remedies import STORE_WRITABLE, writable, writes_refused

__all__ = [
    "STALLED_SECONDS",
    "STILL_SECONDS",
    "check_liveness",
    "check_relay",
    "check_service",
    "is_overdue",
    "is_still",
    "leads",
]

MARKER_SECONDS: Final = 30.0
"""Seconds without a marker after which the path is broken somewhere: one comes every 5 s when nothing else moves."""
STALLED_SECONDS: Final = 30.0
"""Seconds that something may be behind without moving, beyond the timeouts of the handlers at work."""
GRACE_SECONDS: Final = 30.0
"""Seconds beyond its timeout after which a handler is taken for one that never ends."""
SLOW_SECONDS: Final = 5.0
"""Seconds after which a handler at work is named, well or not."""
STILL_SECONDS: Final = 60.0
"""Seconds in which nothing at all moves, after which a process with work is stuck."""
STANDBY_SECONDS: Final = 3.0
"""Seconds of waiting for the lock after which another relay must have it, and an older trouble is over."""


def check_liveness(facts: ServiceFacts) -> Iterator[Check]:
    """What a restart would mend."""
    if facts.died is not None:
        yield Check(f"{facts.name}.running", False, facts.died, "restart the process; its log says why")
    overdue = [work for work in facts.work if is_overdue(work)]
    # A handler's transaction cannot be undone while its database does not answer: a restart would not help that.
    if overdue and facts.database is None:
        slowest = max(overdue, key=lambda work: work.seconds)
        more = f" (and {len(overdue) - 1} more like it)" if len(overdue) > 1 else ""
        yield Check(
            f"{facts.name}.handlers",
            False,
            f"{slowest}; its timeout is {slowest.timeout:g} s, and it does not end when it is cancelled{more}",
            "restart the process: the event comes again. Give what the handler waits for a limit of its own",
        )
    for part in facts.partitions or (facts,):
        if is_still(part):
            yield _still(part)


def is_overdue(work: Work) -> bool:
    """Its timeout was over long ago, and it has not ended."""
    return work.seconds > work.timeout + GRACE_SECONDS


def is_still(facts: ServiceFacts) -> bool:
    """Work is there, nothing has moved for a minute, no handler is at work or waits for its next attempt, and whatever
    it needs answers, as far as that was asked."""
    if facts.died or facts.starting or facts.stopping or facts.standing_by or not facts.consuming:
        return False
    troubles = (facts.database, facts.database_writes, facts.store, facts.store_writes, facts.bus_trouble)
    return facts.still > STILL_SECONDS and not facts.work and not facts.resting and not any(troubles)


def _still(facts: ServiceFacts) -> Check:
    upon = f": it stands before {facts.oldest}" if facts.oldest else ""
    return Check(
        f"{facts.name}.still",
        False,
        f"{facts.unsettled} events and markers are taken and not settled, and nothing has moved for {facts.still:.0f} "
        f"s, though no handler is at work, and database, store and bus answer{upon}",
        "restart the process: nothing is lost, what is not settled comes again. Please report it with the log",
        Part.PROGRESS,
        facts.name,
    )


def check_service(facts: ServiceFacts, relay_leads: bool) -> Iterator[Check]:
    """Do events get through this service? `relay_leads`: the relay of the same process does."""
    name, ours = f"{facts.name}.running", (Part.PROCESS, facts.name)
    if facts.died is not None:
        yield Check(name, False, facts.died, "restart the process; its log says why", *ours)
        return
    if facts.stopping:
        yield Check(name, False, "it drains and stops", "wait, or ask another process of the service", *ours)
        return
    if facts.starting:
        detail = "it is starting: it has not joined the log yet"
        yield Check(name, False, detail, "wait; the log says what it waits for (process.waiting)", *ours)
        return
    if facts.standing_by is not None:
        yield Check(name, True, f"a standby: {facts.standing_by} is at work, and this process takes over when it ends")
        yield _database(facts)
        yield _store(f"{facts.name}.store", facts.store, facts.store_writes, facts.name)
        if not facts.database and not facts.store:
            yield _other_at_work(facts)
        return
    yield Check(name, True, "it has joined the log")
    yield _database(facts)
    yield _store(f"{facts.name}.store", facts.store, facts.store_writes, facts.name)
    yield _bus(facts)
    yield from _failing(facts)
    if facts.log is not None:
        yield Check(
            f"{facts.name}.log",
            False,
            facts.log,
            "stop the relay and all services, and follow docs/restoring.md. No event is safe to handle until then",
            Part.STORE,
            facts.name,
        )
    if not facts.consuming or facts.database or facts.store or facts.log:
        return  # what is known of the rest is older than these
    if not facts.partitions:
        yield from _path(facts, facts.name, relay_leads)
        return
    wrong = [check for part in facts.partitions for check in _path(part, facts.name, relay_leads) if not check.ok]
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
        Part.QUEUE,
        facts.name,
    )


def _path(facts: ServiceFacts, service: str, relay_leads: bool) -> Iterator[Check]:
    markers = _markers(facts, service, relay_leads)
    yield markers
    if facts.refused is not None:
        yield Check(
            f"{facts.name}.foreign",
            False,
            f"queue {facts.queue} holds messages that are not of this log's relay: {facts.refused}",
            "what the log holds is handled when the next marker of its own relay comes. Has that relay the same "
            "TIDINGS_BUS_KEYS? Does another one run on a copy of the log? See who may write to exchange tidings.events "
            "and to the queue (rabbitmqctl list_permissions)",
            Part.FOREIGN,
            service,
            serious=False,
        )
    if facts.marker_age is not None:
        yield _progress(facts, service)


def _database(facts: ServiceFacts) -> Check:
    name, what, ours = f"{facts.name}.database", "the service's database", (Part.DATABASE, facts.name)
    if facts.database is not None:
        remedy = f"is {what} up, and TIDINGS_DATABASE right?"
        return Check(name, False, facts.database, remedy, *ours, origin=facts.database_origin)
    if facts.database_writes is not None:
        detail = f"{what} answers, but takes no writes: {facts.database_writes}"
        remedy = writable(facts.database_place, facts.database_client)
        return Check(name, False, detail, remedy, *ours, origin=facts.database_origin)
    return Check(name, True, f"{what} answers")


def _bus(facts: ServiceFacts) -> Check:
    name = f"{facts.name}.bus"
    if facts.consuming:
        return Check(name, True, "connected")
    if facts.bus_trouble is None:
        detail = "not connected to its queue: it joins again"
        remedy = "wait; the log says why (service.rejoining)"
        return Check(name, False, detail, remedy, Part.CONNECTION, facts.name)
    detail = f"not connected: {facts.bus_trouble}"
    if facts.queue and facts.queue in facts.bus_trouble:
        remedy = "tidings topology diff shows what the bus has instead; rabbitmqctl list_queues name state consumers"
        return Check(f"{facts.name}.queue", False, detail, remedy, Part.QUEUE, facts.name)
    remedy = (
        "is the broker up, and TIDINGS_BUS right? On its machine: rabbitmq-diagnostics check_running; rabbitmqctl "
        "list_connections. It goes on by itself as soon as it can"
    )
    return Check(name, False, detail, remedy, Part.BUS)


def _failing(facts: ServiceFacts) -> Iterator[Check]:
    if facts.paused is not None:
        yield Check(
            f"{facts.name}.attempts",
            False,
            facts.paused,
            "mend what the handler needs: its events are held, one of them is tried from time to time, and the first "
            f"success resumes it; other handlers go on. tidings held list shows them (of service {facts.name})",
            Part.BREAKER,
            facts.name,
            serious=facts.all_paused,
        )
    if facts.held is not None:
        remedy = f"tidings held list shows what failed and why; retry, skip or drop it there (of service {facts.name})"
        yield Check(f"{facts.name}.held", False, facts.held, remedy, Part.HELD, facts.name, serious=False)
    if facts.taken is not None:
        detail = f"somebody else has appended events under ids that only this service should use, {facts.taken}"
        remedy = (
            "the service's own events were appended beside them, under other ids. See who may write to that stream, "
            "and set TIDINGS_ID_KEYS (docs/trust.md)"
        )
        yield Check(f"{facts.name}.ids", False, detail, remedy, Part.FOREIGN, facts.name, serious=False)


def _markers(facts: ServiceFacts, service: str, relay_leads: bool) -> Check:
    name = f"{facts.name}.markers"
    if facts.marker_age is not None:
        detail = (
            f"the last marker came {facts.marker_age:.0f} s ago: everything up to position {facts.marker} is published"
        )
        if facts.marker_age <= MARKER_SECONDS:
            return Check(name, True, detail)
        if facts.stranger is not None:
            return _misled(facts, detail)
        # Markers come in order with the events: they wait in its own queue behind what it has not done yet.
        if facts.full:
            return Check(
                name, True, f"{detail}; newer ones wait in its queue, behind {facts.unsettled} unsettled events"
            )
        if _recent(facts.heard_age):
            return Check(
                name, True, f"{detail}; messages come, so far up to position {facts.heard_upto}: newer markers follow"
            )
        return _silent(facts, service, relay_leads, detail)
    if facts.stranger is not None:
        return _misled(facts, "no marker of its own log was heard on this connection")
    # Of several processes of a service only one hears markers. Another is well while somebody moves the floor, or as
    # long as there is nothing to move it for.
    moving = facts.others_idle is not None and facts.others_idle <= STALLED_SECONDS
    if facts.settled >= 0 and (facts.waiting_event is None or moving):
        rest = "nothing waits" if facts.waiting_event is None else "and on it goes"
        return Check(
            name, True, f"none heard here; everything up to position {facts.settled} is settled, {rest}: a standby"
        )
    waiting = f"; {facts.waiting_event} waits" if facts.waiting_event else ""
    if facts.elsewhere is not None and facts.waiting_event is not None:
        detail = f"another process of the service ({facts.elsewhere}) has queue {facts.queue}"
        if facts.others_still <= STALLED_SECONDS:
            return Check(f"{facts.name}.queue", True, f"{detail}: a standby")
        return Check(
            f"{facts.name}.queue",
            False,
            f"{detail}, and has settled nothing for {facts.others_still:.0f} s{waiting}",
            "look at that process: its /ready and its log say what holds it up. If it is paused or hangs, end it "
            "(kill -9): this one takes over within seconds",
            Part.QUEUE,
            service,
        )
    return _silent(facts, service, relay_leads, f"no marker was heard on this connection{waiting}")


def _misled(facts: ServiceFacts, detail: str) -> Check:
    """A relay is at work, but for another log."""
    return Check(
        f"{facts.name}.markers",
        False,
        f"{detail}. A relay of another store publishes on this bus: its messages are of log {facts.stranger}",
        "stop that relay, or start it with the TIDINGS_STORE of this service; tidings log show says which log a store "
        "holds",
        Part.RELAY,
    )


def _silent(facts: ServiceFacts, service: str, relay_leads: bool, detail: str) -> Check:
    """Nothing comes, though there is room for more: of a relay, or of a queue that a relay does not reach."""
    name = f"{facts.name}.markers"
    # On a new connection nothing is known of the relay yet: whatever ended the one before may end this one.
    unproved = (Part.MARKERS, service) if facts.marker_age is None else (Part.RELAY,)
    if facts.read_age is not None:
        detail = f"{detail}. It reads the log by itself meanwhile, {facts.read_age:.0f} s ago the last time"
    if _recent(facts.came_age):  # of a relay that is at work, or by somebody who sends what an older one has sent
        if _recent(facts.heard_age):
            what = f"Messages come, so far up to position {facts.heard_upto}, and no marker yet"
        else:
            what = (
                f"Messages come, but none newer than position {facts.heard_upto}: of a relay that begins again, or old "
                "ones that somebody sends again"
            )
        return Check(
            name,
            False,
            f"{detail}. {what}",
            "tidings status shows how far each relay is. One that begins again proves itself when it has come that "
            "far. If none moves, see who may write to exchange tidings.events and to the queue",
            *unproved,
        )
    if relay_leads:
        return Check(
            name,
            False,
            f"{detail}. The relay of this process leads, and the bus confirms its markers, so queue {facts.queue} does "
            "not get them",
            "tidings topology diff shows whether the queue is there and bound; who consumes it: rabbitmqctl "
            "list_consumers",
            Part.QUEUE,
            service,
        )
    return Check(
        name,
        False,
        detail,
        "start a relay on this store and bus: tidings relay. It sends a marker every 5 s. If one runs, its /ready says "
        "what holds it up",
        *unproved,
    )


def _culprit(facts: ServiceFacts) -> Work | None:
    """The handler that the rest waits for: the one at work on the oldest unsettled event; else the one at work for the
    longest time, unless the oldest event only rests between two attempts of its own."""
    at_oldest = [work for work in facts.work if facts.oldest is not None and work.event_id in facts.oldest]
    others = () if facts.oldest_tried else facts.work
    return max(at_oldest or others, key=lambda work: work.seconds, default=None)


def _progress(facts: ServiceFacts, service: str) -> Check:
    name = f"{facts.name}.progress"
    slowest = _culprit(facts)
    named = f"; at work: {slowest}" if slowest is not None and slowest.seconds > SLOW_SECONDS else ""
    honest = max((work.timeout for work in facts.work), default=0.0)
    if facts.floor >= facts.marker and not facts.unsettled:
        return Check(name, True, f"everything up to position {facts.floor} is settled{named}")
    healing = ", a pass over the log is under way" if facts.healing else ""
    detail = f"settled up to position {facts.floor} of {facts.marker}{healing}"
    if facts.unsettled:
        detail += f"; {facts.unsettled} events and markers are taken and not settled"
    if facts.stalled <= STALLED_SECONDS + honest:
        return Check(name, True, detail + named)
    detail = f"{detail}, and no further for {facts.stalled:.0f} s"
    if slowest is not None:
        return Check(
            f"{facts.name}.handlers",
            False,
            f"{detail}; at work: {slowest}; its timeout is {slowest.timeout:g} s",
            f"find out what handler {slowest.handler!r} waits for, and give that wait a limit of its own; if the work "
            f"is honest, it needs more time. tidings why {slowest.event_id} tells the event's story",
            Part.HANDLER,
            service,
        )
    if facts.oldest_tried:
        return Check(
            f"{facts.name}.handlers",
            False,
            f"{detail}; it stands before {facts.oldest}, which has failed {facts.oldest_tried} times",
            "the log says what fails there (event.retrying); it is held after its quick attempts, and the rest goes on",
            Part.HANDLER,
            service,
        )
    before = facts.oldest or facts.waiting_event
    return Check(
        name,
        False,
        f"{detail}; it stands before {before}" if before else detail,
        "the log says what fails there (event.retrying, handler.ignores_timeout, service.rejoining)",
        Part.PROGRESS,
        service,
    )


def _store(name: str, error: str | None, writes: str | None, service: str = "") -> Check:
    """`service`: the one that has asked the store; others may have asked it in vain, or not."""
    if error is not None:
        return Check(name, False, error, "is the event store up, and TIDINGS_STORE right?", Part.STORE, service)
    if writes is not None:
        return Check(name, False, writes_refused(writes), STORE_WRITABLE, Part.STORE_WRITES, service)
    return Check(name, True, "the event store answers")


def _recent(age: float | None) -> bool:
    return age is not None and age <= MARKER_SECONDS


def leads(facts: RelayFacts) -> bool:
    """The relay leads, and the bus confirms what it sends."""
    return facts.leading and _recent(facts.marker_age) and facts.trouble is None


def check_relay(facts: RelayFacts) -> Iterator[Check]:
    """Is the log published?"""
    name = f"relay.{facts.name}"
    if not facts.started:
        yield Check(name, False, "it is starting", "wait; the log says what it waits for", Part.RELAY)
        return
    if not facts.needed:
        yield Check(f"{name}.bus", True, "a standby, as all services of this process are: nobody here could hear it")
        return
    yield _store(f"{name}.store", facts.store, facts.store_writes)
    if facts.leading and facts.marker_age is not None and facts.trouble is None:
        yield Check(
            f"{name}.bus",
            facts.marker_age <= MARKER_SECONDS,
            f"it leads; the bus confirmed a marker {facts.marker_age:.0f} s ago",
            "the broker confirms nothing: is it out of memory or disk (it then blocks publishers), or a queue without "
            "a leader? rabbitmq-diagnostics alarms; rabbitmqctl list_queues name state",
            Part.BUS,
        )
        stalled = facts.waiting_event is not None and facts.stalled > STALLED_SECONDS
        upon = f", and no further for {facts.stalled:.0f} s: {facts.waiting_event} waits" if stalled else ""
        if facts.refusing is not None:
            what, _, remedy = facts.refusing.partition(". ")
            others = "the others get everything, and the service behind it reads the log by itself"
            yield Check(f"{name}.queues", False, f"{what}; {others}", remedy, Part.QUEUE, serious=False)
        yield Check(
            f"{name}.progress",
            not stalled,
            f"published up to position {facts.confirmed}{upon}",
            "the log says what the bus or the store answers (relay.interrupted); restart the relay if it says nothing",
            Part.RELAY,
        )
    elif facts.waiting is not None and (facts.trouble is None or facts.waiting > STANDBY_SECONDS):
        yield Check(f"{name}.bus", True, f"another relay leads; standing by for {facts.waiting:.0f} s")
    elif facts.trouble is not None and facts.trouble_is_the_stores:
        if facts.store is None and facts.store_writes is None:
            remedy = "the store answers by now: the relay goes on by itself. If it does not, its log says why"
            yield Check(f"{name}.store", False, facts.trouble, remedy, Part.STORE)
        else:
            yield Check(f"{name}.progress", False, facts.trouble, "it goes on by itself as soon as it can", Part.RELAY)
    else:
        yield Check(
            f"{name}.bus",
            False,
            facts.trouble or "it has not reached the bus yet",
            "is the broker up, and TIDINGS_BUS right? On its machine: rabbitmq-diagnostics check_running. It goes on "
            "by itself as soon as it can",
            Part.BUS,
        )
