"""What a service remembers of events that crashed it, or that an operator wants dead: until each handler is done."""

from __future__ import annotations

import pytest

from tidings.delivery.failure_memory import FailureMemory
from tidings.delivery.inflight import InFlight, Role
from tidings.modelling.handlers import Handler, Retry
from tidings.modelling.roster import BEHIND, Span
from tidings.stores import RecordedEvent

EVENT = RecordedEvent(7, "orders", 0, "Placed", b"{}", b"", True, bytes(16), 0)
PAST = Span(3, "late", BEHIND, -1, -1)


def item(name: str, *, more: bool = False, late: bool = False) -> InFlight:
    handler = Handler(name, lambda: None, (), (), Retry(), 1.0, threaded=True)
    role = Role.LATE if late else Role.SHARED if more else Role.PLAIN
    return InFlight(EVENT, 3, handler, role, PAST if late else None)


@pytest.fixture
def memory() -> FailureMemory:
    made = FailureMemory()
    made.skip([7])
    return made


@pytest.mark.parametrize("first", [item("late", late=True), item("first", more=True)], ids=["late", "first"])
def test_who_is_done_with_it_spares_nobody_else(memory: FailureMemory, first: InFlight) -> None:
    assert memory.crash(first) is not None
    memory.forget([first])
    assert memory.crash(first) is None, "it is retried from the dead letters"
    last = item("last")
    assert memory.crash(last) is not None
    memory.forget([last])
    assert memory.crash(last) is None


def test_who_is_done_with_it_may_be_condemned_again(memory: FailureMemory) -> None:
    late = item("late", late=True)
    memory.forget([late])
    memory.skip([7])
    assert memory.crash(late) is not None
