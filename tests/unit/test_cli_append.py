"""`tidings streams append`: a hand-made event is what the services' classes say, or is not appended."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.command_line import Ended, invoke
from tidings import Aggregate, Event, EventData, Service, evolves, open_store, upcaster


class Ordered(Event, key="order_id", version=2):
    order_id: str
    pence: int

    @staticmethod
    @upcaster(1)
    def pounds_became_pence(data: dict[str, Any]) -> dict[str, Any]:
        return data | {"pence": data["pounds"] * 100}


class OrderView(Event, name="Ordered"):
    order_id: str


class NewerView(Event, name="Ordered", version=3, oldest=3):
    order_id: str
    currency: str


class ByPence(Event, name="Ordered", version=2, oldest=2, key="pence"):
    pence: int


class Cancelled(Event, key="order_id"):
    order_id: str


class Order(Aggregate, category="order"):
    @evolves(Cancelled)
    def _cancelled(self, event: Cancelled) -> None:
        """Do nothing."""


producing, viewing, newer, other = Service("producing"), Service("viewing"), Service("newer"), Service("other")


@producing.on(Ordered)
async def see_ordered(event: Ordered) -> None:
    """Do nothing."""


@viewing.on(OrderView)
async def see_view(event: OrderView) -> None:
    """Do nothing."""


@newer.on(NewerView)
async def see_newer(event: NewerView) -> None:
    """Do nothing."""


@other.on(ByPence)
async def see_by_pence(event: ByPence) -> None:
    """Do nothing."""


HERE = "tests.unit.test_cli_append"
GOOD = '{"order_id": "7", "pence": 5}'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("STORE", "BUS", "DATABASE", "SERVICES", "DEBUG"):
        monkeypatch.delenv(f"TIDINGS_{name}", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def append(*arguments: str, services: str = "producing,viewing") -> Ended:
    environment = ",".join(f"{HERE}:{name}" for name in services.split(",") if name)
    with pytest.MonkeyPatch.context() as patch:
        if services:
            patch.setenv("TIDINGS_SERVICES", environment)
        # The classes of one module are all of its services': take away those that the case is not about.
        for name, service in (("Ordered", "producing"), ("NewerView", "newer"), ("ByPence", "other")):
            if service not in services.split(","):
                patch.delattr(f"{HERE}.{name}")
        return invoke("streams", "append", "order-7", *arguments)


def metadata() -> dict[str, Any]:
    ended = invoke("streams", "show", "order-7", "--json")
    found: dict[str, Any] = json.loads(ended.out.splitlines()[-1])["metadata"]
    return {name: value for name, value in found.items() if not name.startswith("$")}


def test_the_class_says_partition_key_and_schema_version() -> None:
    ended = append("Ordered", GOOD)
    assert (ended.code, ended.err) == (0, "")
    assert metadata() == {"schemaVersion": 2, "partitionKey": "7"}


def test_a_type_that_no_named_service_declares_is_said() -> None:
    ended = append("Orderde", "{}")
    assert ended.code == 0
    assert "no service of TIDINGS_SERVICES declares 'Orderde': is the name right?" in ended.err


def test_what_an_aggregate_evolves_counts_too() -> None:
    assert append("Cancelled", '{"order_id": "8"}').code == 0
    assert metadata() == {"schemaVersion": 1, "partitionKey": "8"}
    ended = append("Cancelled", "{}")
    assert ended.code == 1
    assert "test_cli_append.Cancelled could not read it" in ended.err


@pytest.mark.parametrize("data", ['{"order_id": "7"}', '{"order_id": "7", "pence": "x"}', "[]", "null"])
def test_what_a_service_could_not_read_is_refused_and_nothing_is_written(data: str, folder: Path) -> None:
    for options in ((), ("--dry-run",)):
        ended = append("Ordered", data, *options)
        assert (ended.code, ended.out) == (1, "")
        assert "not appended, because service 'producing' could not read it" in ended.err
        assert list(folder.iterdir()) == []


def test_an_older_schema_version_is_read_through_its_upcasters() -> None:
    old = '{"order_id": "7", "pounds": 3}'
    assert append("Ordered", old).code == 1
    ended = append("Ordered", old, "--schema-version", "1", "--key", "7")
    assert (ended.code, ended.err) == (0, "")
    assert metadata() == {"schemaVersion": 1, "partitionKey": "7"}


def test_a_service_that_needs_a_deploy_first_is_named_and_the_event_is_appended() -> None:
    ended = append("Ordered", GOOD, "--schema-version", "2", services="producing,newer")
    assert ended.code == 0
    assert "Note: " in ended.err
    assert "service 'newer' reads it with NewerView at version 3, declared with oldest=3" in ended.err
    assert metadata() == {"schemaVersion": 2, "partitionKey": "7"}


@pytest.mark.parametrize("given", [("--key", "8"), ("--key", ""), ("--metadata", '{"partitionKey": "8"}')])
def test_another_key_than_the_class_says_is_refused(given: tuple[str, str]) -> None:
    ended = append("Ordered", GOOD, *given)
    assert ended.code == 1
    assert "service 'producing' says '7'" in ended.err
    assert append("Ordered", GOOD, *given, "--unchecked").code == 0
    assert metadata() == ({"partitionKey": "8"} if given[1] else {}) | {"tidingsUnchecked": True}


def test_the_same_key_may_be_given() -> None:
    assert append("Ordered", GOOD, "--key", "7").code == 0


def test_classes_that_disagree_about_the_key_are_refused() -> None:
    ended = append("Ordered", GOOD, services="producing,other")
    assert ended.code == 1
    assert "service 'producing' says '7', service 'other' says '5'. Give them one key=" in ended.err


def test_a_dry_run_prints_the_event_and_writes_nothing(folder: Path) -> None:
    ended = append("Ordered", GOOD, "--dry-run", "--json", "--id", "00000000-0000-4000-8000-000000000001")
    (shown,) = [json.loads(line) for line in ended.out.splitlines()]
    assert shown == {
        "dry_run": True,
        "stream": "order-7",
        "type": "Ordered",
        "id": "00000000-0000-4000-8000-000000000001",
        "content_type": "application/json",
        "data": {"order_id": "7", "pence": 5},
        "metadata": {
            "$correlationId": "00000000-0000-4000-8000-000000000001",
            "schemaVersion": 2,
            "partitionKey": "7",
        },
        "expected": "any",
        "checked_by": ["service 'producing'", "service 'viewing'", f"{HERE}.OrderView"][:2],
    }
    ended = append("Ordered", GOOD, "--dry-run")
    assert "Would append to order-7 (any): Ordered" in ended.out
    assert "key       7" in ended.out
    assert "checked   service 'producing', service 'viewing'" in ended.out
    assert list(folder.iterdir()) == []


async def recorded(type: str, metadata: dict[str, Any], stream: str = "order-7") -> None:
    async with open_store("sqlite:///tidings.db") as store:
        await store.append(stream, [EventData(type, b"{}", json.dumps(metadata).encode())])


@pytest.mark.parametrize("stream", ["order-7", "order-8"])
@pytest.mark.parametrize("options", [(), ("--dry-run",)])
async def test_an_undeclared_type_needs_what_its_newest_event_has(stream: str, options: tuple[str, ...]) -> None:
    await recorded("Foreign", {"partitionKey": "k", "schemaVersion": 2}, stream)
    await recorded("Another", {}, stream)
    ended = await asyncio.to_thread(append, "Foreign", GOOD, *options)
    assert ended.code == 2
    assert f"the newest event of type 'Foreign', {stream}@0" in ended.err
    assert "--key KEY (it has 'k'; --key '' for none) and --schema-version N (it has 2)" in ended.err
    assert "TIDINGS_SERVICES" in ended.err
    ended = await asyncio.to_thread(append, "Foreign", GOOD, "--key", "k2", "--schema-version", "2", *options)
    assert (ended.code, ended.err) == (0, "")
    assert (await asyncio.to_thread(append, "Another", "{}", *options)).code == 0
    assert (await asyncio.to_thread(append, "Foreign", "{}", "--unchecked", *options)).code == 0
    assert (await asyncio.to_thread(append, "Foreign", "x", "--octets", *options)).code == 0


async def test_an_unchecked_event_is_no_example_for_those_after_it() -> None:
    await recorded("Foreign", {"partitionKey": "k"})
    assert (await asyncio.to_thread(append, "Foreign", "{}", "--unchecked")).code == 0
    ended = await asyncio.to_thread(append, "Foreign", "{}")
    assert ended.code == 2
    assert "the newest event of type 'Foreign', order-7@0, has what this one lacks. Give --key KEY" in ended.err
    assert (await asyncio.to_thread(append, "Misspelt", "{}", "--unchecked")).code == 0
    ended = await asyncio.to_thread(append, "Misspelt", "{}")
    assert "no service of TIDINGS_SERVICES declares 'Misspelt': is the name right?" in ended.err


def test_without_services_an_undeclared_type_is_ordered_by_its_stream() -> None:
    ended = append("Unheard", "{}", "--dry-run", services="")
    assert ended.code == 0
    assert "key       order-7 (the name of the stream)" in ended.out
    assert "checked   by nobody: no class is known for this type" in ended.out
