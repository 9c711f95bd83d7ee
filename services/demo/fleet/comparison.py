"""Compares two logs of the same trade: do they have the same orders? Pure.

Results of a race (were there enough goods, could a parcel still be stopped) may differ between any two runs. Orders,
returns and declined payments may not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from typing import Final, NamedTuple

from services.demo.fleet.reading import Reading

__all__ = ["Line", "compare"]

NAMED: Final = 3


class Line(NamedTuple):
    """One number, in both logs."""

    what: str
    embedded: str
    fleet: str
    difference: str
    """The first differences; empty if the logs are equal in every single item, not only in number."""


def compare(embedded: Reading, fleet: Reading, number_of: Callable[[str], str]) -> list[Line]:
    """Compare the logs. `number_of` returns the invoice of an order in `fleet`; in `embedded` it is the order's id."""
    ours = {order_id: order_id for order_id in embedded.baskets}
    theirs = {order_id: number_of(order_id) for order_id in fleet.baskets}

    def line(what: str, of: Callable[[Reading], Mapping[str, object]], total: Callable[[Reading], str]) -> Line:
        first = {ours.get(name, name): value for name, value in of(embedded).items()}
        second = {theirs.get(name, name): value for name, value in of(fleet).items()}
        lost = len(of(fleet)) - len(second)  # two orders of one invoice
        return Line(what, total(embedded), total(fleet), _difference(first, second, lost))

    return [
        line("orders", lambda log: dict.fromkeys(log.baskets), lambda log: f"{len(log.baskets):,}"),
        line(
            "lines",
            lambda log: {name: (basket.lines, basket.pieces) for name, basket in log.baskets.items()},
            lambda log: f"{sum(basket.lines for basket in log.baskets.values()):,}",
        ),
        line("returns", lambda log: log.returns, lambda log: f"{len(log.returns):,}"),
        line(
            "gross value",
            lambda log: {name: basket.gross for name, basket in log.baskets.items()},
            lambda log: f"£{sum((basket.gross for basket in log.baskets.values()), Decimal()):,.2f}",
        ),
        line("payment declines", lambda log: log.declined, lambda log: f"{len(log.declined):,}"),
    ]


def _difference(first: Mapping[str, object], second: Mapping[str, object], lost: int) -> str:
    parts = [
        _some("missing", first.keys() - second.keys()),
        _some("too many", second.keys() - first.keys()),
        _some("different", {name for name in first.keys() & second.keys() if first[name] != second[name]}),
        f"{lost} twice" if lost else "",
    ]
    return "; ".join(filter(None, parts))


def _some(what: str, names: Iterable[str]) -> str:
    found = sorted(names)
    if not found:
        return ""
    more = ", ..." if len(found) > NAMED else ""
    return f"{len(found)} {what} ({', '.join(found[:NAMED])}{more})"
