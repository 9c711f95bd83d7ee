"""What the other cases are about: events, an aggregate, a service. All of it is right."""

from __future__ import annotations

from tidings import Aggregate, Event, Service, evolves


class Placed(Event, key="order"):
    order: str
    pence: int = 0


class Paid(Event, key="order"):
    order: str


class Order(Aggregate, category="order"):
    def __init__(self) -> None:
        self.pence = 0

    def place(self, pence: int) -> None:
        self.record(Placed(order=self.id, pence=pence))

    def pay(self, *, by: str = "card") -> str:
        self.record(Paid(order=self.id))
        return by

    @evolves(Placed)
    def _placed(self, event: Placed) -> None:
        self.pence = event.pence


class Parcel(Aggregate, category="parcel"):
    def pack(self) -> None: ...


shop = Service("shop")
orders = shop.repository(Order)
