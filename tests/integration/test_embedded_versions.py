"""A producer's new schema version, and another key: a consumer reads what fits, and holds the rest until its deploy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tests.integration.embedded import World, count, embedded, letters, until
from tidings import Event, Hold, Retry, Service, upcaster
from tidings.database.tables import dead, held

IMPATIENT = Retry(attempts=3, delay=0.01, hold=Hold(attempts=1, delay=0.01, factor=1))
ORDERS = range(30)
"""Number of events: more than the failures in a row that open a breaker."""


class Completed1(Event, name="Completed", key="order"):
    order: str
    fee: int


class Completed2(Event, name="Completed", key="order", version=2, oldest=2):
    order: str
    amount: int


class Other(Event, key="order"):
    order: str


class FeeView(Event, name="Completed", key="order"):
    order: str
    fee: int


class OrderView(Event, name="Completed", key="order"):
    order: str


class AmountView(Event, name="Completed", key="order", version=2):
    order: str
    amount: int

    @staticmethod
    @upcaster(1)
    def fee_was_renamed(data: dict[str, Any]) -> dict[str, Any]:
        return data | {"amount": data["fee"]}


class ByFee(Event, name="Completed", key="fee"):
    order: str
    fee: int


def reading(view: type[Event], *others: type[Event], retry: Retry = IMPATIENT) -> tuple[Service, list[Event]]:
    service, seen = Service("consumer"), list[Event]()

    @service.on(view, *others, retry=retry)
    async def see(event: Event) -> None:
        seen.append(event)

    return service, seen


async def append(world: World, *events: Event) -> None:
    service = world.running[0].service
    assert isinstance(service, Service)
    for event in events:
        await service.append(f"order-{event.model_dump()['order']}", event)


async def tries(service: Service) -> list[int]:
    async with service.engine.connect() as connection:
        return [row.tries for row in await connection.execute(sa.select(held).where(held.c.attempts > 0))]


async def test_a_consumer_whose_fields_did_not_change_reads_the_new_version(tmp_path: Path) -> None:
    service, seen = reading(OrderView)
    async with embedded(tmp_path, service) as world:
        await append(world, Completed1(order="1", fee=2), Completed2(order="2", amount=2))
        await world.settled()
    assert seen == [OrderView(order="1"), OrderView(order="2")]


async def test_what_needs_a_deploy_is_held_however_often_and_handled_in_order_after_it(tmp_path: Path) -> None:
    service, seen = reading(FeeView, Other)
    news: list[Event] = [Completed2(order=str(n), amount=n) for n in ORDERS]
    async with embedded(tmp_path, service) as world:
        await append(world, *news, Completed1(order="0", fee=9), Other(order="7"), Other(order="free"))
        await until(lambda: seen == [Other(order="free")])

        async def all_tried() -> bool:
            found = await tries(service)
            return len(found) == len(news) and min(found) >= 4

        await until(all_tried)
        assert await letters(service) == []
        report = await world.report()
        assert report.services[0].held_count == len(news) + 2
        assert world.running[0].joins == 1
    service, seen = reading(AmountView, Other)
    async with embedded(tmp_path, service) as world:
        await world.settled()
        assert await count(service, held) == await count(service, dead) == 0
    assert sorted(event.model_dump_json() for event in seen) == sorted(
        event.model_dump_json() for event in [*news, AmountView(order="0", amount=9), Other(order="7")]
    )
    assert [event for event in seen if event.model_dump()["order"] == "0"] == [
        AmountView(order="0", amount=0),
        AmountView(order="0", amount=9),
    ]
    assert [type(event) for event in seen if event.model_dump()["order"] == "7"] == [AmountView, Other]


async def test_a_view_that_orders_by_another_key_is_held_and_handled_after_the_deploy_of_one_that_does_not(
    tmp_path: Path,
) -> None:
    patient = Retry(hold=Hold(delay=3600, maximum=3600))
    service, seen = reading(ByFee, retry=patient)
    events = [Completed1(order=str(n), fee=7) for n in range(3)]
    async with embedded(tmp_path, service) as world:
        await append(world, *events)

        async def all_held() -> bool:
            return await count(service, held) == 3

        await until(all_held)
        async with service.engine.connect() as connection:
            reasons = list(await connection.scalars(sa.select(held.c.reason)))
        assert all("PartitionKeyDiffers" in reason and "key='fee' is '7'" in reason for reason in reasons)
        assert (seen, await letters(service)) == ([], [])
    service, seen = reading(FeeView, retry=patient)
    async with embedded(tmp_path, service) as world:
        await world.settled()  # at once: the view is another one, though the handler's code is the same
    assert sorted(event.model_dump()["order"] for event in seen) == ["0", "1", "2"]
