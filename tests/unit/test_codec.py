"""Events to bytes and back, over schema versions."""

from __future__ import annotations

import json
from contextlib import suppress
from decimal import Decimal
from typing import Any, Literal
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tidings.codec import Cause, decode, encode, read_metadata
from tidings.errors import ConfigurationError, SchemaError, UnknownEventType, UpcastMissing
from tidings.events import Event, upcaster
from tidings.position import NESTING, partition_key
from tidings.stores import EventData, RecordedEvent

ID = UUID("0a1b2c3d-0000-4000-8000-00000000000f")


class Line(BaseModel):
    sku: str
    price: Decimal


class Ordered(Event, name="OrderCreated"):
    order_id: str
    lines: tuple[Line, ...] = ()


class Lifted(Event, name="Lifted", version=3):
    model_config = ConfigDict(strict=True)

    amount: Decimal
    currency: str
    tags: tuple[str, ...]

    @staticmethod
    @upcaster(1)
    def currency_was_always_pounds(data: dict[str, Any]) -> dict[str, Any]:
        return data | {"currency": "GBP"}

    @upcaster(2)
    @staticmethod
    def tags_came_later(data: dict[str, Any]) -> dict[str, Any]:
        data["tags"] = []
        return data


class Keyed(Event, key="customer"):
    customer: str | None


def stored(data: EventData, **changes: Any) -> RecordedEvent:
    whole = RecordedEvent(7, "order-1", 3, data.type, data.data, data.metadata, True, data.id.bytes, 0)
    return whole._replace(**changes)


def written(document: Any, version: object = 1, type: str = "Lifted") -> RecordedEvent:
    metadata = json.dumps({"schemaVersion": version}).encode()
    return stored(EventData(type, document if isinstance(document, bytes) else json.dumps(document).encode(), metadata))


@given(st.text(st.characters(exclude_categories=["Cs"])), st.lists(st.decimals(allow_nan=False, allow_infinity=False)))
def test_what_was_encoded_is_decoded(order_id: str, prices: list[Decimal]) -> None:
    event = Ordered(order_id=order_id, lines=tuple(Line(sku="a", price=price) for price in prices))
    assert decode(stored(encode(event, id=ID)), Ordered) == event


def test_metadata_tells_cause_trace_handler_version_key_and_the_users_own() -> None:
    cause = Cause(UUID(int=1), "c-1", "trace", "stock.reserve")
    data = encode(Keyed(customer="k"), id=ID, metadata={"actor": "é"}, cause=cause)
    assert (data.id, data.type) == (ID, "Keyed")
    assert read_metadata(stored(data)) == {
        "$correlationId": "c-1",
        "$causationId": str(UUID(int=1)),
        "tidingsHandler": "stock.reserve",
        "traceparent": "trace",
        "schemaVersion": 1,
        "partitionKey": "k",
        "actor": "é",
    }


def test_an_event_without_cause_begins_its_own_correlation() -> None:
    assert read_metadata(stored(encode(Ordered(order_id="1"), id=ID))) == {
        "$correlationId": str(ID),
        "schemaVersion": 1,
    }
    given_id = encode(Ordered(order_id="1"), id=ID, cause=Cause(ID, "of the cause"), correlation_id="given")
    assert read_metadata(stored(given_id))["$correlationId"] == "given"


@pytest.mark.parametrize(
    "name", ["$x", "$correlationId", "tidings_x", "tidingsHandler", "schemaVersion", "partitionKey"]
)
def test_reserved_metadata_keys_are_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigurationError, match=name.replace("$", r"\$")):
        encode(Ordered(order_id="1"), id=ID, metadata={name: 1})


@pytest.mark.parametrize("value", [object, float("nan"), {1, 2}, "\ud800", b"bytes"], ids=repr)
def test_metadata_that_is_no_json_is_refused(value: object) -> None:
    with pytest.raises(SchemaError, match="'OrderCreated'"):
        encode(Ordered(order_id="1"), id=ID, metadata={"actor": value})


def test_metadata_that_contains_itself_or_is_too_deep_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (endless, deep):
        with pytest.raises(SchemaError):
            encode(Ordered(order_id="1"), id=ID, metadata={"actor": value})


def test_a_lone_surrogate_in_an_event_is_refused() -> None:
    with pytest.raises((SchemaError, ValidationError)):
        encode(Ordered(order_id="\ud800"), id=ID)


def test_an_empty_partition_key_is_refused_and_none_means_the_stream() -> None:
    with pytest.raises(SchemaError, match="'customer' is empty"):
        encode(Keyed(customer=""), id=ID)
    assert partition_key(stored(encode(Keyed(customer=None), id=ID))) == "order-1"
    assert partition_key(stored(encode(Keyed(customer="k"), id=ID))) == "k"


def test_a_partition_key_that_could_not_be_read_back_is_refused() -> None:
    with pytest.raises(SchemaError, match="brackets"):
        encode(Keyed(customer="k"), id=ID, metadata={"many": [[]] * NESTING})
    encode(Ordered(order_id="1"), id=ID, metadata={"many": [[]] * NESTING})


def test_numbers_that_json_does_not_have_are_refused_when_the_event_is_made() -> None:
    class Measured(Event):
        value: float

    with pytest.raises(ValidationError):
        Measured(value=float("nan"))


def test_aliases_are_the_names_on_the_wire() -> None:
    class Aliased(Event):
        order_id: str = Field(alias="orderId")

    event = Aliased(orderId="1")
    data = encode(event, id=ID)
    assert json.loads(data.data) == {"orderId": "1"}
    assert decode(stored(data), Aliased) == event


def test_unknown_fields_are_ignored() -> None:
    assert decode(written({"order_id": "1", "more": [1]}), Ordered) == Ordered(order_id="1")


# ---- versions ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "document"),
    [
        (1, {"amount": "1.50"}),
        (2, {"amount": "1.50", "currency": "GBP"}),
        (3, {"amount": "1.50", "currency": "GBP", "tags": []}),
    ],
)
def test_every_old_version_is_lifted_step_by_step(version: int, document: dict[str, Any]) -> None:
    """Validated as JSON, too: a strict view takes a decimal from a text only there."""
    lifted = decode(written(document, version), Lifted)
    assert lifted == Lifted(amount=Decimal("1.50"), currency="GBP", tags=())


def test_events_of_other_writers_without_a_version_are_version_1() -> None:
    assert decode(written({"amount": "1"})._replace(metadata=b""), Lifted).currency == "GBP"
    assert decode(written({"amount": "1"})._replace(metadata=b"no json"), Lifted).currency == "GBP"


def test_a_newer_version_is_unknown_and_says_what_to_do() -> None:
    with pytest.raises(UnknownEventType, match=r"order-1@3 \(position 7\) has schema version 4.* up to 3: deploy"):
        decode(written({}, 4), Lifted)


def test_a_missing_step_is_named() -> None:
    class Holed(Event, name="Lifted", version=3):
        @staticmethod
        @upcaster(1)
        def first(data: dict[str, Any]) -> dict[str, Any]:
            return data

    assert decode(written({}, 3), Holed) == Holed()
    for version in (1, 2):
        with pytest.raises(UpcastMissing, match=r"@upcaster\(2\)"):
            decode(written({}, version), Holed)


def test_an_upcaster_that_raises_or_returns_nothing_is_named_without_values() -> None:
    class Broken(Event, name="Lifted", version=3):
        @staticmethod
        @upcaster(1)
        def forgets(data: dict[str, Any]) -> None:
            data["x"] = 1

        @staticmethod
        @upcaster(2)
        def fails(data: dict[str, Any]) -> dict[str, Any]:
            raise KeyError(data["secret"])

    with pytest.raises(SchemaError, match="version 1 returned no dict"):
        decode(written({}, 1), Broken)
    with pytest.raises(SchemaError, match="from version 2 failed: KeyError") as failed:
        decode(written({"secret": "hush"}, 2), Broken)
    assert "hush" not in str(failed.value)


def test_upcasters_that_make_no_json_are_refused() -> None:
    class Odd(Event, name="Lifted", version=2):
        @staticmethod
        @upcaster(1)
        def odd(data: dict[str, Any]) -> dict[str, Any]:
            return {"x": object()}

    with pytest.raises(SchemaError, match="not JSON"):
        decode(written({}, 1), Odd)


def test_a_class_method_can_be_an_upcaster() -> None:
    class Classy(Event, version=2):
        name: str

        @classmethod
        @upcaster(1)
        def named(cls, data: dict[str, Any]) -> dict[str, Any]:
            return {"name": cls.__name__}

    assert decode(written({}, 1), Classy).name == "Classy"


@pytest.mark.parametrize("version", [0, -1, "1", 1.0, True, None, [], {}], ids=repr)
def test_a_schema_version_that_is_none_is_refused(version: object) -> None:
    with pytest.raises(SchemaError, match="schemaVersion"):
        decode(written({}, version), Lifted)


@pytest.mark.parametrize("version", [1, 3])
@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"amount":"\\ud800"}'])
def test_data_that_does_not_fit_is_a_schema_error_that_says_where(data: bytes, version: int) -> None:
    with pytest.raises(SchemaError, match="order-1@3"):
        decode(written(data, version), Lifted)


@given(st.binary(), st.binary())
def test_whatever_the_bytes_are_decoding_returns_or_raises_schema_error(data: bytes, metadata: bytes) -> None:
    with suppress(SchemaError):
        decode(stored(EventData("Lifted", data, metadata)), Lifted)


def test_errors_name_fields_never_values() -> None:
    class Cat(BaseModel):
        kind: Literal["cat"]

    class Dog(BaseModel):
        kind: Literal["dog"]

    class Strict(Event, name="Strict"):
        number: int
        pet: Cat | Dog = Field(discriminator="kind")
        choice: Literal["a"]

    with pytest.raises(SchemaError) as refused:
        decode(written({"number": "hush", "pet": {"kind": "hush"}, "choice": "hush"}), Strict)
    shown = str(refused.value)
    assert all(field in shown for field in ("number", "pet", "choice", "Strict"))
    assert "hush" not in shown
    assert refused.value.__cause__ is None


def test_a_validator_of_the_view_is_heard() -> None:
    class Counted(Event):
        count: int

        @field_validator("count")
        @classmethod
        def positive(cls, value: int) -> int:
            if value < 1:
                raise ValueError("count must be positive")
            return value

    with pytest.raises(SchemaError, match="count: Value error, count must be positive"):
        decode(written({"count": 0}), Counted)


@pytest.mark.parametrize("metadata", [b"", b"{", b"[]", b'"x"', b"\xff", b"[" * 100_000])
def test_metadata_of_other_writers_reads_as_empty(metadata: bytes) -> None:
    assert read_metadata(stored(EventData("X", b"", metadata))) == {}
