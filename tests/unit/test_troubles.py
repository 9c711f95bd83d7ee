"""What a service remembers of events that crashed it, or that an operator wants dead: until each handler is done."""

from __future__ import annotations

import pytest

from tidings.delivery.work import Item, Troubles
from tidings.modelling.handlers import Handler, Retry
from tidings.modelling.roster import BEHIND, Span
from tidings.stores import RecordedEvent

EVENT = RecordedEvent(7, "orders", 0, "Placed", b"{}", b"", True, bytes(16), 0)
PAST = Span(3, "late", BEHIND, -1, -1)


def item(name: str, *, more: bool = False, late: bool = False) -> Item:
    handler = Handler(name, lambda: None, (), (), Retry(), 1.0, threaded=True)
    return Item(EVENT, 3, handler, None, more=more, late=PAST if late else None)


@pytest.fixture
def troubles() -> Troubles:
    made = Troubles()
    made.skip([7])
    return made


@pytest.mark.parametrize("first", [item("late", late=True), item("first", more=True)], ids=["late", "first"])
def test_who_is_done_with_it_spares_nobody_else(troubles: Troubles, first: Item) -> None:
    assert troubles.crash(first) is not None
    troubles.forget([first])
    assert troubles.crash(first) is None, "it is retried from the dead letters"
    last = item("last")
    assert troubles.crash(last) is not None
    troubles.forget([last])
    assert troubles.crash(last) is None


def test_who_is_done_with_it_may_be_condemned_again(troubles: Troubles) -> None:
    late = item("late", late=True)
    troubles.forget([late])
    troubles.skip([7])
    assert troubles.crash(late) is not None
