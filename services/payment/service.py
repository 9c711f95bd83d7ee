"""The Payment service: calls the gateway, then records the answer.

The table is part of the handler's transaction, so it changes exactly once per event. The gateway is not: if this
process dies after the call and before the commit, the handler runs again and calls again. `context.idempotency_key()`
is the same both times, so the gateway recognises the call and repeats its answer.

Handlers call the gateway before they write anything, so that nothing must be undone if it does not answer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Final, NamedTuple

from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from services.payment.events import (
    OrderCancelled,
    OrderConfirmed,
    OrderCreated,
    PaymentAuthorised,
    PaymentCaptured,
    PaymentDeclined,
    PaymentRefunded,
    PaymentVoided,
)
from services.payment.gateway import GatewayRefused, PaymentGateway, open_sandbox
from services.payment.money import pence, pounds, to_the_penny
from services.payment.tables import AFTER, State, metadata, payments
from tidings import Context, Event, Retry, Service

__all__ = ["PaymentSettings", "payment"]


class PaymentSettings(BaseSettings):
    """Settings of the service, read from the environment when it starts."""

    model_config = SettingsConfigDict(env_prefix="PAYMENT_")

    ledger: str = "gateway.db"
    """`PAYMENT_LEDGER`: the file of the sandbox gateway's ledger; ":memory:" keeps nothing."""


@asynccontextmanager
async def connected(service: Service) -> AsyncIterator[PaymentGateway]:
    """Open the gateway while the service runs. Handlers ask for it by its protocol."""
    async with open_sandbox(PaymentSettings().ledger) as gateway:
        yield gateway


payment = Service("payment", tables=metadata, lifespan=connected)


class Contradiction(Exception):
    """A payment cannot move to the state that an event demands. A retry would not help: somebody has to look."""


PATIENT: Final = Retry(permanent=(GatewayRefused, Contradiction))
"""Retries for calls to the gateway: soon and then less and less often. A refusal is dead at once."""


@payment.on(OrderCreated, retry=PATIENT)
async def authorise(event: OrderCreated, context: Context, gateway: PaymentGateway) -> None:
    """Hold the total of a new order. The transaction begins when the gateway has answered: many calls wait at once."""
    amount = to_the_penny(sum((line.quantity * line.unit_price for line in event.lines), Decimal()))
    answer = await gateway.authorise(amount, reference=f"order {event.order_id}", key=context.idempotency_key())
    state = State.DECLINED if answer.declined else State.AUTHORISED
    row = {"order_id": event.order_id, "state": state, "pence": pence(amount), "authorisation": answer.authorisation}
    async with context.session() as session:
        await session.execute(insert(payments).values(row))
    if answer.declined:
        declined = PaymentDeclined(order_id=event.order_id, amount=amount, reason=answer.declined)
        _tell(context, event.order_id, declined, answer.declined)
    else:
        held = PaymentAuthorised(order_id=event.order_id, amount=amount, authorisation=answer.authorisation)
        _tell(context, event.order_id, held, f"£{amount} held as {answer.authorisation}")


@payment.on(OrderConfirmed, retry=PATIENT)
async def capture(
    event: OrderConfirmed, context: Context, connection: AsyncConnection, gateway: PaymentGateway
) -> None:
    """Take the held amount of a confirmed order."""
    held = await _find(connection, event.order_id)
    await gateway.capture(held.authorisation, key=context.idempotency_key())
    await _move(connection, event.order_id, State.CAPTURED)
    _tell(
        context, event.order_id, PaymentCaptured(order_id=event.order_id, amount=held.amount), "the order is confirmed"
    )


@payment.on(OrderCancelled, retry=PATIENT)
async def give_back(
    event: OrderCancelled, context: Context, connection: AsyncConnection, gateway: PaymentGateway
) -> None:
    """Release or give back the amount of a cancelled order. If the payment was declined, there is nothing to do."""
    found = await _find(connection, event.order_id)
    if found.state is State.AUTHORISED:
        await gateway.void(found.authorisation, key=context.idempotency_key())
        await _move(connection, event.order_id, State.VOIDED)
        voided = PaymentVoided(order_id=event.order_id, amount=found.amount)
        _tell(context, event.order_id, voided, "the order was cancelled before it was charged")
    elif found.state is State.CAPTURED:
        await gateway.refund(found.authorisation, key=context.idempotency_key())
        await _move(connection, event.order_id, State.REFUNDED)
        refunded = PaymentRefunded(order_id=event.order_id, amount=found.amount)
        _tell(context, event.order_id, refunded, "the order was cancelled after it was charged")


class _Payment(NamedTuple):
    state: State
    amount: Decimal
    authorisation: str


async def _find(connection: AsyncConnection, order_id: str) -> _Payment:
    """Return the payment. It exists: `OrderCreated` comes first, and the events of one order come in order."""
    row = (await connection.execute(select(payments).where(payments.c.order_id == order_id))).one()
    return _Payment(State(row.state), pounds(row.pence), row.authorisation)


async def _move(connection: AsyncConnection, order_id: str, to: State) -> None:
    legal = (payments.c.order_id == order_id) & (payments.c.state == AFTER[to])
    moved = await connection.execute(update(payments).where(legal).values(state=to))
    if moved.rowcount != 1:
        raise Contradiction(
            f"the payment of order {order_id} is not {AFTER[to]}, so it cannot become {to}; look at its events"
        )


def _tell(context: Context, order_id: str, event: Event, reason: str) -> None:
    context.emit(f"payment-{order_id}", event, metadata={"actor": "payment", "reason": reason})
