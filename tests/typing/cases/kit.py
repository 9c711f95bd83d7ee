"""Given, when, then, and what the fixtures give, right and wrong."""

from __future__ import annotations

from typing import assert_type

from hypothesis.strategies import SearchStrategy

from tests.typing.cases.domain import Order, Paid, Placed
from tests.typing.cases.handlers import right
from tidings import Context, Repository
from tidings.testing import Decided, Emitted, Handling, RecordingContext, World, given
from tidings.testing.brokers import RabbitMQ
from tidings.testing.strategies import events

PLACED = Placed(order="1")


def decisions() -> None:
    done = given(PLACED).when(Order.place, 250)
    assert_type(done, Decided[Order])
    assert_type(done.then(Placed(order="1", pence=250)).aggregate, Order)
    given(("order-1", PLACED)).when(Order.pay, by="cash").raises(ValueError, match="cash")
    given(PLACED).when(Order.place, "250")  # mypy=arg-type pyright=reportArgumentType
    given(PLACED).when(Order.place)  # mypy=call-arg pyright=reportCallIssue
    given(PLACED).when(Order.pay, "cash")  # mypy=call-arg pyright=reportCallIssue
    given(PLACED).when(Order.pay).then(Paid)  # mypy=arg-type pyright=reportArgumentType
    given(Placed)  # mypy=arg-type pyright=reportArgumentType
    given(PLACED).when(Order.pay).raises("refused")  # mypy=arg-type pyright=reportArgumentType


async def handlers() -> None:
    assert_type(await given(PLACED).handling(right, PLACED).emits(Paid(order="1"), ("paid", Paid(order="1"))), Handling)
    async with given().handling(right, PLACED) as handled:
        assert_type(handled.emitted, list[Emitted])
    context: Context = RecordingContext(PLACED)
    await right(PLACED, context, handled.session)
    given().handling(right, Placed)  # mypy=arg-type pyright=reportArgumentType
    given().handling(right, PLACED).emits("paid")  # mypy=arg-type pyright=reportArgumentType
    given().handling(right, PLACED, attempt="2")  # mypy=arg-type pyright=reportArgumentType


async def worlds(world: World, orders: Repository[Order]) -> None:
    done = await world.change(orders, "1", Order.place, 250)
    assert_type(done.aggregate, Order)
    await world.change(orders, "1", Order.pay, by="cash")
    await world.change(orders, "1", Order.place, 250, metadata={"actor": "me"})
    await world.change(orders, "1", Order.place, "250")  # mypy=call-overload pyright=reportArgumentType
    await world.change(orders, "1", Order.place)  # mypy=call-overload pyright=reportCallIssue
    assert_type(world.events(of=Placed), list[Placed])


def strategies() -> None:
    assert_type(events(Placed), SearchStrategy[Placed])
    events(Order)  # mypy=type-var pyright=reportArgumentType


async def test_with_fixtures(rabbitmq_url: str, tidings_rabbitmq: RabbitMQ) -> None:
    async with tidings_rabbitmq.isolated() as url:
        assert_type(url, str)
    tidings_rabbitmq.kill()  # mypy=attr-defined pyright=reportAttributeAccessIssue
