"""Handlers, right and wrong. Injection is by annotation, which the declaration checks when the module is imported."""

from __future__ import annotations

from typing import assert_type
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from tests.typing.cases.domain import Order, Paid, Parcel, Placed, orders, shop
from tidings import Context, Retry


@shop.on(Placed, retry=Retry(attempts=3))
async def right(event: Placed, context: Context, session: AsyncSession) -> None:
    assert_type(context.emit("paid", Paid(order=event.order)), UUID)
    changed = await context.change(orders, event.order, Order.pay, by="cash")
    assert_type(changed.aggregate, Order)


@shop.on(Placed, name="plain")
def plain(event: Placed) -> None: ...


async def unchanged(event: Placed, context: Context, session: AsyncSession) -> None:
    await right(event, context, session)  # the decorator returns the function as it was


@shop.on(Placed, name="returns")  # mypy=type-var pyright=reportArgumentType
def returns(event: Placed) -> int:
    return 1


@shop.on(Placed, name="returns_too")  # mypy=type-var pyright=reportArgumentType
async def returns_too(event: Placed) -> int:
    return 1


@shop.on(Order, name="no_event")  # mypy=arg-type pyright=reportArgumentType
async def no_event(event: Placed) -> None: ...


@shop.on(Placed, retry=3, name="retries")  # mypy=arg-type pyright=reportArgumentType
async def retries(event: Placed) -> None: ...


@shop.on(Placed, name="emits")
async def emits(event: Placed, context: Context) -> None:
    context.emit("paid", Paid)  # mypy=arg-type pyright=reportArgumentType
    context.emit(Paid(order="1"), "paid")  # mypy=arg-type,arg-type pyright=reportArgumentType,reportArgumentType
    print(context.emitted)  # mypy=attr-defined pyright=reportAttributeAccessIssue
    await context.change(orders, event.order, Parcel.pack)  # mypy=arg-type pyright=reportArgumentType
