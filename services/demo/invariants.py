"""The invariants that hold when everything is settled: pure checks of numbers from independent sources.

The log has the events, each service's database the effects, and the gateway's ledger what really happened to the money.
A number from a single source would prove nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal

from services.demo.tally import Tally

__all__ = ["Check", "Numbers", "checks"]


@dataclass(frozen=True, slots=True)
class Numbers:
    """Numbers from the services' databases and the gateway's ledger, in pieces and pounds."""

    on_hand: int
    reserved: int
    shipped: int
    open: Decimal
    """Payments that are authorised, and neither captured nor voided."""
    ledger: dict[str, Decimal]
    """Pounds per operation in the gateway's ledger."""
    operations: int
    """Entries in the gateway's ledger."""
    calls: int
    """Calls to the gateway that caused them."""
    shipments: dict[str, int]
    """Number of parcels by state."""
    sales: Decimal
    """Pounds over all countries."""
    dead: int
    """Number of dead letters in all services."""
    settled: bool
    """Whether every event is settled in every service."""


@dataclass(frozen=True, slots=True)
class Check:
    """One invariant."""

    what: str
    numbers: str
    holds: bool


def checks(log: Tally, now: Numbers) -> Iterator[Check]:
    """Return every invariant, whether it holds or not."""
    yield _goods(log, now)
    yield _money(log, now)
    captured, refunded = log.pounds("PaymentCaptured"), log.pounds("PaymentRefunded")
    yield Check("refunded <= captured", f"{refunded:,} <= {captured:,}", refunded <= captured)
    yield _ledger(log, now)
    yield _both(log, now)
    yield _final(log)
    numbers = f"{now.sales:,} = {captured:,} - {refunded:,}"
    yield Check("sales of all countries = captured - refunded", numbers, now.sales == captured - refunded)
    yield Check(
        "every event settled in every service",
        f"{log.events:,} events, {now.dead} given up",
        now.settled and not now.dead,
    )


def _goods(log: Tally, now: Numbers) -> Check:
    there, came = now.on_hand + now.reserved + now.shipped, log.received + log.returned
    numbers = f"{now.on_hand:,} + {now.reserved:,} + {now.shipped:,} = {log.received:,} + {log.returned:,}"
    return Check("on hand + reserved + shipped = initial + returned", numbers, there == came)


def _money(log: Tally, now: Numbers) -> Check:
    authorised = now.ledger.get("authorise", Decimal())
    captured, voided = log.pounds("PaymentCaptured"), log.pounds("PaymentVoided")
    numbers = f"{authorised:,} = {captured:,} + {voided:,} + {now.open:,}"
    return Check("authorised = captured + voided + open", numbers, authorised == captured + voided + now.open)


def _ledger(log: Tally, now: Numbers) -> Check:
    agreed = all(
        now.ledger.get(operation, Decimal()) == log.pounds(kind)
        for operation, kind in {
            "authorise": "PaymentAuthorised",
            "decline": "PaymentDeclined",
            "capture": "PaymentCaptured",
            "void": "PaymentVoided",
            "refund": "PaymentRefunded",
        }.items()
    )
    numbers = f"{now.operations:,} effects of {now.calls:,} calls, {log.payments.total():,} events"
    holds = agreed and now.operations == log.payments.total()
    return Check("each payment took effect at the gateway once", numbers, holds)


def _both(log: Tally, now: Numbers) -> Check:
    dispatched = {order_id for order_id, state in log.orders.items() if state == "dispatched"}
    agreed = dispatched == log.parcels and len(dispatched) == now.shipments.get("dispatched", 0)
    numbers = f"{len(log.contradictory)} orders; {len(dispatched)} dispatched and {len(log.parcels)} parcels"
    return Check("no order both dispatched and cancelled", numbers, agreed and not log.contradictory)


def _final(log: Tally) -> Check:
    done = log.count("dispatched") + log.count("cancelled")
    numbers = f"{log.count('dispatched')} + {log.count('cancelled')} = {len(log.orders)}"
    return Check("every order dispatched or cancelled", numbers, done == len(log.orders))
