"""Services whose events `tidings capture` writes tests of: a bank with accounts, and an office with a resource."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import Enum

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict
from sqlalchemy.ext.asyncio import AsyncSession

from tidings import Aggregate, Context, Event, Retry, Service, evolves

__all__ = ["Line", "Office", "Overdrawn", "bank", "branch", "office"]

AT_ONCE = Retry(attempts=1, hold=None, hold_key=False)
"""Dead after the first attempt, so that later events of the key go on."""


class Kind(Enum):
    CASH = "cash"
    CARD = "card"


class Line(BaseModel):
    """A part of an event."""

    model_config = ConfigDict(frozen=True)

    text: str
    kind: Kind = Kind.CASH


class Opened(Event, key="account"):
    account: str
    owner: str


class Paid(Event, key="account"):
    account: str
    pence: int
    lines: tuple[Line, ...] = ()


class Asked(Event, key="account"):
    account: str
    pence: int


class Withdrawn(Event, key="account"):
    account: str
    pence: int


class Told(Event, key="account"):
    account: str
    text: str


class Overdrawn(Exception):
    """There is too little on an account."""


class Account(Aggregate, category="account"):
    def __init__(self) -> None:
        self.owner = ""
        self.pence = 0

    def withdraw(self, pence: int) -> None:
        if pence > self.pence:
            raise Overdrawn(f"account {self.id} of {self.owner} has {self.pence} pence, not {pence}")
        self.record(Withdrawn(account=self.id, pence=pence))

    def pay(self, pence: int) -> None:
        self.record(Paid(account=self.id, pence=pence))

    @evolves(Opened)
    def _opened(self, event: Opened) -> None:
        self.owner = event.owner

    @evolves(Paid)
    def _paid(self, event: Paid) -> None:
        self.pence += event.pence

    @evolves(Withdrawn)
    def _withdrawn(self, event: Withdrawn) -> None:
        self.pence -= event.pence


metadata = sa.MetaData()
withdrawals = sa.Table("withdrawals", metadata, sa.Column("account", sa.String, primary_key=True))

bank = Service("bank", tables=metadata)
accounts = bank.repository(Account)


@bank.on(Asked, retry=AT_ONCE)
async def withdraw(event: Asked, context: Context) -> None:
    await _withdraw(event, context)
    context.emit(f"letter-{event.account}", Told(account=event.account, text=str(context.metadata.get("actor"))))


async def _withdraw(event: Asked, context: Context) -> None:
    await context.change(accounts, event.account, Account.withdraw, event.pence)


@bank.on(Withdrawn, retry=AT_ONCE)
async def once(event: Withdrawn, session: AsyncSession) -> None:
    """Fail for the second withdrawal from an account."""
    await session.execute(sa.insert(withdrawals).values(account=event.account))


branch = Service("branch")


@branch.on(Asked, retry=AT_ONCE)
async def complain(event: Asked) -> None:
    if event.pence > 1000:
        raise ValueError(f"nobody asks for {event.pence}")


class Office:
    """A resource."""

    async def write(self, text: str) -> None:
        raise AssertionError("the real one was called")


@asynccontextmanager
async def staffed(service: Service) -> AsyncIterator[Office]:
    yield Office()


office = Service("office", lifespan=staffed)


@office.on(Told, retry=AT_ONCE)
async def write(event: Told, office: Office) -> None:
    await office.write(event.text)
