"""Events to bytes and back, over schema versions."""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum
from typing import Any, Literal
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator

from tidings.errors import (
    ConfigurationError,
    DeployNeeded,
    PartitionKeyDiffers,
    SchemaError,
    UnknownEventType,
    UpcastMissing,
)
from tidings.modelling.codec import Cause, check_key, decode, encode, read_metadata
from tidings.modelling.events import Event, upcaster
from tidings.protocol.position import NESTING, partition_key
from tidings.stores import EventData, RecordedEvent

pytestmark = pytest.mark.lower_bounds

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
    """Upcast data is validated as JSON, too: only there does a strict view accept a decimal as text."""
    lifted = decode(written(document, version), Lifted)
    assert lifted == Lifted(amount=Decimal("1.50"), currency="GBP", tags=())


def test_events_of_other_writers_without_a_version_are_version_1() -> None:
    assert decode(written({"amount": "1"})._replace(metadata=b""), Lifted).currency == "GBP"
    assert decode(written({"amount": "1"})._replace(metadata=b"no json"), Lifted).currency == "GBP"


def test_a_newer_version_is_read_as_far_as_the_fields_of_the_view_validate() -> None:
    newer = {"amount": "1.5", "currency": "GBP", "tags": ["a"], "more": {"x": 1}}
    assert decode(written(newer, 4), Lifted) == Lifted(amount=Decimal("1.5"), currency="GBP", tags=("a",))


def test_a_newer_version_that_does_not_fit_says_which_deploy_is_missing() -> None:
    said = (
        r"order-1@3 \(position 7\) has schema version 4; service 'stock' reads it with Lifted at version 3.*"
        r"amount: Field required.*Deploy service 'stock' with Lifted at version 4; until then the event is held"
    )
    with pytest.raises(UnknownEventType, match=said):
        decode(written({}, 4), Lifted, reader="service 'stock'")


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 300, b'{"amount":NaN}'])
@pytest.mark.parametrize("version", [1, 3, 4])
def test_what_is_no_json_can_be_read_by_no_deploy(data: bytes, version: int) -> None:
    with pytest.raises(SchemaError) as refused:
        decode(written(data, version), Lifted)
    assert not isinstance(refused.value, DeployNeeded)


def test_what_does_not_fit_its_own_version_can_be_read_by_no_deploy() -> None:
    with pytest.raises(SchemaError) as refused:
        decode(written({"amount": "1"}, 3), Lifted)
    assert not isinstance(refused.value, DeployNeeded)


def test_an_event_older_than_the_oldest_that_is_declared_says_which_deploy_is_missing() -> None:
    class Late(Event, name="Lifted", version=3, oldest=2):
        @staticmethod
        @upcaster(2)
        def second(data: dict[str, Any]) -> dict[str, Any]:
            return data

    assert decode(written({}, 2), Late) == decode(written({}, 3), Late) == Late()
    with pytest.raises(UpcastMissing, match=r"schema version 1; this service.*oldest=2.*with @upcaster\(1\)"):
        decode(written({}, 1), Late)


# ---- keys ------------------------------------------------------------------------


class ByCustomer(Event, name="Ordered", key="customer"):
    customer: str | None
    shop: int


class ByShop(Event, name="Ordered", key="shop"):
    customer: str | None
    shop: int


class Unkeyed(Event, name="Ordered"):
    customer: str | None


@pytest.mark.parametrize("shop", [1, 7])
def test_a_view_may_have_the_producers_key_or_none(shop: int) -> None:
    event = ByCustomer(customer="7", shop=shop)
    recorded = stored(encode(event, id=ID))
    for view in (ByCustomer, Unkeyed):
        check_key(recorded, decode(recorded, view), read_metadata(recorded))
    nobody = stored(encode(ByCustomer(customer=None, shop=1), id=ID))
    check_key(nobody, decode(nobody, ByCustomer), read_metadata(nobody))


def test_a_view_with_another_key_than_the_event_was_written_with_is_refused() -> None:
    recorded = stored(encode(ByCustomer(customer="7", shop=1), id=ID))
    said = r"order-1@3.*partition key '7'; service 'stock' reads it with ByShop, whose key='shop' is '1'.*is held"
    with pytest.raises(PartitionKeyDiffers, match=said):
        check_key(recorded, decode(recorded, ByShop), read_metadata(recorded), reader="service 'stock'")
    recorded = stored(encode(Unkeyed(customer="7"), id=ID))
    with pytest.raises(PartitionKeyDiffers, match="no partition key, so the stream's name orders it"):
        check_key(recorded, decode(recorded, ByCustomer2), read_metadata(recorded))


class ByCustomer2(Event, name="Ordered", key="customer"):
    customer: str


def test_keys_of_other_versions_and_of_other_writers_are_not_compared() -> None:
    document = {"customer": "7", "shop": 1}
    for metadata in ({"schemaVersion": 2, "partitionKey": "x"}, {}, {"partitionKey": "x"}):
        recorded = stored(EventData("Ordered", json.dumps(document).encode(), json.dumps(metadata).encode()))
        check_key(recorded, decode(recorded, ByShop), read_metadata(recorded))


class Shade(Enum):
    RED = "red"


class Numeral(Enum):
    ONE = 1


@pytest.mark.parametrize(
    ("kind", "plain", "value"),
    [
        (Shade, str, Shade.RED),
        (Numeral, int, Numeral.ONE),
        (UUID, str, ID),
        (date, str, date(2026, 1, 2)),
        (Decimal, str, Decimal("1.50")),
        (int, int, 7),
        (datetime, str, datetime(2026, 1, 2, tzinfo=UTC)),
        (Literal["a"], str, "a"),
    ],
)
def test_a_view_may_declare_the_key_with_another_type_of_the_same_text(kind: Any, plain: Any, value: Any) -> None:
    keyed = create_model("Keyed", __base__=Event, __cls_kwargs__={"key": "k"}, k=(kind, ...))
    loose = create_model("Keyed", __base__=Event, __cls_kwargs__={"key": "k"}, k=(plain, ...))
    recorded = stored(encode(keyed(k=value), id=ID))
    for view in (keyed, loose):
        if kind is not datetime or view is keyed:
            check_key(recorded, decode(recorded, view), read_metadata(recorded))


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
    with pytest.raises(SchemaError, match=r"from version 2 of .*Broken failed: KeyError") as failed:
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
