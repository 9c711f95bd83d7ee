"""What a handler answers has the same identity at every attempt."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidings.errors import AttemptEnded, ConfigurationError, EventTooLarge, InvalidStreamName, SchemaError
from tidings.modelling.codec import Cause
from tidings.modelling.context import Context, name_of
from tidings.modelling.events import Event
from tidings.protocol.identity import digest
from tidings.stores import APPEND_LIMIT, RecordedEvent

LOG = UUID(int=7)


class Reserved(Event):
    sku: str


def context(
    position: int = 9,
    *,
    service: str = "stock",
    handler: str = "reserve",
    log: UUID = LOG,
    metadata: dict[str, Any] | None = None,
    attempt: int = 1,
    was: tuple[str, ...] = (),
) -> Context:
    event = RecordedEvent(position, "order-1", 2, "OrderCreated", b"{}", b"", True, UUID(int=1).bytes, 0)
    return Context(service, handler, log, event, metadata or {}, attempt, was=was)


def test_ids_of_emitted_events_are_the_same_at_every_attempt_and_differ_by_order() -> None:
    ids = [
        [context.emit("s", Reserved(sku="a")), context.emit("s", Reserved(sku="a"))]
        for context in (context(), context(attempt=2))
    ]
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 2


class Told(Event):
    who: str


CALLS: list[tuple[str, Event]] = [
    ("a", Reserved(sku="1")),
    ("a", Told(who="x")),
    ("b", Reserved(sku="2")),
    ("ab", Told(who="y")),
    ("a", Reserved(sku="1")),
]


def emitted(one: Context) -> set[tuple[str, str, UUID]]:
    return {(stream, event.type, event.id) for stream, event in one.emissions}


@given(st.permutations(CALLS), st.lists(st.sampled_from(CALLS), max_size=3))
def test_ids_of_emitted_events_do_not_depend_on_the_order_of_calls_or_on_what_else_is_emitted(
    calls: list[tuple[str, Event]], more: list[tuple[str, Event]]
) -> None:
    one, two, three = context(), context(), context()
    for each, order in ((one, CALLS), (two, calls), (three, [*more, *calls])):
        for stream, event in order:
            each.emit(stream, event)
    assert emitted(one) == emitted(two) <= emitted(three)
    assert len(emitted(three)) == len(calls) + len(more)


def test_ids_are_the_same_whatever_the_hash_seed_of_the_process() -> None:
    code = (
        "from tests.unit.test_context import Told, context\n"
        "one = context()\n"
        "for who in {'anna', 'bert', 'carl', 'dora'}: one.emit('told-' + who, Told(who=who))\n"
        "print(*sorted(f'{stream} {event.id}' for stream, event in one.emissions))"
    )
    said = {
        subprocess.check_output([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, text=True)
        for seed in ("1", "2", "3")
    }
    assert len(said) == 1


def test_an_emit_that_was_refused_counts_for_nothing() -> None:
    one, two = context(), context()
    with pytest.raises(EventTooLarge):
        one.emit("s", Reserved(sku="a" * APPEND_LIMIT))
    assert one.emit("s", Reserved(sku="a")) == two.emit("s", Reserved(sku="a"))


def test_a_renamed_handler_keeps_the_ids_of_its_oldest_name_and_knows_those_of_the_others() -> None:
    old, middle, new = context(handler="old"), context(handler="middle"), context(handler="new", was=("old", "middle"))
    ids = [one.emit("s", Reserved(sku="a")) for one in (old, middle, new)]
    assert ids[2] == ids[0]
    assert new.aliases[ids[2]] == (ids[1], context(handler="new").emit("s", Reserved(sku="a")))
    assert new.idempotency_key("x") == old.idempotency_key("x")
    assert json.loads(new.emissions[0].event.metadata)["tidingsHandler"] == "stock.new"
    assert not old.aliases


@given(st.lists(st.text(), max_size=4), st.lists(st.text(), max_size=4))
def test_no_two_lists_of_parts_have_the_same_digest(one: list[str], two: list[str]) -> None:
    assert (digest(*one) == digest(*two)) == (one == two)


def test_a_secret_changes_every_digest() -> None:
    assert len({digest("a"), digest("a", secret=b"1"), digest("a", secret=b"2")}) == 3


def decide() -> None: ...


class Bank:
    def deposit(self) -> None: ...

    def __call__(self) -> None: ...


@pytest.mark.parametrize(
    ("decision", "name"),
    [(decide, "decide"), (Bank.deposit, "deposit"), (Bank().deposit, "deposit"), (partial(decide), "decide")],
)
def test_a_decision_is_known_by_the_name_of_its_function(decision: Callable[..., None], name: str) -> None:
    assert name_of(decision) == name


def test_a_decision_without_a_name_is_known_by_its_class() -> None:
    assert name_of(Bank()) == "Bank"


def test_identities_differ_by_service_handler_log_and_position() -> None:
    contexts = [context(), context(10), context(service="b"), context(handler="b"), context(log=UUID(int=8))]
    assert len({one.emit("s", Reserved(sku="a")) for one in contexts}) == len(contexts)
    assert len({one.idempotency_key() for one in contexts}) == len(contexts)


def test_an_idempotency_key_depends_on_its_suffix_not_on_what_was_emitted() -> None:
    one, two = context(), context(attempt=3)
    two.emit("s", Reserved(sku="a"))
    assert one.idempotency_key() == two.idempotency_key()
    assert one.idempotency_key("a") != one.idempotency_key()
    assert UUID(one.idempotency_key())


def test_identities_never_change_between_releases() -> None:
    """A newer release must recognise a staged event of an older one."""
    assert str(context().emit("s", Reserved(sku="a"))) == "a1af7eea-8c68-5043-8375-2ea838691df1"
    assert context().idempotency_key("mail") == "8c12e003-0baa-5520-af28-fbb9f6c88e3f"


def test_emissions_carry_correlation_cause_trace_and_handler() -> None:
    one = context(metadata={"$correlationId": "c-1", "traceparent": "trace", "actor": "x"})
    one.emit("stock-1", Reserved(sku="a"), metadata={"actor": "y"})
    [(stream, event)] = one.emissions
    assert stream == "stock-1"
    assert json.loads(event.metadata) == {
        "$correlationId": "c-1",
        "$causationId": str(UUID(int=1)),
        "tidingsHandler": "stock.reserve",
        "traceparent": "trace",
        "schemaVersion": 1,
        "actor": "y",
    }


@pytest.mark.parametrize("metadata", [{}, {"$correlationId": 7, "traceparent": 8}, {"$correlationId": ""}], ids=str)
def test_without_usable_metadata_the_event_begins_the_correlation(metadata: dict[str, Any]) -> None:
    one = context(metadata=metadata)
    assert one.correlation_id == str(UUID(int=1))
    assert one.cause == Cause(UUID(int=1), str(UUID(int=1)), None, "stock.reserve")


def test_what_can_never_be_appended_is_refused_at_once_and_not_staged() -> None:
    one = context()
    with pytest.raises(InvalidStreamName):
        one.emit("", Reserved(sku="a"))
    for reserved in ("$x", "tidings_x"):
        with pytest.raises(ConfigurationError, match="reserved"):
            one.emit(reserved, Reserved(sku="a"))
    with pytest.raises(EventTooLarge, match="'big'"):
        one.emit("big", Reserved(sku="a" * APPEND_LIMIT))
    with pytest.raises(SchemaError):
        one.emit("s", Reserved(sku="a"), metadata={"x": object()})
    assert one.emissions == []


def test_it_tells_where_it_is() -> None:
    one = context(attempt=3)
    assert (one.position, one.stream, one.attempt, one.causation_id) == (9, "order-1", 3, UUID(int=1))


class Injected:
    """Something that is made for one attempt, as a session is: it knows the context, and the context knows it."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.ends = 0
        context.opens(self.enter)
        context.ends_with(self.end)

    def enter(self, _: Context) -> Any:
        raise AssertionError("nobody enters it")

    def end(self) -> None:
        self.ends += 1


def test_what_was_injected_does_not_wait_for_the_garbage_collector_once_the_attempt_has_ended() -> None:
    attempt = context()
    injected = Injected(attempt)
    known = weakref.ref(injected)
    attempt.end("had returned")
    attempt.end("was stopped")
    assert injected.ends == 1
    with pytest.raises(AttemptEnded, match="had returned"):
        attempt.session()
    gc.disable()
    try:
        del injected
        assert known() is None
    finally:
        gc.enable()
