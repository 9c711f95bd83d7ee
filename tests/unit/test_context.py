"""What a handler answers has the same identity at every attempt."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID

import pytest

from tidings.codec import Cause
from tidings.context import Context
from tidings.errors import ConfigurationError, EventTooLarge, InvalidStreamName, SchemaError
from tidings.events import Event
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
) -> Context:
    event = RecordedEvent(position, "order-1", 2, "OrderCreated", b"{}", b"", True, UUID(int=1).bytes, 0)
    return Context(service, handler, log, event, metadata or {}, attempt)


def test_ids_of_emitted_events_are_the_same_at_every_attempt_and_differ_by_order() -> None:
    ids = [
        [context.emit("s", Reserved(sku="a")), context.emit("s", Reserved(sku="a"))]
        for context in (context(), context(attempt=2))
    ]
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 2


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
    """A staged event of an older release must be recognised by a newer one."""
    assert str(context().emit("s", Reserved(sku="a"))) == "2478673a-b202-546a-9014-e571c8536913"
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
