"""Declaring events: names, versions, keys, registries."""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

import pytest
from pydantic import BaseModel, ValidationError, create_model

from tidings.errors import ConfigurationError
from tidings.modelling.codec import decode, encode
from tidings.modelling.events import Event, Registry, partition_key, schema_version, upcaster, wire_name
from tidings.stores import RecordedEvent


class Paid(Event, name="PaymentTaken", version=2, key="order_id", oldest=2):
    order_id: str


def test_declared_facts_are_the_class_own() -> None:
    class Plain(Event):
        pass

    assert (wire_name(Plain), schema_version(Plain), Plain.__tidings__.key) == ("Plain", 1, None)
    assert (wire_name(Paid), schema_version(Paid), Paid.__tidings__.key) == ("PaymentTaken", 2, "order_id")
    assert (wire_name(Paid(order_id="1")), schema_version(Paid(order_id="1"))) == ("PaymentTaken", 2)


def test_a_subclass_has_its_own_name_and_version_and_its_parents_key() -> None:
    class PaidTwice(Paid):
        pass

    assert (wire_name(PaidTwice), schema_version(PaidTwice)) == ("PaidTwice", 1)
    assert partition_key(PaidTwice(order_id="1")) == "1"


def test_events_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Paid(order_id="1").order_id = "2"  # type: ignore[misc]


def test_the_key_is_a_text_or_none() -> None:
    class Numbered(Event, key="number"):
        number: int | None

    assert partition_key(Paid(order_id="1")) == "1"
    assert partition_key(Numbered(number=7)) == "7"
    assert partition_key(Numbered(number=None)) is None


@pytest.mark.parametrize("name", ["", "$x", "tidings_x", "tidings.marker"])
def test_reserved_and_empty_wire_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot be a wire name"):
        type("Bad", (Event,), {"__module__": __name__}, name=name)


@pytest.mark.parametrize("version", [0, -1])
def test_versions_count_from_1(version: int) -> None:
    with pytest.raises(ConfigurationError, match="count from 1"):
        type("Bad", (Event,), {"__module__": __name__}, version=version)


def test_a_key_must_be_a_field() -> None:
    with pytest.raises(ConfigurationError, match=r"key='other' is not one of its fields \(order_id\)"):

        class Bad(Event, key="other"):
            order_id: str


@pytest.mark.parametrize("start", [0, 2, 3])
def test_an_upcaster_that_no_version_needs_is_refused(start: int) -> None:
    with pytest.raises(ConfigurationError, match=f"from version {start} is never used by version 2"):

        class Bad(Event, version=2, oldest=2):
            @staticmethod
            @upcaster(start)
            def step(data: dict[str, Any]) -> dict[str, Any]:
                return data


def test_two_upcasters_from_one_version_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="two upcasters of Bad start from version 1"):

        class Bad(Event, version=2):
            @staticmethod
            @upcaster(1)
            def one(data: dict[str, Any]) -> dict[str, Any]:
                return data

            @staticmethod
            @upcaster(1)
            def two(data: dict[str, Any]) -> dict[str, Any]:
                return data


def test_a_registry_holds_one_class_per_wire_name() -> None:
    registry = Registry("service 'stock'")
    registry.add(Paid)
    registry.add(Paid)

    class Another(Event, name="PaymentTaken"):
        pass

    with pytest.raises(ConfigurationError, match=r"service 'stock': wire name 'PaymentTaken' is declared twice.*Paid"):
        registry.add(Another)
    assert registry.get("PaymentTaken") is Paid
    assert registry.get("Paid") is None
    assert list(registry) == [Paid]


def test_an_event_is_built_when_it_is_declared_so_that_what_is_wrong_is_said_there() -> None:
    class Early(Event):
        number: int

    assert Early.__pydantic_complete__


# ---- names -------------------------------------------------------------------------

FIELDS = (
    "wire_name",
    "schema_version",
    "partition_key",
    "key_field",
    "upcasters",
    "name",
    "version",
    "key",
    "oldest",
    "exact",
    "tidings",
    "event",
    "id",
    "type",
    "stream",
    "data",
    "metadata",
)


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_may_have_any_name(name: str) -> None:
    made = create_model("Telegram", __base__=Event, __cls_kwargs__={"name": "Sent", "key": name}, **{name: (str, ...)})  # type: ignore[call-overload]
    event = made(**{name: "mine"})
    data = encode(event, id=uuid4())
    assert (data.type, json.loads(data.data)) == ("Sent", {name: "mine"})
    metadata = json.loads(data.metadata)
    assert (metadata["schemaVersion"], metadata["partitionKey"]) == (1, "mine")
    assert (wire_name(event), schema_version(event), partition_key(event)) == ("Sent", 1, "mine")
    back = decode(RecordedEvent(2, "s", 0, "Sent", data.data, data.metadata, True, data.id.bytes, 0), made)
    assert back == event


@pytest.mark.parametrize("name", ["copy", "json", "dict", "schema", "model_fields", "model_extra", "validate"])
@pytest.mark.filterwarnings("ignore:Field name:UserWarning")
def test_a_field_may_have_a_name_that_pydantic_only_warns_of(name: str) -> None:
    test_a_field_may_have_any_name(name)


@pytest.mark.parametrize("body", [{"__tidings__": 1}, {"__annotations__": {"__tidings__": str}}])
def test_the_one_name_that_tidings_keeps_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="the name __tidings__ belongs to Tidings; use any other name"):
        type("Taken", (Event,), {"__module__": __name__, **body})


@pytest.mark.parametrize("name", [7, b"x", "\ud800"])
def test_a_wire_name_that_is_no_text_is_refused(name: Any) -> None:
    with pytest.raises(ConfigurationError, match="cannot be a wire name"):
        type("Bad", (Event,), {"__module__": __name__}, name=name)


# ---- keys --------------------------------------------------------------------------


class Line(BaseModel):
    sku: str


@pytest.mark.parametrize("kind", [list[int], tuple[str, ...], set[str], dict[str, int], float, float | None, Line])
def test_a_key_that_each_service_would_write_in_its_own_way_is_refused(kind: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"key='x' is a .*: a partition key is a text"):
        create_model("Bad", __base__=Event, __cls_kwargs__={"key": "x"}, x=(kind, ...))


# ---- upcasters ---------------------------------------------------------------------


class Steps:
    """A mixin that services share without importing each other."""

    @staticmethod
    @upcaster(1)
    def first(data: dict[str, Any]) -> dict[str, Any]:
        return data | {"b": 1}

    @staticmethod
    @upcaster(2)
    def second(data: dict[str, Any]) -> dict[str, Any]:
        return data | {"c": 2}


def third(data: dict[str, Any]) -> dict[str, Any]:
    return data | {"d": 3}


def lifted(view: type[Event], version: int = 1) -> dict[str, Any]:
    metadata = json.dumps({"schemaVersion": version}).encode()
    return decode(RecordedEvent(2, "s", 0, "X", b'{"a":0}', metadata, True, bytes(16), 0), view).model_dump()


def test_upcasters_come_from_mixins_base_classes_and_a_mapping() -> None:
    class Producers(Steps, Event, version=4, upcasters={3: third}):
        a: int
        b: int
        c: int
        d: int

    class Child(Producers, version=4):
        pass

    class Consumers(Event, Steps, version=3):
        a: int
        c: int

    class Second(Event, version=2, upcasters={1: Steps.first, 2: Steps.second}):
        a: int
        b: int

    assert lifted(Producers) == lifted(Child) == {"a": 0, "b": 1, "c": 2, "d": 3}
    assert lifted(Consumers) == {"a": 0, "c": 2}
    assert lifted(Second) == {"a": 0, "b": 1}


def test_an_own_upcaster_goes_before_one_that_is_inherited() -> None:
    class Own(Steps, Event, version=2):
        a: int
        b: int

        @staticmethod
        @upcaster(1)
        def other(data: dict[str, Any]) -> dict[str, Any]:
            return data | {"b": 9}

    assert lifted(Own) == {"a": 0, "b": 9}


@pytest.mark.parametrize(
    ("version", "starts", "oldest", "missing"), [(2, (), 1, 1), (4, (1, 3), 1, 2), (4, (1, 2), 2, 3), (5, (2, 4), 2, 3)]
)
def test_a_gap_in_the_upcasters_is_refused(version: int, starts: tuple[int, ...], oldest: int, missing: int) -> None:
    steps = dict.fromkeys(starts, third)
    with pytest.raises(ConfigurationError, match=rf"no @upcaster\({missing}\).*oldest={missing + 1}$") as refused:
        type("Bad", (Event,), {"__module__": __name__}, version=version, upcasters=steps, oldest=oldest)
    if len(starts) < version - oldest - 1:
        return
    assert "share the producer's" in str(refused.value)


def test_what_is_declared_as_the_oldest_needs_no_upcaster_before_it() -> None:
    class Late(Event, version=3, oldest=2, upcasters={2: third}):
        a: int

    assert lifted(Late, 2) == lifted(Late, 3) == {"a": 0}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"version": 1, "oldest": 2}, "oldest=2 is above its version, 1"),
        ({"version": 2, "oldest": 0}, "oldest=0: schema versions count from 1"),
        ({"version": "2"}, "version='2': schema versions count from 1"),
        ({"version": True}, "version=True: schema versions count from 1"),
        ({"version": 2, "upcasters": {0: third}}, "map a schema version, from 1"),
        ({"version": 2, "upcasters": {"1": third}}, "map a schema version, from 1"),
        ({"version": 2, "upcasters": {1: "third"}}, "to a function"),
    ],
)
def test_what_makes_no_sense_about_versions_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        type("Bad", (Event,), {"__module__": __name__}, **options)


def test_a_step_both_marked_and_given_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="two upcasters start from version 1"):

        class Bad(Event, version=2, upcasters={1: third}):
            @staticmethod
            @upcaster(1)
            def first(data: dict[str, Any]) -> dict[str, Any]:
                return data
