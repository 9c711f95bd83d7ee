"""The payment gateway: another company's system, whose effects no transaction of ours can undo. With a sandbox for
demos.

A call may take effect although its answer is lost. It must then be repeated without taking effect twice. That is what
the `key` is for: a gateway remembers it, and answers a repeated key with its first answer.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Final, Protocol, runtime_checkable
from uuid import NAMESPACE_URL, uuid5

from services.payment.money import pence, pounds

__all__ = [
    "DECLINED_MULTIPLE",
    "Answer",
    "Entry",
    "GatewayRefused",
    "GatewayUnavailable",
    "Operation",
    "PaymentGateway",
    "SandboxGateway",
    "open_sandbox",
]


class GatewayUnavailable(Exception):
    """No answer: the call may or may not have taken effect. Repeat it with the same key."""


class GatewayRefused(Exception):
    """The gateway refused an impossible operation, such as taking more than it holds. Do not repeat the call."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The gateway's answer to an authorisation."""

    authorisation: str
    """The gateway's id of the held amount; pass it to the other operations. Empty if it declined."""
    declined: str
    """Why it declined; empty if it agreed."""


@runtime_checkable
class PaymentGateway(Protocol):
    """The port of a payment gateway. Each call takes effect at most once per key.

    All raise `GatewayUnavailable`; all but `authorise` raise `GatewayRefused`.
    """

    async def authorise(self, amount: Decimal, *, reference: str, key: str) -> Answer:
        """Hold the amount (pounds, whole pence). `reference` is what the customer reads on the statement."""
        ...

    async def capture(self, authorisation: str, *, key: str) -> None:
        """Take the held amount."""
        ...

    async def void(self, authorisation: str, *, key: str) -> None:
        """Release the held amount."""
        ...

    async def refund(self, authorisation: str, *, key: str) -> None:
        """Give back the captured amount."""
        ...


# ---- the sandbox ---------------------------------------------------------------------

DECLINED_MULTIPLE: Final = 29
"""Pence: the sandbox declines multiples of this amount, about 3 in 100 orders and always the same ones."""


class Operation(StrEnum):
    """An operation of a gateway."""

    AUTHORISE = "authorise"
    DECLINE = "decline"
    CAPTURE = "capture"
    VOID = "void"
    REFUND = "refund"


_AFTER: Final = {
    Operation.CAPTURE: Operation.AUTHORISE,
    Operation.VOID: Operation.AUTHORISE,
    Operation.REFUND: Operation.CAPTURE,
}
"""Operation to the one that must have come before it on the same authorisation."""

_LEDGER: Final = """
CREATE TABLE IF NOT EXISTS ledger (
    number INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    operation TEXT NOT NULL,
    authorisation TEXT NOT NULL,
    reference TEXT NOT NULL,
    pence INTEGER NOT NULL CHECK (pence > 0),
    calls INTEGER NOT NULL DEFAULT 1
)
"""

_ENTER: Final = "INSERT INTO ledger (key, operation, authorisation, reference, pence) VALUES (?, ?, ?, ?, ?)"
_READ: Final = "SELECT key, operation, authorisation, reference, pence, calls FROM ledger WHERE {} ORDER BY number"


@dataclass(frozen=True, slots=True)
class Entry:
    """One effect in the sandbox's ledger."""

    key: str
    operation: Operation
    authorisation: str
    reference: str
    amount: Decimal
    calls: int = 1
    """How many calls had this key. It took effect once."""


class SandboxGateway:
    """A gateway for demos, with a ledger in a SQLite file of its own. A key can be in it once, so it takes effect once.

    It agrees to every amount that is not a multiple of `DECLINED_MULTIPLE` pence. Get one from `open_sandbox`.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._turn = asyncio.Lock()

    async def authorise(self, amount: Decimal, *, reference: str, key: str) -> Answer:
        """See `PaymentGateway.authorise`."""

        def effect() -> Entry:
            operation = Operation.AUTHORISE if pence(amount) % DECLINED_MULTIPLE else Operation.DECLINE
            return Entry(key, operation, f"auth-{uuid5(NAMESPACE_URL, key).hex[:12]}", reference, amount)

        entry = await self._once(key, effect)
        if entry.operation is Operation.DECLINE:
            return Answer("", f"declined by the bank (£{amount})")
        return Answer(entry.authorisation, "")

    async def capture(self, authorisation: str, *, key: str) -> None:
        """See `PaymentGateway.capture`."""
        await self._follow(Operation.CAPTURE, authorisation, key)

    async def void(self, authorisation: str, *, key: str) -> None:
        """See `PaymentGateway.void`."""
        await self._follow(Operation.VOID, authorisation, key)

    async def refund(self, authorisation: str, *, key: str) -> None:
        """See `PaymentGateway.refund`."""
        await self._follow(Operation.REFUND, authorisation, key)

    async def ledger(self) -> list[Entry]:
        """Return every entry, oldest first."""
        async with self._turn:
            return await asyncio.to_thread(self._entries, "TRUE")

    async def _follow(self, operation: Operation, authorisation: str, key: str) -> None:
        def effect() -> Entry:
            before = self._entries("authorisation = ?", authorisation)
            if not before or before[-1].operation is not _AFTER[operation]:
                found = f"its last operation was {before[-1].operation}" if before else "it is unknown here"
                raise GatewayRefused(f"cannot {operation} {authorisation!r}: {found}, not {_AFTER[operation]}")
            return Entry(key, operation, authorisation, before[0].reference, before[0].amount)

        await self._once(key, effect)

    async def _once(self, key: str, effect: Callable[[], Entry]) -> Entry:
        """Return the entry of this key; the first time, `effect` creates it."""
        async with self._turn:
            return await asyncio.to_thread(self._once_now, key, effect)

    def _once_now(self, key: str, effect: Callable[[], Entry]) -> Entry:
        with self._connection:
            self._connection.execute("UPDATE ledger SET calls = calls + 1 WHERE key = ?", (key,))
            known = self._entries("key = ?", key)
            if known:
                return known[0]
            new = effect()
            row = (new.key, new.operation, new.authorisation, new.reference, pence(new.amount))
            self._connection.execute(_ENTER, row)
            return new

    def _entries(self, condition: str, *parameters: str) -> list[Entry]:
        rows = self._connection.execute(_READ.format(condition), parameters)
        return [Entry(key, Operation(does), name, whose, pounds(n), calls) for key, does, name, whose, n, calls in rows]


@asynccontextmanager
async def open_sandbox(path: Path | str) -> AsyncIterator[SandboxGateway]:
    """Open a sandbox whose ledger is in the file at `path`, or in memory with ":memory:"."""
    connection = sqlite3.connect(path, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(_LEDGER)
        yield SandboxGateway(connection)
    finally:
        connection.close()
