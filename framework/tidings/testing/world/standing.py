"""Who stands where in a world, and why: the words of its failures."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

from tidings.delivery.outcomes import BEHIND
from tidings.errors import TidingsError
from tidings.modelling.context import ATTEMPT
from tidings.operations.report import Report, ServiceReport
from tidings.protocol.position import carried
from tidings.stores import RecordedEvent
from tidings.testing.world.clock import OWNER
from tidings.testing.world.failures import Failures
from tidings.testing.world.seat import Seat

__all__ = ["Unsettled", "at_work", "faults_of", "handler_at_work", "is_left", "told"]

LINES: Final = 10
"""Warnings and errors of the log that a failure shows, at most."""


class Unsettled(TidingsError, AssertionError):
    """A world is not settled, and nothing in it moves any more. It says who stands where and why."""


def faults_of(report: Report, failures: Failures) -> str:
    """Say what of a report a test has to hear of; empty if there is nothing."""
    found = []
    for service in report.services:
        held = [
            row
            for row in service.held
            if row.reason != BEHIND and not failures.excuses(service.service, row.position, row.handler)
        ]
        dead = [row for row in service.dead if not failures.excuses(service.service, row.position, row.handler)]
        counts = (
            (service.pending_count, "pending"),
            (service.staged_count, "staged and not appended"),
            (len(held), "held"),
            (len(dead), "dead"),
        )
        found += [f"{count} {word} in service {service.service!r}" for count, word in counts if count]
    return f"nothing moves any more, and not all is settled: {', '.join(found)}" if found else ""


def is_left(part: ServiceReport, heard: Collection[tuple[str, int]], log: Sequence[RecordedEvent]) -> bool:
    """Return whether a service has something to do, other than what failed, of which the test has `heard`, and what
    waits behind that in its bucket."""
    failed = [position for service, position in heard if service == part.service]
    buckets = {event.position: carried(event) for event in log} if failed else {}
    left = [
        event
        for event in part.pending
        if not any(buckets[position] == buckets[event.position] for position in failed if position <= event.position)
    ]
    return bool(left) or bool(part.staged_count) or (part.pending_count > len(part.pending) and not failed)


def told(report: Report | None, seats: Iterable[Seat], logs: Sequence[Mapping[str, Any]]) -> str:
    """Say who stands where: the report, what was done to services, handlers at work, and the last warnings."""
    lines = ["Who stands where:"]
    if report is not None:
        lines.append(str(report))
    for seat in seats:
        if not seat.condition.well:
            lines.append(f"{seat} {seat.condition}")
        lines += [
            f"{seat}: handler {work.handler.name!r} is at work on {work.event.type} {work.event.id} of "
            f"{work.event.stream}"
            for work in (seat.running.at_work() if seat.running is not None else ())
        ]
    warnings = [line for line in logs if line["level"] in ("warning", "error", "critical")][-LINES:]
    if warnings:
        lines.append("The last warnings:")
    for line in warnings:
        facts = " ".join(f"{name}={value}" for name, value in line.items() if name in _SHOWN)
        lines.append(f"  {line['event']} {facts}")
    return "\n".join(lines)


def handler_at_work() -> str | None:
    """Name the handler that the calling code is part of."""
    context = ATTEMPT.get(None)
    return None if context is None else f"handler {context.handler!r} of service {context.service!r}"


def at_work() -> str | None:
    """Name the handler, or the process, that the calling code is part of; None for the test."""
    owner = OWNER.get()
    return handler_at_work() or (None if owner is None else str(owner))


_SHOWN: Final = ("service", "handler", "stream", "position", "reason", "error", "delay", "pause", "relay")
