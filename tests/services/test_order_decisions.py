"""What an order decides, state by state. No store, no service: an aggregate is its events."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from pydantic import ValidationError

from services.order import Order, OrderRefused, Status
from services.order.events import (
    OrderAuthorised,
    OrderCancellationRefused,
    OrderCancellationRequested,
    OrderCancelled,
    OrderConfirmed,
    OrderCreated,
    OrderDispatched,
    OrderLine,
    OrderReserved,
)
from tidings import Event
from tidings.testing import given
from tidings.testing.machines import aggregate_machine
from tidings.testing.strategies import events

ID = "536365"
PLACED_AT = datetime(2010, 12, 1, 8, 26, tzinfo=UTC)
LINES = (
    OrderLine(sku="85123A", quantity=6, unit_price=Decimal("2.55")),
    OrderLine(sku="71053", quantity=2, unit_price=Decimal("3.39")),
)

CREATED = OrderCreated(order_id=ID, customer_id="17850", country="United Kingdom", placed_at=PLACED_AT, lines=LINES)
RESERVED, AUTHORISED = OrderReserved(order_id=ID), OrderAuthorised(order_id=ID)
CONFIRMED, SENT = OrderConfirmed(order_id=ID), OrderDispatched(order_id=ID)
REQUESTED = OrderCancellationRequested(order_id=ID, reason="changed my mind", by="customer")
CANCELLED = OrderCancelled(order_id=ID, reason="changed my mind", by="customer")

PLACED: tuple[Event, ...] = (CREATED,)
READY = (*PLACED, RESERVED, AUTHORISED, CONFIRMED)
CANCELLING = (*READY, REQUESTED)
GIVEN_UP = (*PLACED, CANCELLED)
DISPATCHED = (*READY, SENT)

Story = tuple[Event, ...]


# ---- placing -------------------------------------------------------------------------


def test_a_placed_order_knows_its_lines_and_its_exact_total() -> None:
    order = given(id=ID).when(Order.place, LINES, "17850", "United Kingdom", PLACED_AT).then(CREATED).aggregate
    assert order.status is Status.PLACED
    assert order.lines == LINES
    assert order.total == Decimal("22.08")


def test_an_order_without_lines_is_refused() -> None:
    given().when(Order.place, (), None, "France", PLACED_AT).raises(OrderRefused, match="has no lines")


def test_an_order_is_placed_once() -> None:
    given(CREATED).when(Order.place, LINES, None, "France", PLACED_AT).raises(OrderRefused, match="placed before")


@pytest.mark.parametrize("wrong", [{"quantity": 0}, {"quantity": -1}, {"unit_price": "0"}, {"sku": ""}])
def test_a_line_that_sells_nothing_cannot_be_made(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        OrderLine.model_validate({"sku": "1", "quantity": 1, "unit_price": "1", **wrong})


# ---- confirming ----------------------------------------------------------------------


def test_half_of_what_is_needed_does_not_confirm() -> None:
    given(*PLACED).when(Order.note_reserved).then(RESERVED)
    given(*PLACED).when(Order.note_authorised).then(AUTHORISED)


def test_stock_and_payment_in_either_order_confirm_it() -> None:
    given(*PLACED, RESERVED).when(Order.note_authorised).then(AUTHORISED, CONFIRMED)
    given(*PLACED, AUTHORISED).when(Order.note_reserved).then(RESERVED, CONFIRMED)


def test_the_same_note_twice_is_one_note() -> None:
    given(*PLACED, RESERVED).when(Order.note_reserved).nothing()
    given(*PLACED, AUTHORISED).when(Order.note_authorised).nothing()


@pytest.mark.parametrize("by", ["inventory", "payment"])
def test_a_failure_of_either_cancels_it_with_the_reason(by: str) -> None:
    cancelled = OrderCancelled(order_id=ID, reason="out of stock", by=by)
    given(*PLACED).when(Order.note_failed, "out of stock", by).then(cancelled)


def test_a_late_note_changes_nothing_in_a_cancelled_order() -> None:
    given(*GIVEN_UP).when(Order.note_reserved).nothing()
    given(*GIVEN_UP).when(Order.note_authorised).nothing()
    given(*GIVEN_UP).when(Order.note_failed, "declined", "payment").nothing()


# ---- cancelling ----------------------------------------------------------------------


def test_an_order_that_is_not_confirmed_is_cancelled_at_once() -> None:
    given(*PLACED).when(Order.cancel, "changed my mind").then(CANCELLED)


def test_a_confirmed_order_is_cancelled_only_when_shipping_has_stopped_it() -> None:
    given(*READY).when(Order.cancel, "changed my mind").then(REQUESTED)
    given(*CANCELLING).when(Order.note_stopped).then(CANCELLED)


def test_a_request_that_comes_after_the_parcel_is_refused() -> None:
    refusal = OrderCancellationRefused(
        order_id=ID, reason="the parcel was handed to the carrier before the request arrived"
    )
    order = given(*CANCELLING).when(Order.note_dispatched).then(refusal, SENT).aggregate
    assert order.reason == "", "a dispatched order has no reason to be cancelled"


@pytest.mark.parametrize("story", [CANCELLING, GIVEN_UP])
def test_cancelling_twice_is_as_good_as_once(story: Story) -> None:
    given(*story).when(Order.cancel, "again", "somebody else").nothing()


def test_cancelling_a_dispatched_order_says_what_to_do_instead() -> None:
    says = "with the carrier and cannot be cancelled; ask for a return"
    given(*DISPATCHED).when(Order.cancel, "too late").raises(OrderRefused, match=says)


def test_cancelling_what_was_never_placed_is_refused() -> None:
    given().when(Order.cancel, "why not").raises(OrderRefused, match="never placed")


def test_a_parcel_that_left_twice_left_once() -> None:
    given(*DISPATCHED).when(Order.note_dispatched).nothing()


@pytest.mark.parametrize(
    ("story", "note"),
    [
        (PLACED, Order.note_dispatched),
        (GIVEN_UP, Order.note_dispatched),
        (PLACED, Order.note_stopped),
        (READY, Order.note_stopped),
        (DISPATCHED, Order.note_stopped),
    ],
)
def test_a_note_that_contradicts_the_order_is_never_swallowed(story: Story, note: Callable[[Order], None]) -> None:
    given(*story).when(note).raises(OrderRefused, match="two services disagree")


# ---- all at once ---------------------------------------------------------------------


class Model:
    """The drawing in `services/order/order.py`, without events."""

    def __init__(self) -> None:
        self.status = Status.NEW
        self._notes = set[str]()

    def place(self, **_: Any) -> None:
        if self.status is not Status.NEW:
            raise OrderRefused
        self.status = Status.PLACED

    def note_reserved(self) -> None:
        self._note("reserved")

    def note_authorised(self) -> None:
        self._note("authorised")

    def _note(self, what: str) -> None:
        self._notes.add(what)
        if self.status is Status.PLACED and len(self._notes) == 2:
            self.status = Status.CONFIRMED
        if self.status is Status.NEW:
            self._notes.clear()

    def note_failed(self, **_: str) -> None:
        self._move({Status.PLACED: Status.CANCELLED}, Status.CANCELLED)

    def note_stopped(self) -> None:
        self._move({Status.CANCELLING: Status.CANCELLED}, Status.CANCELLED)

    def note_dispatched(self) -> None:
        self._move({Status.CONFIRMED: Status.DISPATCHED, Status.CANCELLING: Status.DISPATCHED}, Status.DISPATCHED)

    def cancel(self, **_: str) -> None:
        changes = {Status.PLACED: Status.CANCELLED, Status.CONFIRMED: Status.CANCELLING}
        self._move(changes, Status.CANCELLED, Status.CANCELLING)

    def _move(self, changes: dict[Status, Status], *at_rest: Status) -> None:
        if self.status in changes:
            self.status = changes[self.status]
        elif self.status not in at_rest:
            raise OrderRefused


PLACE = {
    "lines": events(OrderCreated).map(lambda event: event.lines).filter(bool),
    "customer_id": st.none() | st.just("17850"),
    "country": st.just("France"),
    "placed_at": st.just(PLACED_AT),
}
WHY = {"reason": st.sampled_from(["out of stock", "declined"]), "by": st.sampled_from(["inventory", "payment"])}

TestAnyStory = aggregate_machine(
    Order,
    Model,
    {
        Order.place: PLACE,
        Order.note_reserved: {},
        Order.note_authorised: {},
        Order.note_failed: WHY,
        Order.note_stopped: {},
        Order.note_dispatched: {},
        Order.cancel: WHY,
    },
).TestCase
TestAnyStory.settings = settings(max_examples=60, stateful_step_count=14, deadline=None)
