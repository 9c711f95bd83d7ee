"""Repositories, right and wrong."""

from __future__ import annotations

from typing import assert_type

from tests.typing.cases.domain import Order, Parcel, Placed, orders, shop
from tidings import Changed, HistoryEntry, Repository


async def right() -> None:
    assert_type(orders, Repository[Order])
    done = await orders.create("1", Order.place, 250)
    assert_type(done, Changed[Order])
    assert_type(await orders.load("1", at_version=0), Order)
    await orders.change("1", Order.pay, by="card", expected=0)
    await orders.change("1", lambda order: order.pay())
    await orders.change("1", lambda order, pence: order.place(pence), 250)
    async for entry in orders.history("1"):
        assert_type(entry, HistoryEntry)
    await shop.append("order-1", Placed(order="1"))


async def wrong() -> None:
    await orders.create("1", Parcel.pack)  # mypy=arg-type pyright=reportArgumentType
    await orders.change("1", Parcel.pack)  # mypy=arg-type pyright=reportArgumentType
    await orders.change("1", "pay")  # mypy=arg-type pyright=reportArgumentType
    await orders.change(1, Order.pay)  # mypy=arg-type pyright=reportArgumentType
    await orders.load("1", as_of="yesterday")  # mypy=arg-type pyright=reportArgumentType
    await shop.append("order-1", Placed)  # mypy=arg-type pyright=reportArgumentType
    await shop.append("order-1", [Placed(order="1")])  # mypy=arg-type pyright=reportArgumentType
    shop.repository(Placed)  # mypy=type-var pyright=reportArgumentType
    Placed(order=1)  # pyright=reportArgumentType
    Placed(order="1").order = "2"  # mypy=misc
