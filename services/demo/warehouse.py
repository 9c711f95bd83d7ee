"""Incoming goods, written to the log as a scanner at the warehouse's door would do it, without a service.

Each delivery begins a stream whose name follows from the data. A second run tries all of them again, and the store
refuses those that exist: nothing comes in twice, wherever the first run was interrupted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Final, NamedTuple, TypeVar

from services.importer import Invoice
from services.inventory.events import GoodsReceived, ReturnReceived
from tidings import NO_STREAM, Event, EventStore, Log
from tidings.errors import StoreUnavailable, WrongExpectedVersion

__all__ = ["Warehouse"]

T = TypeVar("T")

AT_ONCE: Final = 64
"""Deliveries and returns that are written concurrently, so that they share the store's commits."""

TRIES: Final = 60
AGAIN: Final = 1.0
"""Seconds until the scanner tries again when the store is down. The goods begin their stream only once."""


class _Goods(NamedTuple):
    stream: str
    event: Event


class Warehouse:
    """The door of the warehouse. Each method returns how many deliveries are known to be new."""

    def __init__(self, store: EventStore) -> None:
        self._log = Log(store)

    async def receive(self, stock: dict[str, int]) -> int:
        """Write the first deliveries of these articles: sku to pieces."""
        goods = (_Goods(f"goods-{sku}", GoodsReceived(sku=sku, quantity=pieces)) for sku, pieces in stock.items())
        return await self._book_in(goods, "opening stock")

    async def receive_again(self, sku: str, pieces: int, run: int) -> int:
        """Write one more delivery of an article, for this run of the demo."""
        goods = _Goods(f"goods-{sku}-{run}", GoodsReceived(sku=sku, quantity=pieces))
        return await self._book_in([goods], f"for run {run}")

    async def take_back(self, invoice: Invoice, source: str) -> int:
        """Write the goods of a return."""
        return await self._book_in(_came_back(invoice), source)

    async def _book_in(self, all_goods: Iterable[_Goods], reason: str) -> int:
        made = 0
        for together in _batches(all_goods, AT_ONCE):
            made += sum(await asyncio.gather(*(self._append(goods, reason) for goods in together)))
        return made

    async def _append(self, goods: _Goods, reason: str) -> bool:
        who = {"actor": "warehouse", "reason": reason}
        for left in range(TRIES - 1, -1, -1):
            try:
                await self._log.append(goods.stream, goods.event, expected=NO_STREAM, metadata=who)
            except WrongExpectedVersion:
                return False
            except StoreUnavailable:
                if not left:
                    raise
                await asyncio.sleep(AGAIN)
            else:
                break
        return True


def _came_back(invoice: Invoice) -> Iterator[_Goods]:
    for number, goods in enumerate(invoice.goods, 1):
        returned = ReturnReceived(return_id=invoice.number, sku=goods.sku, quantity=goods.quantity)
        yield _Goods(f"return-{invoice.number}.{number}", returned)


def _batches(things: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(things)
    while batch := list(islice(iterator, size)):
        yield batch
