"""The placement: what an Idempotency-Key stands for. The first request with a key decides, all others get the same.

An order's id says nothing about the key. Otherwise, whoever knows or guesses a key could compute the id of the order
that will be placed with it, and take that id first.
"""

from __future__ import annotations

from hashlib import sha256

from services.order.events import OrderNumbered
from tidings import Aggregate, evolves

__all__ = ["Placement", "placement_of"]


class Placement(Aggregate, category="placement"):
    """One key of one caller, in stream `placement-<id>`. It begins once and never changes."""

    def __init__(self) -> None:
        self.order_id = ""
        self.fingerprint = ""
        """Of the body of the first request."""

    def number(self, order_id: str, fingerprint: str) -> None:
        """Let the key stand for this order."""
        self.record(OrderNumbered(order_id=order_id, fingerprint=fingerprint))

    @evolves(OrderNumbered)
    def _numbered(self, event: OrderNumbered) -> None:
        self.order_id, self.fingerprint = event.order_id, event.fingerprint


def placement_of(scope: str, key: str) -> str:
    """Return the id of a placement. Callers of different scopes never share one."""
    return sha256(f"{len(scope)}:{scope}{key}".encode()).hexdigest()
