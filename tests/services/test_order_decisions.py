"""What an order decides, state by state. No store, no service: an aggregate is its events."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from services.order import Order, OrderRefused, Status
from services.order.events import OrderLine
from tidings import wire_name

PLACED_AT = datetime(2010, 12, 1, 8, 26, tzinfo=UTC)
LINES = (
    OrderLine(sku="85123A", quantity=6, unit_price=Decimal("2.55")),
    OrderLine(sku="71053", quantity=2, unit_price=Decimal("3.39")),
)


def placed() -> Order:
    order: Order = Order.empty("536365")
    order.place(LINES, "17850", "United Kingdom", PLACED_AT)
    return order


def confirmed() -> Order:
    order = placed()
    order.note_reserved()
    order.note_authorised()
    return order


def cancelling() -> Order:
    order = confirmed()
    order.cancel("changed my mind")
    return order


def cancelled() -> Order:
    order = placed()
    order.cancel("changed my mind")
    return order


def dispatched() -> Order:
    order = confirmed()
    order.note_dispatched()
    return order


def said(order: Order) -> list[str]:
    return [wire_name(event) for event in order.recorded]


# ---- placing -------------------------------------------------------------------------


def test_a_placed_order_knows_its_lines_and_its_exact_total() -> None:
    order = placed()
    assert order.status is Status.PLACED
    assert order.lines == LINES
    assert order.total == Decimal("22.08")
    assert said(order) == ["OrderCreated"]


def test_an_order_without_lines_is_refused() -> None:
    with pytest.raises(OrderRefused, match="has no lines"):
        Order.empty("1").place((), None, "France", PLACED_AT)


def test_an_order_is_placed_once() -> None:
    with pytest.raises(OrderRefused, match="placed before"):
        placed().place(LINES, None, "France", PLACED_AT)


@pytest.mark.parametrize("wrong", [{"quantity": 0}, {"quantity": -1}, {"unit_price": "0"}, {"sku": ""}])
def test_a_line_that_sells_nothing_cannot_be_made(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        OrderLine.model_validate({"sku": "1", "quantity": 1, "unit_price": "1", **wrong})


# ---- confirming ----------------------------------------------------------------------


@pytest.mark.parametrize("first", [Order.note_reserved, Order.note_authorised])
def test_half_of_what_is_needed_does_not_confirm(first: Callable[[Order], None]) -> None:
    order = placed()
    first(order)
    assert order.status is Status.PLACED


@pytest.mark.parametrize("notes", [("note_reserved", "note_authorised"), ("note_authorised", "note_reserved")])
def test_stock_and_payment_in_either_order_confirm_it(notes: tuple[str, str]) -> None:
    order = placed()
    for note in notes:
        getattr(order, note)()
    assert order.status is Status.CONFIRMED
    assert said(order)[-1] == "OrderConfirmed"


def test_the_same_note_twice_is_one_note() -> None:
    order = placed()
    order.note_reserved()
    order.note_reserved()
    assert said(order) == ["OrderCreated", "OrderReserved"]


@pytest.mark.parametrize("by", ["inventory", "payment"])
def test_a_failure_of_either_cancels_it_with_the_reason(by: str) -> None:
    order = placed()
    order.note_failed("out of stock", by)
    assert (order.status, order.reason, order.by) == (Status.CANCELLED, "out of stock", by)


@pytest.mark.parametrize("late", ["note_reserved", "note_authorised"])
def test_a_late_note_changes_nothing_in_a_cancelled_order(late: str) -> None:
    order = cancelled()
    before = said(order)
    getattr(order, late)()
    assert said(order) == before


def test_a_second_failure_changes_nothing_in_a_cancelled_order() -> None:
    order = cancelled()
    order.note_failed("declined", "payment")
    assert order.reason == "changed my mind"


# ---- cancelling ----------------------------------------------------------------------


def test_an_order_that_is_not_confirmed_is_cancelled_at_once() -> None:
    order = cancelled()
    assert (order.status, order.by) == (Status.CANCELLED, "customer")


def test_a_confirmed_order_is_cancelled_only_when_shipping_has_stopped_it() -> None:
    order = cancelling()
    assert order.status is Status.CANCELLING
    order.note_stopped()
    assert (order.status, order.reason, order.by) == (Status.CANCELLED, "changed my mind", "customer")


def test_a_request_that_comes_after_the_parcel_is_refused() -> None:
    order = cancelling()
    order.note_dispatched()
    assert order.status is Status.DISPATCHED
    assert said(order)[-2:] == ["OrderCancellationRefused", "OrderDispatched"]
    assert order.reason == "", "a dispatched order has no reason to be cancelled"


@pytest.mark.parametrize("state", [cancelling, cancelled])
def test_cancelling_twice_is_as_good_as_once(state: Callable[[], Order]) -> None:
    order = state()
    before = said(order)
    order.cancel("again", "somebody else")
    assert said(order) == before


def test_cancelling_a_dispatched_order_says_what_to_do_instead() -> None:
    with pytest.raises(OrderRefused, match="with the carrier and cannot be cancelled; ask for a return"):
        dispatched().cancel("too late")


def test_cancelling_what_was_never_placed_is_refused() -> None:
    with pytest.raises(OrderRefused, match="never placed"):
        Order.empty("1").cancel("why not")


def test_a_parcel_that_left_twice_left_once() -> None:
    order = dispatched()
    before = said(order)
    order.note_dispatched()
    assert said(order) == before


@pytest.mark.parametrize(
    ("state", "note"),
    [
        (placed, "note_dispatched"),
        (cancelled, "note_dispatched"),
        (placed, "note_stopped"),
        (confirmed, "note_stopped"),
        (dispatched, "note_stopped"),
    ],
)
def test_a_note_that_contradicts_the_order_is_never_swallowed(state: Callable[[], Order], note: str) -> None:
    order = state()
    before = said(order)
    with pytest.raises(OrderRefused, match="two services disagree"):
        getattr(order, note)()
    assert said(order) == before


# ---- all at once ---------------------------------------------------------------------

NOTES: list[Callable[[Order], None]] = [
    Order.note_reserved,
    Order.note_authorised,
    Order.note_stopped,
    Order.note_dispatched,
    lambda order: order.note_failed("out of stock", "inventory"),
    lambda order: order.note_failed("declined", "payment"),
    lambda order: order.cancel("changed my mind"),
]


@given(st.lists(st.sampled_from(NOTES), max_size=12))
def test_whatever_an_order_is_told_it_never_is_both_dispatched_and_cancelled(
    notes: list[Callable[[Order], None]],
) -> None:
    order = placed()
    for note in notes:
        before = order.status
        try:
            note(order)
        except OrderRefused:
            assert order.status is before
        assert before is order.status or not before.final, "a final state was left"
    assert not {"OrderCancelled", "OrderDispatched"} <= set(said(order))
    assert said(order).count("OrderConfirmed") <= 1


@given(st.lists(st.sampled_from(NOTES), max_size=12))
def test_an_order_read_back_from_its_events_is_the_same(notes: list[Callable[[Order], None]]) -> None:
    order = placed()
    for note in notes:
        try:
            note(order)
        except OrderRefused:
            continue
    again: Order = Order.empty(order.id)
    for event in order.recorded:
        again.apply(type(event).model_validate_json(event.model_dump_json()))
    assert {**vars(again), "__tidings__": None} == {**vars(order), "__tidings__": None}
