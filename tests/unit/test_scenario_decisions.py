"""Given, when, then for aggregates: complete comparison, and what a test reads when something differs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, cast

import pytest
from pydantic import BaseModel

from tidings import Aggregate, Event, evolves
from tidings.errors import ConfigurationError, SchemaError
from tidings.stores import EventData
from tidings.testing import given

pytest_plugins = ["pytester"]


class Line(BaseModel):
    sku: str
    pieces: int


class Opened(Event, key="basket"):
    basket: str
    lines: tuple[Line, ...] = ()


class Added(Event, key="basket"):
    basket: str
    line: Line


class Paid(Event, key="basket"):
    basket: str
    note: Any = ""


class Refused(Exception):
    pass


class Basket(Aggregate, category="basket"):
    def __init__(self) -> None:
        self.pieces = 0

    def open(self) -> None:
        self.record(Opened(basket=self.id))

    def add(self, sku: str, *, pieces: int = 1) -> int:
        if pieces < 1:
            raise Refused(f"{pieces} of {sku}")
        self.record(Added(basket=self.id, line=Line(sku=sku, pieces=pieces)))
        return self.pieces

    def pay(self, note: object = "") -> None:
        self.record(Paid(basket=self.id, note=note))

    def version_now(self) -> int:
        return self.version

    def look(self) -> None:
        pass

    @evolves(Opened)
    def _opened(self, event: Opened) -> None:
        self.pieces = sum(line.pieces for line in event.lines)

    @evolves(Added)
    def _added(self, event: Added) -> None:
        self.pieces += event.line.pieces

    @evolves(Paid)
    def _paid(self, event: Paid) -> None: ...


class Large(Basket, category="large"):
    def wrap(self) -> None:
        self.record(Paid(basket=self.id, note="wrapped"))


def empty_it(basket: Basket) -> None:
    basket.record(Paid(basket=basket.id, note="emptied"))


OPENED = Opened(basket="7", lines=(Line(sku="cup", pieces=2),))


def cup(pieces: int = 1) -> Added:
    return Added(basket="7", line=Line(sku="cup", pieces=pieces))


def text_of(check: Callable[[], object]) -> str:
    with pytest.raises(AssertionError) as failed:
        check()
    return str(failed.value)


def test_what_is_recorded_is_compared_and_the_given_version_has_advanced() -> None:
    done = given(OPENED, cup()).when(Basket.add, "cup", pieces=3).then(cup(3)).returns(6)
    assert (done.aggregate.pieces, done.aggregate.id, done.aggregate.version) == (6, "7", 1)
    given(OPENED, cup()).when(Basket.version_now).nothing().returns(1)


def test_several_decisions_follow_each_other() -> None:
    given(OPENED).when(Basket.add, "cup").when(Basket.pay).then(cup(), Paid(basket="7"))


def test_a_stream_begins_with_nothing_under_the_id_that_is_named() -> None:
    given(id="9").when(Basket.open).then(Opened(basket="9"))
    given().when(Basket.open).then(Opened(basket="1"))


def test_a_refusal_is_compared_with_class_and_text() -> None:
    done = given(OPENED).when(Basket.add, "cup", pieces=0).raises(Refused, match="^0 of cup$")
    assert isinstance(done.error, Refused)
    assert text_of(lambda: given(OPENED).when(Basket.add, "cup", pieces=0).raises(Refused, match="jar")) == (
        "Refused says '0 of cup', and not 'jar'"
    )
    assert text_of(lambda: given(OPENED).when(Basket.add, "cup").raises(Refused)) == (
        "Basket.add raised nothing, and recorded Added(basket='7', line=Line(sku='cup', pieces=1)); "
        "Refused was expected"
    )


def test_an_exception_that_nobody_expects_passes_through_with_its_own_traceback() -> None:
    checks: tuple[Callable[[], object], ...] = (
        lambda: given(OPENED).when(Basket.add, "cup", pieces=0).then(cup()),
        lambda: given(OPENED).when(Basket.add, "cup", pieces=0).nothing(),
        lambda: given(OPENED).when(Basket.add, "cup", pieces=0).returns(1),
        lambda: given(OPENED).when(Basket.add, "cup", pieces=0).events,
        lambda: given(OPENED).when(Basket.add, "cup", pieces=0).result,
        lambda: given(OPENED).when(Basket.add, "cup", pieces=0).aggregate,
        lambda: given(OPENED).when(Basket.add, "cup", pieces=0).when(Basket.pay),
        lambda: given(OPENED).when(Basket.add, "cup", pieces=0).raises(ValueError),
    )
    for check in checks:
        with pytest.raises(Refused) as raised:
            check()
        assert raised.traceback[-1].name == "add"


def test_each_difference_is_named_by_event_and_field() -> None:
    wanted = (Opened(basket="7"), cup(2), Paid(basket="7", note={"by": "card", "of": [1, 2]}))

    def check() -> None:
        given(OPENED).when(Basket.add, "cup").when(Basket.pay, {"by": "cash", "of": [1]}).when(Basket.add, "cup").then(
            *wanted
        )

    assert text_of(check) == (
        "Basket.add recorded 3 events, but not those expected:\n"
        "  1. missing: Opened(basket='7', lines=())\n"
        "  2. Added differs:\n"
        "     line.pieces: expected 2, was 1\n"
        "  3. Paid differs:\n"
        "     note['by']: expected 'card', was 'cash'\n"
        "     note['of'][1]: expected 2, was nothing\n"
        "  4. not expected: Added(basket='7', line=Line(sku='cup', pieces=1))"
    )


def test_nothing_and_too_little_are_differences() -> None:
    assert text_of(lambda: given(OPENED).when(Basket.pay).nothing()) == (
        "Basket.pay recorded 1 event, and no event was expected:\n  1. not expected: Paid(basket='7', note='')"
    )
    assert text_of(lambda: given(OPENED).when(Basket.look).then(cup(), cup())).startswith(
        "Basket.look recorded no event, and 2 events were expected:\n  1. missing: Added("
    )


def test_what_is_equal_stays_beside_what_differs() -> None:
    def check() -> None:
        given(OPENED).when(Basket.add, "cup").when(Basket.add, "cup", pieces=2).then(cup(2))

    assert text_of(check) == (
        "Basket.add recorded 2 events, and 1 event was expected:\n"
        "  1. not expected: Added(basket='7', line=Line(sku='cup', pieces=1))\n"
        "  2. as expected: Added(basket='7', line=Line(sku='cup', pieces=2))"
    )


def test_a_long_value_is_shown_around_its_first_difference() -> None:
    text = text_of(lambda: given().when(Basket.pay, "a" * 500 + "b").then(Paid(basket="1", note="a" * 500 + "c")))
    assert re.search(r"note: expected \.\.\.a+c', was \.\.\.a+b'$", text)
    assert len(text) < 300


def test_equal_values_of_other_types_are_named_with_their_types() -> None:
    text = text_of(lambda: given().when(Basket.pay, "1").then(Paid(basket="1", note=1)))
    assert "note: expected 1 (int), was '1' (str)" in text


def test_an_event_of_another_class_with_the_same_name_differs() -> None:
    class Other(Event, name="Paid", key="basket"):
        basket: str
        note: str = ""

    assert "Other, was " in text_of(lambda: given().when(Basket.pay).then(Other(basket="1")))


def test_an_event_that_could_not_be_appended_fails_as_appending_it_would() -> None:
    with pytest.raises(SchemaError, match="would not be read back"):
        given().when(Basket.pay, {1})


def test_given_events_are_read_as_from_a_log() -> None:
    given(EventData("Added", b'{"basket":"7","line":{"sku":"cup","pieces":4},"new":1}')).when(Basket.look).nothing()
    with pytest.raises(SchemaError, match=r"does not fit Added: line: Field required"):
        given(EventData("Added", b'{"basket":"7"}')).when(Basket.look)


def test_a_subclass_is_found_by_its_own_methods_and_named_for_inherited_ones() -> None:
    assert type(given().when(Large.wrap).then(Paid(basket="1", note="wrapped")).aggregate) is Large
    assert type(given().when(Large.open).then(Opened(basket="1")).aggregate) is Basket
    assert type(given(aggregate=Large).when(Large.open).then(Opened(basket="1")).aggregate) is Large


def test_a_function_of_the_aggregate_is_a_decision_too() -> None:
    given(OPENED).when(empty_it).then(Paid(basket="7", note="emptied"))
    given(OPENED, aggregate=Basket).when(lambda basket: basket.pay()).then(Paid(basket="7"))


@pytest.mark.parametrize(
    ("check", "says"),
    [
        (lambda: given(OPENED).when(lambda basket: basket.pay()), "belongs to no aggregate. Name the class"),
        (lambda: given(cast("Any", Opened)), "Opened is a class: give an event"),
        (lambda: given(cast("Any", "order-1")), "'order-1' is no event"),
        (lambda: given(EventData("Strange", b"{}")).when(Basket.look), "has no @evolves method"),
    ],
)
def test_a_mistake_in_a_test_is_named(check: Callable[[], object], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        check()


def test_a_test_that_compares_nothing_fails(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        from tests.unit.test_scenario_decisions import Basket, OPENED, Refused
        from tidings.testing import given

        def test_forgotten():
            given(OPENED).when(Basket.pay)

        def test_forgotten_refusal():
            given(OPENED).when(Basket.add, "cup", pieces=0)

        def test_compared():
            given(OPENED).when(Basket.add, "cup", pieces=0).raises(Refused)

        def test_looked_at():
            assert given(OPENED).when(Basket.add, "cup", pieces=0).error
            assert given(OPENED).when(Basket.pay).events
            assert given(OPENED).when(Basket.pay).aggregate.pieces == 2
            assert given(OPENED).when(Basket.pay).result is None
            given(OPENED).when(Basket.pay).returns(None)
        """
    )
    done = pytester.runpytest("-p", "no:cacheprovider", "-p", "no:asyncio")
    done.assert_outcomes(failed=2, passed=2)
    done.stdout.fnmatch_lines(["nothing was compared with what Basket.pay recorded: add .then(...)*"])
    done.stdout.fnmatch_lines(["nothing was compared with what Basket.add recorded: add .then(...)*"])
