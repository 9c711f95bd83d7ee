"""Declaring events: names, versions, keys, registries."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tidings.errors import ConfigurationError
from tidings.events import Event, Registry, partition_key, schema_version, upcaster, wire_name


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
    with pytest.raises(ConfigurationError, match="is no wire name"):
        type("Bad", (Event,), {"__module__": __name__}, name=name)


@pytest.mark.parametrize("version", [0, -1])
def test_versions_count_from_1(version: int) -> None:
    with pytest.raises(ConfigurationError, match="count from 1"):
        type("Bad", (Event,), {"__module__": __name__}, version=version)


def test_a_key_must_be_a_field() -> None:
    with pytest.raises(ConfigurationError, match=r"key='other' is none of its fields \(order_id\)"):

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
