"""Inventory against a model that fits on a page: whatever is received, wanted, cancelled, shipped and returned."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from services.inventory.events import (
    GoodsReceived,
    OrderCancelled,
    OrderCreated,
    OrderLine,
    ReturnReceived,
    ShipmentDispatched,
)
from services.inventory.tables import stock
from tests.services.world import World, world
from tidings import Event

SKUS = ("cup", "jar", "mug")

Lines = dict[str, int]
Step = tuple[str, str, Lines]

steps = st.lists(
    st.tuples(
        st.sampled_from(["receive", "return", "order", "order", "order", "cancel", "ship"]),
        st.sampled_from(["1", "2", "3", "4"]),
        st.dictionaries(st.sampled_from(SKUS), st.integers(1, 5), min_size=1),
    ),
    max_size=30,
)


@dataclass
class Model:
    """The model: counts, without a database or events."""

    shelf: dict[str, dict[str, int]] = field(default_factory=dict)
    held: dict[str, Lines] = field(default_factory=dict)
    ordered: set[str] = field(default_factory=set)

    def add(self, sku: str, **more: int) -> None:
        row = self.shelf.setdefault(sku, dict.fromkeys(("on_hand", "reserved", "shipped"), 0))
        for place, pieces in more.items():
            row[place] += pieces

    def take(self, step: Step) -> list[Event]:
        """Apply a step to the model, and return it as events for Inventory. An order is placed once; only reserved
        goods are shipped."""
        what, order_id, lines = step
        if what in ("receive", "return"):
            for sku, pieces in lines.items():
                self.add(sku, on_hand=pieces)
            if what == "receive":
                return [GoodsReceived(sku=sku, quantity=pieces) for sku, pieces in lines.items()]
            return [ReturnReceived(return_id="C", sku=sku, quantity=pieces) for sku, pieces in lines.items()]
        if what == "order":
            return self.order(order_id, lines) if order_id not in self.ordered else []
        if order_id not in (self.ordered if what == "cancel" else self.held):
            return []
        for sku, pieces in self.held.pop(order_id, {}).items():
            self.add(sku, reserved=-pieces, **{"on_hand" if what == "cancel" else "shipped": pieces})
        return [OrderCancelled(order_id=order_id) if what == "cancel" else ShipmentDispatched(order_id=order_id)]

    def order(self, order_id: str, lines: Lines) -> list[Event]:
        self.ordered.add(order_id)
        if all(self.shelf.get(sku, {}).get("on_hand", 0) >= pieces for sku, pieces in lines.items()):
            self.held[order_id] = lines
            for sku, pieces in lines.items():
                self.add(sku, on_hand=-pieces, reserved=pieces)
        wanted = tuple(OrderLine(sku=sku, quantity=pieces) for sku, pieces in lines.items())
        return [OrderCreated(order_id=order_id, lines=wanted)]


async def shelf_of(shop: World) -> dict[str, dict[str, int]]:
    rows = await shop.rows("inventory", stock)
    return {row.sku: {"on_hand": row.on_hand, "reserved": row.reserved, "shipped": row.shipped} for row in rows}


async def compare(chosen: Sequence[Step]) -> None:
    model = Model()
    async with world() as shop:
        for step in chosen:
            for event in model.take(step):
                await shop.say("told", event)
                await shop.handle("inventory")
            assert await shelf_of(shop) == model.shelf
        assert all(min(row.values()) >= 0 for row in model.shelf.values())


@settings(deadline=None, max_examples=50)
@given(steps)
def test_inventory_agrees_with_the_model_and_is_never_below_zero(chosen: list[Step]) -> None:
    asyncio.run(compare(chosen))
