"""What an event in flight leaves behind: emitted events, a held event, or a dead letter. `fail` decides whether a
handler that failed is tried again, its event held, or given up. It moves nothing, and does no I/O but to log a failure.
"""

from __future__ import annotations

import time

import structlog

from tidings._support.tracebacks import Kind, Tracebacks
from tidings.database.dead_letters import Letter
from tidings.database.held_events import HeldEvent
from tidings.database.staged_events import StagedEvent
from tidings.delivery.failure import Failure
from tidings.delivery.inflight import InFlight, Role
from tidings.modelling.context import Context
from tidings.modelling.fingerprints import fingerprint

__all__ = ["fail", "hold", "succeed"]

log = structlog.get_logger("tidings.delivery")

BEHIND: str = "waits behind an earlier event of its partition key"


def succeed(item: InFlight, context: Context) -> None:
    """Keep what the handler emitted."""
    aliases = context.aliases
    item.leaves = [
        StagedEvent(item.bucket, item.event.position, stream, event, aliases.get(event.id, ()))
        for stream, event in context.emissions
    ]


def fail(
    item: InFlight, failure: Failure, tried: int, service: str, tracebacks: Tracebacks | None = None
) -> float | None:
    """Judge a failed attempt, the `tried`-th since the event was read. Return the seconds until the next one in its
    lane, or None when it now leaves a held event or a dead letter."""
    event, held, retry = item.event, item.held, item.handler.retry
    # What only waited behind another event has its quick retries still before it.
    untried = held is None or not held.attempts
    attempts, tries = (tried, 0) if held is None or untried else (held.attempts + tried, held.tries + 1)
    facts = {
        "service": service,
        "handler": item.handler.name,
        "event_id": str(event.id),
        "stream": event.stream,
        "position": event.position,
        "attempt": attempts,
        "reason": failure.reason,
    }
    if failure.place:
        facts |= {"error": failure.error, "place": failure.place}
    kind = Kind(item.handler.name, failure.error, failure.place)
    if tracebacks is not None and failure.detail and (more := tracebacks.due(kind)) is not None:
        # The text, not the exception: what renders that as JSON follows its causes, which may go in circles.
        facts |= {"exception": failure.detail, "failed_like_this_since": more}
    again = not failure.permanent and not failure.deploy_needed
    if again and item.role is Role.TRIAL and held is not None and attempts < retry.attempts:
        _postpone(item, attempts, held.tries, 0.0, failure.reason, failure.detail)  # the breaker makes the pauses
        return None
    if again and untried and attempts < retry.attempts:
        pause = retry.wait(attempts)
        log.warning("event.retrying", pause=round(pause, 3), **facts)
        return pause
    if retry.hold is not None and (failure.deploy_needed or (again and tries < retry.hold.attempts)):
        delay = retry.hold.wait(tries + 1)
        log.warning("event.held", delay=round(delay, 3), **facts)
        _postpone(item, attempts, tries, delay, failure.reason, failure.detail)
        return None
    holds_key = retry.hold_key and not failure.skipped
    if failure.skipped:
        log.warning("event.skipped", **facts)
    else:
        log.error("event.dead", holds_key=holds_key, **facts)
    item.leaves = Letter.of_event(
        event,
        item.bucket,
        key=item.key,
        holds_key=holds_key,
        handler=item.handler.name,
        line=item.handler.line_of(event.type),
        attempts=attempts,
        reason=failure.reason,
        detail=failure.detail,
        replayed=item.replayed,
    )
    return None


def hold(item: InFlight, reason: str = BEHIND, tried: int = 0) -> None:
    """Hold it without running it, after `tried` attempts; it is due as soon as nothing is in its way."""
    _postpone(item, tried, 0, 0.0, reason, None)


def _postpone(item: InFlight, attempts: int, tries: int, delay: float, reason: str, detail: str | None) -> None:
    now, held = time.time(), item.held
    item.leaves = HeldEvent(
        item.event,
        item.bucket,
        item.key,
        item.handler.name,
        attempts,
        tries,
        now + delay,
        reason,
        detail,
        item.replayed,
        since=now if held is None or held.since is None else held.since,
        code=fingerprint(item.handler.function, item.handler.events),
        handlers_line=item.handler.line_of(item.event.type),
    )
